"""The parts of a report that need the losses of observed tokens: their dynamics, and what is selected."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from megatron_slm.analysis.comparison import tokens_identity
from megatron_slm.analysis.dynamics import CHANGE, CLASSES, PAPER, Dynamics, most_fluctuating, trends
from megatron_slm.analysis.runs import RunFiles
from megatron_slm.analysis.selections import overlaps, recorded
from megatron_slm.analysis.tables import Table, dynamics_tables, selection_tables
from megatron_slm.analysis.texts import observed_texts, passages
from megatron_slm.data.observed import Observations
from megatron_slm.errors import UserError
from megatron_slm.reporting.blocks import Block, Figures, Heading, Listing, Paragraph, PassageLosses, Passages
from megatron_slm.reporting.charts import Chart, Curve
from megatron_slm.reporting.tables import Cell, formatted

if TYPE_CHECKING:
    from numpy.typing import NDArray

PASSAGES, PASSAGE_TOKENS, PASSAGE_STEPS = 24, 160, 20
"""Passages of a group of runs, tokens per passage, and steps per run that the page shows, at most."""
PASSAGE_LOSSES = 600_000
"""Losses of tokens on passages in the whole page, at most."""
TRENDS = 3
"""Recorded steps that a trend needs."""
FLUCTUATING = 3
"""Tokens per class whose losses are drawn; the paper's Figure 3 draws as many."""
BINS = 12
SHARES = ("by_source", "by_kind", "by_position", "by_length", "by_token", "overlap")
"""The tables of `selection_tables` that hold shares."""
FOLDED = ("fluctuating", "by_token")
"""Long tables."""


@dataclass(frozen=True)
class Observer:
    """A run with observed tokens: its number, itself, the losses, and the text of each token."""

    number: int
    run: RunFiles
    observed: Observations
    texts: list[str]


def observers(runs: Sequence[RunFiles]) -> list[list[Observer]]:
    """Return the runs that observe tokens, grouped by the tokens; the runs of a group may be compared.

    Raises:
        UserError: the observed tokens of a run were prepared with another tokenizer than the run's.
    """
    groups: dict[str, list[Observer]] = {}
    for number, run in enumerate(runs):
        if run.observed is None or run.tokenizer is None:
            continue
        if run.observed.facts.get("tokenizer") != run.tokenizer.fingerprint:
            reason = "the corpus of its observed tokens was prepared with a different tokenizer than the run's"
            raise UserError("RUN_DIR", run.path, reason, "Remove its folder observed, or leave the run out")
        group = groups.setdefault(tokens_identity(run), [])
        texts = group[0].texts if group else observed_texts(run.observed, str(run.path))
        group.append(Observer(number, run, run.observed, texts))
    return list(groups.values())


def dynamics_blocks(groups: Sequence[Sequence[Observer]]) -> list[Block]:
    """Return the classes of tokens beside the paper's, their mean curves, and the tokens that fluctuate most."""
    shares: list[Chart] = []
    curves: list[Chart] = []
    learned: list[Chart] = []
    fluctuating: list[Chart] = []
    listings: list[Block] = []
    examples: list[Block] = []
    for group_number, group in enumerate(groups):
        bars: list[Curve] = []
        medians: list[float] = []
        for of in group:
            if len(of.observed.steps) < TRENDS:
                continue
            found = trends(of.observed.steps, of.observed.loss_SN)
            _, class_table, example_table = dynamics_tables(of.observed, of.texts, 0, CHANGE)
            bars.append(Curve(of.run.name, range(len(CLASSES)), found.shares(), run=of.number, look=of.number))
            learned_N = found.learned_N[np.isfinite(found.learned_N)]
            medians.append(float(np.median(learned_N)) if len(learned_N) else float("nan"))
            curves.append(_class_chart(of, class_table))
            learned.append(_learned_chart(of, found))
            fluctuating += list(_fluctuating_charts(of, found))
            examples.append(_named(example_table, of))
        if bars:
            shares.append(_shares_chart(group_number, bars))
            listings.append(_shares_table(shares[-1], medians))
    if not shares:
        return [Paragraph("No run has recorded its observed tokens at three or more steps, which a trend needs.")]
    return [
        Figures("Classes of tokens (Rho-1, section 2.1)", shares),
        *listings,
        Figures("Mean loss of each class (Rho-1, Figure 3)", curves),
        Figures("When falling losses were learned", learned),
        Figures("Tokens whose losses fluctuate most (Rho-1, Figure 3)", fluctuating),
        *examples,
    ]


