"""The demo's report: tables and curves of its runs, and a page of held-out text with its selected tokens."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from megatron_slm.data.corpus import load_corpus_tokenizer, open_corpus
from megatron_slm.data.loader import EvaluationStream
from megatron_slm.demo.chain import COMPARED, RATIO, SEQ_LENGTH, Folders
from megatron_slm.demo.texts import COUNTS, HELD_OUT
from megatron_slm.models.causal_lm import CausalLM, score_batch
from megatron_slm.models.pretrained import load_pretrained
from megatron_slm.reporting.charts import Curve, draw_curves
from megatron_slm.reporting.records import read_records
from megatron_slm.reporting.tables import markdown_table
from megatron_slm.reporting.tokens import Token, escape_html, legend_html, page_html, token_texts, tokens_html
from megatron_slm.selection import select_tokens
from megatron_slm.types import Batch

WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class Passages:
    """Tokens of some windows of a held-out set, and the share of all its tokens that is selected."""

    passages: list[list[Token]]
    share: float


def held_out_passages(
    corpora: dict[str, Path], models: dict[str, Path], ratio: float, seq_length: int, count: int, length: int
) -> dict[str, Passages]:
    """Score held-out corpora, and select from all of them together as from one pool.

    Args:
        corpora: prefixes by name, all with the same tokenizer.
        models: Hugging Face folders of `student` and `reference`.
        ratio: share of the tokens to select.
        seq_length: tokens per window, as in training.
        count: passages per corpus, evenly spread over it.
        length: tokens per passage, at most `seq_length`; a passage begins at the start of a window.
    """
    opened = {name: open_corpus(str(prefix)) for name, prefix in corpora.items()}
    tokenizer = load_corpus_tokenizer(next(iter(opened.values())))
    streams = {name: EvaluationStream(c, seq_length, tokenizer.eos_token_id, False) for name, c in opened.items()}
    batches = {name: stream.batch(list(range(len(stream)))) for name, stream in streams.items()}
    whole = Batch.concatenate(list(batches.values()))
    losses = {name: _losses(path, whole) for name, path in models.items()}
    kept_BT = select_tokens(losses["student"] - losses["reference"], whole.valid_BT, ratio).mask
    found, start = {}, 0
    for name, batch in batches.items():
        windows = len(batch.tokens_BT)
        shown = min(count, windows)
        rows = [start + index * windows // shown for index in range(shown)]
        passages = [_tokens(tokenizer, whole, row, losses, kept_BT, length) for row in rows]
        kept, valid = (int(mask_BT[start : start + windows].sum()) for mask_BT in (kept_BT, whole.valid_BT))
        found[name] = Passages(passages, kept / valid)
        start += windows
    return found


@torch.no_grad()
def _losses(folder: Path, batch: Batch) -> Tensor:
    """Return the loss of every token, float32 `[B, T]`."""
    module = CausalLM(load_pretrained(str(folder), "model", False, dtype=torch.float32)).eval()
    starts = range(0, len(batch.tokens_BT), WINDOWS_AT_ONCE)
    return torch.cat([score_batch(module, batch.rows(start, start + WINDOWS_AT_ONCE))["loss"] for start in starts])


def _tokens(
    tokenizer: Any, batch: Batch, row: int, losses: dict[str, Tensor], kept_BT: Tensor, length: int
) -> list[Token]:
    """Return the labels of one window with their losses; end tokens have no loss."""
    # Padding follows the last label of a stream.
    labels = [int(label) for label in batch.labels_BT[row, :length][batch.label_offset_BT[row, :length] >= 0]]
    texts = token_texts(tokenizer, labels)
    return [
        Token(text, float(losses["student"][row, t]), float(losses["reference"][row, t]), bool(kept_BT[row, t]))
        if batch.valid_BT[row, t]
        else Token(text + "\n")
        for t, text in enumerate(texts)
    ]


SELECTED = "selection/ratio/"


def run_records(runs: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of the run `name` in the folder `runs`."""
    return read_records(runs / name / "metrics.jsonl")


def results_table(runs: Path, names: Mapping[str, str], held_out: Mapping[str, str]) -> str:
    """Return a Markdown table of held-out losses (nats per token) and bits per byte at the end of each run.

    `names` and `held_out` hold the titles of runs and evaluation sets by name.
    """
    columns = [f"{title}: {unit}" for title in held_out.values() for unit in ("loss", "bits/byte")]
    rows = []
    for name, title in names.items():
        last = run_records(runs, name)[-1]
        figures = [last[f"eval/{key}/{unit}"] for key in held_out for unit in ("loss", "bits_per_byte")]
        counted = last.get("consumed_selected_tokens", last["consumed_tokens"])
        rows.append([title, f"{counted:,}", *(f"{figure:.3f}" for figure in figures)])
    return markdown_table(["run", "tokens in the loss", *columns], rows)


