"""One self-contained page of findings, tables, charts and text: HTML with its own style and script, and no network.

The page is made of plain values and knows nothing of runs, except that figures may belong to one of several. All text
is escaped, and a policy in the page forbids it to load or run anything but the style and script that it brings.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_slm.reporting.blocks import (
    Block,
    Figures,
    Findings,
    Fold,
    Heading,
    Listing,
    Page,
    Paragraph,
    Passages,
    RunHead,
    Warnings,
)
from megatron_slm.reporting.charts import HATCHES, Chart, Curve, look
from megatron_slm.reporting.tables import Cell, formatted
from megatron_slm.reporting.tokens import SHADES, escape_html, visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

MARKER = '<meta name="generator" content="megatron-slm report">'
"""The line by which a page is recognised as one of these."""
CURVE_POINTS, ALL_POINTS = 400, 200_000
"""Points that are drawn per curve, and in all charts together."""
LEVELS = 10
"""Shades of a shaded table."""


def thinned(curve: Curve, limit: int) -> Curve:
    """Return a curve of at most `limit` points that keeps its peaks.

    The points are divided into buckets of equal count, and the lowest and the highest point of each are kept, with the
    first and the last of all.
    """
    total = len(curve.x)
    y_N = np.asarray(curve.y, dtype=np.float64)
    if total <= limit or total == 0:
        return curve
    edges = np.linspace(0, total, max(limit // 2 - 1, 1) + 1).astype(int)
    ordered_N = np.where(np.isfinite(y_N), y_N, np.nanmean(np.where(np.isfinite(y_N), y_N, np.nan)))
    kept = {0, total - 1}
    for first, last in pairwise(edges):
        bucket = ordered_N[first:last]
        kept |= {int(first + bucket.argmin()), int(first + bucket.argmax())}
    rows = sorted(kept)

    def at(values: Sequence[float]) -> list[float]:
        return [values[row] for row in rows] if len(values) else []

    return curve._replace(x=at(curve.x), y=at(curve.y), lowest=at(curve.lowest), highest=at(curve.highest))


def page_html(page: Page) -> str:
    """Return the page as HTML."""
    style, script = (_part(name) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    entries = "".join(f'<li><a href="#{s.name}">{escape_html(s.title)}</a></li>' for s in page.sections)
    body = "".join(
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">'
        f'<h2 id="{section.name}-title">{number}. {escape_html(section.title)}</h2>'
        f"{''.join(_block(page, block) for block in section.blocks)}</section>"
        for number, section in enumerate(page.sections, start=1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARKER}
<title>{escape_html(page.title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape_html(page.title)}</h1><p>{escape_html(page.subtitle)}</p></header>
<div id="toolbar" role="region" aria-label="Display"></div>
<nav aria-label="Contents"><ol>{entries}</ol></nav>
<noscript><p class="box">JavaScript is off: charts and passages of text are not drawn. The verdict, all tables and the
configuration are below.</p></noscript>
<main id="content" tabindex="-1">
{body}
</main>
<script type="application/json" id="data">{embedded_json(_payload(page))}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded_json(value: object) -> str:
    """Return JSON that no text in it can end: `<` begins no element, and no character is invisible."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _part(name: str) -> str:
    return files("megatron_slm.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _block(page: Page, block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h3>{escape_html(block.text)}</h3>"
    if isinstance(block, Paragraph):
        return f"<p>{escape_html(block.text)}</p>"
    if isinstance(block, Warnings):
        items = "".join(f"<li>{escape_html(sentence)}</li>" for sentence in block.sentences)
        return f'<div class="box" role="note"><h3>{escape_html(block.title)}</h3><ul>{items}</ul></div>'
    if isinstance(block, Findings):
        return _findings(block)
    if isinstance(block, Figures):
        note = f'<p class="missing">{escape_html(block.note)}</p>' if block.note else ""
        figures = "".join(map(_figure, block.charts))
        return f'<h3>{escape_html(block.title)}</h3>{note}<div class="figures">{figures}</div>'
    if isinstance(block, Listing):
        return _listing(block)
    if isinstance(block, Fold):
        title, text = escape_html(block.title), escape_html(block.text)
        return f"<details{_of(block.run)}><summary>{title}</summary><pre>{text}</pre></details>"
    return f'<div class="passages" aria-label="{escape_html(block.title)}"></div>'


def _of(run: int | None) -> str:
    return "" if run is None else f' data-run="{run}"'


def _findings(block: Findings) -> str:
    words = {"good": "Good", "info": "Note", "warning": "Warning"}
    items = "".join(
        f'<li class="{level}"><strong>{words[level]}</strong> {escape_html(sentence)}</li>'
        for level, sentence in block.items
    )
    return f'<div{_of(block.run)}><h3>{escape_html(block.title)}</h3><ul class="findings">{items}</ul></div>'


def _figure(chart: Chart) -> str:
    title, caption = escape_html(chart.title), escape_html(chart.caption)
    text = f'<figcaption><h4 id="{chart.name}-title">{title}</h4><p>{caption}</p></figcaption>'
    return f'<figure id="{chart.name}" aria-labelledby="{chart.name}-title"{_of(chart.run)}>{text}</figure>'


def _listing(block: Listing) -> str:
    rows = block.table.rows
    is_text = [any(isinstance(row[index], str) for row in rows) for index in range(len(block.table.columns))]
    head = "".join(
        f'<th scope="col"{" class=text" if of_text else ""}>{escape_html(title)}</th>'
        for title, of_text in zip(block.table.columns, is_text, strict=True)
    )
    row_runs: Sequence[int | None] = block.row_runs or [None] * len(rows)
    body = "".join(_row(cells, run, block.shaded) for cells, run in zip(rows, row_runs, strict=True))
    note = f"<p>{escape_html(block.note)}</p>" if block.note else ""
    title = escape_html(block.table.title)
    # A region that scrolls must take the focus, or it cannot be scrolled with the keyboard.
    table = (
        f'{note}<div class="scroll" role="region" tabindex="0" aria-label="{title}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if block.folded:
        return f'<details class="listing fold"{_of(block.run)}><summary><h4>{title}</h4></summary>{table}</details>'
    return f'<div class="listing"{_of(block.run)}><h4>{title}</h4>{table}</div>'


def _row(cells: Sequence[Cell], run: int | None, shaded: bool) -> str:
    first, *others = cells
    title = f'<th scope="row">{escape_html(formatted(first))}</th>'
    return f"<tr{_of(run)}>{title}{''.join(_cell(cell, shaded) for cell in others)}</tr>"


def _cell(cell: Cell, shaded: bool) -> str:
    if isinstance(cell, str):
        return f'<td class="text">{escape_html(formatted(cell))}</td>'
    level = round(LEVELS * min(max(cell, 0.0), 1.0)) if shaded and isinstance(cell, float) and cell == cell else None
    return f"<td{'' if level is None else f' class=h{level}'}>{formatted(cell)}</td>"


def _payload(page: Page) -> dict[str, Any]:
    """Return everything that the script draws, as values of JSON."""
    charts = page.charts()
    total = sum(len(chart.curves) for chart in charts)
    limit = min(CURVE_POINTS, max(20, ALL_POINTS // max(total, 1)))
    passages = [block for section in page.sections for block in section.blocks if isinstance(block, Passages)]
    looks = [look(index) for index in range(216)]
    return {
        "runs": [{"name": visible(run.name), "note": visible(run.note), "clock": _clock(run)} for run in page.runs],
        "axes": dict(page.axes),
        "looks": [[shown.colour, [3 * dash for dash in shown.dashes], shown.marker] for shown in looks],
        "hatches": list(HATCHES),
        "shades": list(SHADES),
        "charts": {chart.name: _chart(chart, limit) for chart in charts},
        "passages": [_passages(block) for block in passages],
    }


def _clock(run: RunHead) -> dict[str, list[float | None]]:
    rows = np.unique(np.linspace(0, len(run.clock["step"]) - 1, CURVE_POINTS).astype(int))
    return {axis: _numbers(values[rows], 9) for axis, values in run.clock.items()}


def _chart(chart: Chart, limit: int) -> dict[str, Any]:
    curves = []
    for index, full in enumerate(chart.curves):
        curve = thinned(full, limit)
        drawn: dict[str, Any] = {
            "label": visible(curve.label),
            "run": curve.run,
            "look": index if curve.look is None else curve.look,
            "style": curve.style,
            "x": _numbers(curve.x, 7),
            "y": _numbers(curve.y, 5),
        }
        if len(curve.lowest):
            drawn |= {"lowest": _numbers(curve.lowest, 5), "highest": _numbers(curve.highest, 5)}
        curves.append(drawn)
    return {
        "title": visible(chart.title),
        "xlabel": visible(chart.xlabel),
        "ylabel": visible(chart.ylabel),
        "categories": [visible(category) for category in chart.categories],
        "run": chart.run,
        "curves": curves,
    }


def _passages(block: Passages) -> dict[str, Any]:
    """Return passages with their losses in hundredths of a nat, which keeps the page small."""
    return {
        "title": visible(block.title),
        "texts": [[visible(title), [visible(token) for token in tokens]] for title, tokens in block.texts],
        "losses": [
            {
                "run": of.run,
                "steps": list(of.steps),
                "loss": [[_hundredths(row) for row in loss_ST] for loss_ST in of.loss],
                "selected": [
                    [
                        "".join("01"[int(s)] for s in row) if has else None
                        for row, has in zip(m, of.has_mask_S, strict=True)
                    ]
                    for m in of.selected
                ],
                "reference": None if of.reference is None else [_hundredths(row) for row in of.reference],
            }
            for of in block.losses
        ],
    }


def _hundredths(loss_T: "NDArray[Any]") -> list[int | None]:
    return [round(100 * value) if math.isfinite(value) else None for value in loss_T.tolist()]


def _numbers(values: Any, digits: int) -> list[float | None]:
    """Return numbers with some significant digits; None for those that JSON cannot hold."""
    found: list[float | None] = []
    for value in np.asarray(values, dtype=np.float64).tolist():
        rounded = float(f"{value:.{digits}g}")
        found.append(None if not math.isfinite(value) else int(rounded) if rounded == int(rounded) else rounded)
    return found