def _shares_table(chart: Chart, medians: Sequence[float]) -> Listing:
    learned = [*medians, *[float("nan")] * len(PAPER)]
    rows: list[list[Cell]] = [
        [curve.label, *curve.y, median] for curve, median in zip(chart.curves, learned, strict=True)
    ]
    columns = ["run", *CLASSES, "median step of half the drop (H->L)"]
    table = Table(f"{chart.name}-table", "Shares of the classes", columns, rows)
    return Listing(table, row_runs=[curve.run for curve in chart.curves])


def _shares_chart(number: int, shares: Sequence[Curve]) -> Chart:
    paper = [
        Curve(f"paper, {name}", range(len(CLASSES)), values, look=216 - 1 - index)
        for index, (name, values) in enumerate(PAPER.items())
    ]
    caption = (
        "Share of the observed tokens whose fitted loss rises (L->H) or falls (H->L) by more than "
        f"{CHANGE:g} nats, or stays high (H->H) or low (L->L). The paper fits 15 checkpoints of 15B tokens."
    )
    curves = [*shares, *paper]
    return Chart(f"classes-{number}", "Shares of the classes", caption, "share of tokens", curves, "", CLASSES)


def _class_chart(of: Observer, table: Table) -> Chart:
    steps, *means = zip(*table.rows, strict=True)
    curves = [
        Curve(name, steps, values, run=of.number, look=look)
        for look, (name, values) in enumerate(zip(CLASSES, means, strict=True))
    ]
    caption = "Mean loss of the observed tokens of each class at every recorded step."
    title = f"Mean loss of each class: {of.run.name}"
    return Chart(f"class-curves-{of.number}", title, caption, "nats per token", curves, run=of.number)


def _learned_chart(of: Observer, found: Dynamics) -> Chart:
    """Return a histogram of the steps at which falling losses have passed half of their drop."""
    steps_N = found.learned_N[np.isfinite(found.learned_N)]
    bins = min(BINS, len(of.observed.steps))
    counts_B, edges = np.histogram(steps_N, bins, (of.observed.steps[0], of.observed.steps[-1]))
    names = [f"{low:,.0f}-{high:,.0f}" for low, high in pairwise(edges)]
    share_B = counts_B / max(len(steps_N), 1)
    caption = "Tokens of class H->L by the step at which the loss has passed half of its drop, interpolated."
    curve = Curve(of.run.name, range(bins), share_B.tolist(), run=of.number, look=of.number)
    title = f"Learning time: {of.run.name}"
    return Chart(f"learned-{of.number}", title, caption, "share of H->L", [curve], "step", names, of.number)


def _fluctuating_charts(of: Observer, found: Dynamics) -> Iterator[Chart]:
    for name in ("L->L", "H->H"):
        rows = most_fluctuating(found, name, FLUCTUATING)
        curves = [
            Curve(f"{number}: {_quoted(of.texts[row])}", of.observed.steps, of.observed.loss_SN[:, row].tolist(),
                  run=of.number, look=number - 1)
            for number, row in enumerate(rows, start=1)
        ]  # fmt: skip
        if curves:
            caption = "The widest spread around the fitted line; the table below shows these tokens in their context."
            title = f"Most fluctuating {name}: {of.run.name}"
            chart_name = f"fluctuating-{name[0].lower()}-{of.number}"
            yield Chart(chart_name, title, caption, "nats", curves, run=of.number)


def _quoted(text: str) -> str:
    return f"“{formatted(text)}”" if text else "part of a character"


def _named(table: Table, of: Observer) -> Listing:
    """Return a table of one run, with the run in its name and title."""
    title = of.run.name if table.name in SHARES else f"{table.title}: {of.run.name}"
    named = Table(f"{table.name}_{of.number}", title, table.columns, table.rows)
    return Listing(named, run=of.number, shaded=table.name in SHARES, folded=table.name in FOLDED)


