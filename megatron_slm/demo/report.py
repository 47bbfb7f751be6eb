"""The last stage of the demo: `python -m megatron_slm.demo.report FOLDER` writes a summary, a picture and a page."""

import json
import sys
from pathlib import Path

from megatron_slm.demo.corpora import COUNTS
from megatron_slm.demo.passages import Passages, held_out_passages
from megatron_slm.demo.results import draw_held_out, overtaking, results_table, selected_table
from megatron_slm.demo.runs import COMPARED, RATIO, SEQ_LENGTH, Folders
from megatron_slm.demo.texts import HELD_OUT
from megatron_slm.reporting.escaping import escape_html
from megatron_slm.reporting.page import page_html
from megatron_slm.reporting.tokens import legend_html, tokens_html

TITLES = dict(zip(HELD_OUT, ("mathematics", "general text"), strict=True))
RUNS = {"base": "base", "reference": "reference (base + curated text)", **COMPARED}
PASSAGES, PASSAGE_TOKENS = 12, 160


def write_report(folders: Folders) -> None:
    """Write what finished runs show to the demo's folder."""
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
        "Held-out text at the end of each run: loss (nats a token) and bits a byte.\n\n"
        f"{results_table(folders.runs, RUNS, TITLES)}\n\n"
        f"{overtaking(folders.runs, HELD_OUT[0])}\n\n"
        "What SLM selected of each source of the general text:\n\n"
        f"{selected_table(folders.runs)}\n\n"
        f"Held-out documents dropped, because they share 13 words in a row with a training text: {dropped}.\n"
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
        f"loss are selected: {escape_html(shares)}. Tokens in grey italics are not scored. A pointer that rests on a "
        f"token shows its losses.</p>\n<section>{legend_html()}</section>"
    )
    return page_html("Which tokens are worth learning?", "\n".join([introduction, *sections]))


if __name__ == "__main__":
    write_report(Folders(Path(sys.argv[1])))
