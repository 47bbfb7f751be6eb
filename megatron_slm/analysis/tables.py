"""Tables of observed tokens: for the terminal, as CSV files, and for the report."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_slm.analysis.dynamics import CLASSES, PAPER, Dynamics, class_curves, most_fluctuating, trends
from megatron_slm.analysis.selections import (
    Group,
    Selections,
    by_corpus,
    by_document_length,
    by_kind,
    by_position,
    by_token,
    overlaps,
    perplexities,
    recorded,
)
from megatron_slm.data.observed import Observations
from megatron_slm.errors import UserError
from megatron_slm.reporting.tables import Cell, aligned_table, formatted

SHOWN_STEPS = 6
CONTEXT = 12
"""Tokens before and after a token that is shown with its context."""


@dataclass(frozen=True)
class Table:
    """A table: its name as a file, its title, the titles of the columns, and the rows."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]

    def text(self) -> str:
        """Return the table for a terminal."""
        return aligned_table(self.columns, [[formatted(cell) for cell in row] for row in self.rows])


def write_csv(tables: Sequence[Table], folder: Path) -> None:
    """Write each table to a CSV file.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        with (folder / f"{table.name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([table.columns, *table.rows])


def dynamics_tables(observed: Observations, texts: list[str], first: int, change: float) -> list[Table]:
    """Return the classes beside the paper's, their curves, their learning times, and the most fluctuating tokens.

    Args:
        observed: of the run.
        texts: text of each token.
        first: first step to use.
        change: fitted change that counts, in nats.

    Raises:
        UserError: fewer than three steps are recorded.
    """
    observed = from_step(observed, first)
    if len(observed.steps) < 3:
        reason = f"the recorded steps are {', '.join(map(str, observed.steps)) or 'none'}, and a trend needs three"
        remedy = "Record more: training.observe, or training.keep_checkpoints and megatron-slm analyze tokens"
        raise UserError("observed steps", len(observed.steps), reason, remedy)
    found = trends(observed.steps, observed.loss_SN, change)
    shares: list[list[Cell]] = [
        [name, *values]
        for name, *values in zip(CLASSES, found.shares(), *PAPER.values(), _median_learned(found), strict=True)
    ]
    curves = class_curves(found, observed.loss_SN)
    return [
        Table("classes", "Classes of tokens", ["class", "share", *PAPER, "median step of half the drop"], shares),
        Table(
            "class_curves",
            "Mean loss of each class (nats)",
            ["step", *CLASSES],
            [[step, *curves[:, index].tolist()] for index, step in enumerate(observed.steps)],
        ),
        _fluctuating_table(observed, texts, found),
    ]


def _median_learned(found: Dynamics) -> list[float]:
    learned_N = found.learned_N[np.isfinite(found.learned_N)]
    median = float(np.median(learned_N)) if len(learned_N) else float("nan")
    return [median if name == "H->L" else float("nan") for name in CLASSES]


def _fluctuating_table(observed: Observations, texts: list[str], found: Dynamics) -> Table:
    rows: list[list[Cell]] = []
    for name in ("L->L", "H->H"):
        for row in most_fluctuating(found, name, 10):
            before, after = context(observed, texts, row)
            lowest, highest = observed.loss_SN[:, row].min(), observed.loss_SN[:, row].max()
            rows.append([name, f"{before}[{texts[row]}]{after}", found.spread_N[row], float(lowest), float(highest)])
    title = "Tokens whose losses fluctuate most around their trend (in brackets)"
    return Table("fluctuating", title, ["class", "token in its context", "spread", "lowest loss", "highest loss"], rows)


def context(observed: Observations, texts: list[str], row: int) -> tuple[str, str]:
    """Return the observed text around a token, of the same document."""
    document = observed.columns["document"][row], observed.columns["corpus"][row]

    def is_near(other: int) -> bool:
        if not 0 <= other < len(observed):
            return False
        same = (observed.columns["document"][other], observed.columns["corpus"][other]) == document
        return bool(same and observed.columns["offset"][other] - observed.columns["offset"][row] == other - row)

    before = "".join(texts[other] for other in range(row - CONTEXT, row) if is_near(other))
    after = "".join(texts[other] for other in range(row + 1, row + 1 + CONTEXT) if is_near(other))
    return before, after


def selection_tables(observed: Observations, texts: list[str], first: int) -> list[Table]:
    """Return perplexities of the selections, selected shares of groups of tokens, and overlaps of the selections.

    Raises:
        UserError: no selection is recorded.
    """
    observed = from_step(observed, first)
    selections = recorded(observed)
    if not selections.steps:
        reason = "no selection is recorded: the run trains on all tokens, or has no reference that can score them"
        raise UserError("observed tokens", len(observed), reason, "Analyze a selective run, or pass --reference PATH")
    shown = evenly(selections, SHOWN_STEPS)
    steps = [f"step {step}" for step in shown.steps]
    table = perplexities(shown, observed.loss_SN)
    overlap = overlaps(shown.mask_KN, shown.mask_KN)
    most = by_token(observed, texts, shown)
    listed = most if len(most) <= 40 else [*most[:20], *most[-20:]]
    return [
        Table(
            "perplexity",
            "Perplexity at each step (row) of the tokens selected at a step (column)",
            ["step", *steps],
            [[step, *table[:, index].tolist()] for index, step in enumerate(observed.steps)],
        ),
        _share_table("by_source", "Selected share of each corpus", "corpus", by_corpus(observed, shown), steps),
        _share_table("by_kind", "Selected share by kind of token", "kind", by_kind(texts, shown), steps),
        _share_table("by_position", "Selected share by position", "position", by_position(observed, shown), steps),
        _share_table(
            "by_length", "Selected share by length of document", "length", by_document_length(observed, shown), steps
        ),
        _share_table("by_token", "The most and the least selected tokens", "token", listed, steps),
        Table(
            "overlap",
            "Overlap of the selections: tokens in both, as a share of those in either",
            ["step", *steps],
            [[step, *overlap[index].tolist()] for index, step in enumerate(shown.steps)],
        ),
    ]


def _share_table(name: str, title: str, column: str, groups: list[Group], steps: list[str]) -> Table:
    rows: list[list[Cell]] = [[group.name, group.num_tokens, *group.share_K] for group in groups]
    return Table(name, title, [column, "tokens", *steps], rows)


def from_step(observed: Observations, first: int) -> Observations:
    """Return the observations without the steps before `first`."""
    kept_S = np.array([step >= first for step in observed.steps], dtype=bool)
    return replace(
        observed,
        steps=[step for step in observed.steps if step >= first],
        loss_SN=observed.loss_SN[kept_S],
        selected_SN=observed.selected_SN[kept_S],
        has_selection_S=observed.has_selection_S[kept_S],
    )


def evenly(selections: Selections, count: int) -> Selections:
    """Return at most `count` of the selections, evenly spread, with the first and the last."""
    total = len(selections.steps)
    if total <= count:
        return selections
    chosen = [round(index * (total - 1) / (count - 1)) for index in range(count)]
    return Selections([selections.steps[k] for k in chosen], selections.mask_KN[chosen])