def selection_blocks(groups: Sequence[Sequence[Observer]]) -> list[Block]:
    """Return passages of text, and what the runs select from the observed tokens."""
    shown = sum(min(len(of.observed.steps), PASSAGE_STEPS) for group in groups for of in group)
    count = max(1, min(PASSAGES, PASSAGE_LOSSES // max(shown * PASSAGE_TOKENS, 1)))
    if not groups:
        return [Paragraph("No run has recorded observed tokens: set training.observe, or run megatron-slm analyze.")]
    charts: list[Chart] = []
    tables: dict[str, list[Block]] = {}
    among: list[Block] = []
    for group in groups:
        selecting = [of for of in group if of.observed.has_selection_S.any()]
        for of in selecting:
            perplexity, *others = selection_tables(of.observed, of.texts, 0)
            charts.append(_perplexity_chart(of, perplexity))
            for table in others:
                tables.setdefault(table.title, []).append(_named(table, of))
        if len(selecting) > 1:
            among.append(_overlap_of_runs(selecting))
    note = "" if charts else "No run has recorded a selection among its observed tokens."
    return [
        *(_passages(group, count) for group in groups),
        Figures("Perplexity of what each step selects (Rho-1, Figure 8)", charts, note),
        *(block for title, listings in tables.items() for block in (Heading(title), *listings)),
        *among,
    ]


def _perplexity_chart(of: Observer, table: Table) -> Chart:
    steps, *values = zip(*table.rows, strict=True)
    curves = [
        Curve(f"selected at {title}", steps, column, run=of.number, look=look)
        for look, (title, column) in enumerate(zip(table.columns[1:], values, strict=True))
    ]
    caption = (
        "Each curve follows the tokens that were selected at one step. In the paper, later selections have a low "
        "perplexity early and a higher one late."
    )
    title = f"Perplexity of selected tokens: {of.run.name}"
    return Chart(f"perplexity-{of.number}", title, caption, "perplexity", curves, run=of.number)


def _overlap_of_runs(group: Sequence[Observer]) -> Listing:
    last_RN = np.stack([recorded(of.observed).mask_KN[-1] for of in group])
    names = [of.run.name for of in group]
    rows: list[list[Cell]] = [
        [name, *shares] for name, shares in zip(names, overlaps(last_RN, last_RN).tolist(), strict=True)
    ]
    title = "Overlap of the last selections of the runs: tokens in both, as a share of those in either"
    table = Table(f"overlap_of_runs_{group[0].number}", title, ["run", *names], rows)
    return Listing(table, row_runs=[of.number for of in group], shaded=True)


def _passages(group: Sequence[Observer], count: int) -> Passages:
    first = group[0]
    rows = passage_rows(first.observed, count)
    texts = [(_place(first.observed, part), first.texts[part]) for part in rows]
    # The reference of one run serves those that recorded none, because the tokens are the same.
    shared = next((of.observed.reference_N for of in group if of.observed.reference_N is not None), None)
    losses = [_passage_losses(of, rows, shared) for of in group]
    corpora = ", ".join(first.observed.corpora)
    return Passages(f"Observed text of {corpora}", texts, losses)


def _passage_losses(of: Observer, rows: Sequence[slice], shared: "NDArray[np.float32] | None") -> PassageLosses:
    observed = of.observed
    chosen = np.unique(np.linspace(0, len(observed.steps) - 1, PASSAGE_STEPS).astype(int))
    reference_N = shared if observed.reference_N is None else observed.reference_N
    return PassageLosses(
        of.number,
        [observed.steps[index] for index in chosen],
        [observed.loss_SN[chosen, part] for part in rows],
        [observed.selected_SN[chosen, part] for part in rows],
        [bool(observed.has_selection_S[index]) for index in chosen],
        None if reference_N is None else [reference_N[part] for part in rows],
    )


def passage_rows(observed: Observations, count: int) -> list[slice]:
    """Return the rows of passages that are spread evenly over the corpora, at least one per corpus.

    A passage is the observed part of a document from its beginning, or from the drawn token if it comes later.
    """
    parts = passages(observed)
    starts = np.array([part.start for part in parts])
    chosen: dict[int, slice] = {}
    corpora = np.unique(observed.columns["corpus"])
    for corpus in corpora:
        rows_N = np.flatnonzero(observed.columns["corpus"] == corpus)
        each = max(1, count // len(corpora))
        for index in range(each):
            row = int(rows_N[(2 * index + 1) * len(rows_N) // (2 * each)])
            part = parts[int(np.searchsorted(starts, row, side="right")) - 1]
            begin = part.start if row - part.start < PASSAGE_TOKENS else row
            chosen[begin] = slice(begin, min(begin + PASSAGE_TOKENS, part.stop))
    return [chosen[begin] for begin in sorted(chosen)]


def _place(observed: Observations, part: slice) -> str:
    columns = observed.columns
    corpus = observed.corpora[int(columns["corpus"][part.start])]
    position = int(columns["position"][part.start])
    last = position + part.stop - part.start - 1
    return f"{corpus}, document {int(columns['document'][part.start]):,}, tokens {position:,} to {last:,}"