def overtaking(runs: Path, held_out: str) -> str:
    """Return a sentence with the tokens that SLM took to reach CLM's final held-out loss, and those that CLM took."""
    key = f"eval/{held_out}/loss"
    clm, slm = ([r for r in run_records(runs, name) if key in r] for name in ("clm", "slm"))
    end, total = clm[-1][key], clm[-1]["consumed_tokens"]
    passed = next((record["consumed_tokens"] for record in slm if record[key] <= end), None)
    if passed is None:
        return f"SLM did not reach CLM's final loss of {end:.3f} within {total:,} tokens."
    times = f"{total / passed:.1f} times as many"
    return f"SLM reached CLM's final loss of {end:.3f} by token {passed:,}; CLM took {total:,}, {times}."


def selected_table(runs: Path) -> str:
    """Return a Markdown table of the share that SLM selected of each source, over all logged steps and at the end."""
    records = run_records(runs, "slm")
    sources = [key.removeprefix(SELECTED) for key in records[-1] if key.startswith(SELECTED)]
    rows = []
    for source in sources:
        shares = [r[SELECTED + source] for r in records if r[SELECTED + source] is not None]
        rows.append([source, f"{fmean(shares):.0%}", f"{fmean(shares[-max(1, len(shares) // 5) :]):.0%}"])
    return markdown_table(["source", "selected, whole run", "last fifth"], rows)


def draw_held_out(runs: Path, names: Mapping[str, str], held_out: Mapping[str, str], path: Path) -> None:
    """Draw held-out losses over training tokens; every curve begins at the loss of the base."""
    panels = {
        title: [_curve(runs, *run, f"eval/{key}/loss") for run in names.items()] for key, title in held_out.items()
    }
    draw_curves(panels, "training tokens (thousands)", "loss (nats per token)", path)


def _curve(runs: Path, name: str, title: str, key: str) -> Curve:
    points: Sequence[tuple[float, float]] = [
        (0.0, run_records(runs, "base")[-1][key]),
        *((r["consumed_tokens"] / 1e3, r[key]) for r in run_records(runs, name) if key in r),
    ]
    return Curve(title, [tokens for tokens, _ in points], [loss for _, loss in points])


TITLES = dict(zip(HELD_OUT, ("mathematics", "general text"), strict=True))
RUNS = {"base": "base", "reference": "reference (base + curated text)", **COMPARED}
PASSAGES, PASSAGE_TOKENS = 12, 160


def write_report(folders: Folders) -> None:
    """Write summary, curves and page of a demo whose runs are finished."""
    folders.summary.write_text(_summary(folders), encoding="utf-8")
    titles = {name: f"Held-out {title}" for name, title in TITLES.items()}
    draw_held_out(folders.runs, COMPARED, titles, folders.picture)
    corpora = {name: folders.corpora / name for name in HELD_OUT}
    models = {"student": folders.models / "base", "reference": folders.models / "reference"}
    found = held_out_passages(corpora, models, RATIO, SEQ_LENGTH, PASSAGES, PASSAGE_TOKENS)
    folders.page.write_text(_page(found), encoding="utf-8")


def _summary(folders: Folders) -> str:
    counts = json.loads((folders.corpora / COUNTS).read_text(encoding="utf-8"))
    dropped = " and ".join(f"{counts[name]['dropped']} of {title}" for name, title in TITLES.items())
    return (
        "Held-out text at the end of each run: loss (nats per token) and bits per byte.\n\n"
        f"{results_table(folders.runs, RUNS, TITLES)}\n\n"
        f"{overtaking(folders.runs, HELD_OUT[0])}\n\n"
        "The share of each source of the general text that SLM selected:\n\n"
        f"{selected_table(folders.runs)}\n\n"
        f"Held-out documents dropped because they share 13 consecutive words with a training text: {dropped}.\n"
    )


def _page(found: dict[str, Passages]) -> str:
    shares = ", ".join(f"{passages.share:.0%} of {TITLES[name]}" for name, passages in found.items())
    sections = [
        f"<h2>Held-out {TITLES[name]}</h2>\n"
        + "\n".join(f"<section>{tokens_html(tokens)}</section>" for tokens in passages.passages)
        for name, passages in found.items()
    ]
    introduction = (
        "<p>Excess loss is the loss of the base model minus that of the reference, which was trained further on "
        f"curated mathematics. Of the tokens of both held-out sets together, the {RATIO:.0%} of highest excess "
        f"loss are selected: {escape_html(shares)}. Tokens in grey italics are not scored. Point at a token to see its "
        f"losses.</p>\n<section>{legend_html()}</section>"
    )
    return page_html("Which tokens are worth learning?", "\n".join([introduction, *sections]))


if __name__ == "__main__":
    write_report(Folders(Path(sys.argv[1])))
