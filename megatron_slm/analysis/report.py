"""A report on one run or several: one page, and its figures and tables as files.

All numbers come from the whole records and from all observed tokens. Only what is drawn is sampled, by the rules that
the page states.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_slm.analysis.comparison import Caveat, caveats, comparable_unit
from megatron_slm.analysis.report_quality import quality_blocks
from megatron_slm.analysis.report_tokens import (
    PASSAGE_LOSSES,
    PASSAGE_STEPS,
    PASSAGE_TOKENS,
    PASSAGES,
    dynamics_blocks,
    observers,
    selection_blocks,
)
from megatron_slm.analysis.report_training import (
    configuration_blocks,
    cost_blocks,
    held_out_blocks,
    metrics_of,
    run_head,
    training_blocks,
)
from megatron_slm.analysis.runs import AXES, RunFiles, read_runs
from megatron_slm.analysis.tables import Table, write_csv
from megatron_slm.analysis.verdict import comparisons, verdict
from megatron_slm.errors import UserError
from megatron_slm.io.files import write_durably
from megatron_slm.reporting.blocks import Block, Findings, Page, Paragraph, Passages, RunHead, Section, Warnings
from megatron_slm.reporting.charts import Chart, draw_chart
from megatron_slm.reporting.page import ALL_POINTS, CURVE_POINTS, MARKER, page_html
from megatron_slm.reporting.text_figure import ShadedToken, draw_text

TEXT_STEPS = 4
"""Steps of a picture of text."""
HEAD = 4096
"""Bytes of a file in which the marker of a report is looked for."""


@dataclass(frozen=True)
class Output:
    """The files of a report: the page, and a folder for figures and tables; None for no such folder."""

    page: Path
    figures: Path | None = None

    def check(self) -> None:
        """Refuse to overwrite anything but a report.

        Raises:
            UserError: another file or a folder has the name of the page, or the folder for it does not exist.
        """
        if self.page.is_dir():
            raise UserError("--output", self.page, "it is a folder", "Name a file, such as report.html")
        if not self.page.parent.is_dir():
            raise UserError("--output", self.page, "its folder does not exist", "Make the folder, or use another one")
        if self.page.exists():
            with self.page.open("rb") as file:
                is_report = MARKER.encode() in file.read(HEAD)
            if not is_report:
                raise UserError(
                    "--output", self.page, "it exists and is no report", "Use another name, or move the file"
                )
        if self.figures is not None and self.figures.exists() and not self.figures.is_dir():
            raise UserError("--figures", self.figures, "it is a file", "Name a folder")


def write_report(paths: Sequence[str], output: Output) -> None:
    """Write the report on some run directories.

    Raises:
        UserError: a directory is no run, has no record, or cannot be read; the output cannot be overwritten.
    """
    output.check()
    for path in paths:
        if not Path(path).is_dir():
            raise UserError("RUN_DIR", path, "the directory does not exist", "Check the path")
    page = build_page(_read(paths))
    write_durably(output.page, page_html(page))
    if output.figures is not None:
        write_figures(page, output.figures)


def _read(paths: Sequence[str]) -> list[RunFiles]:
    try:
        return read_runs(list(paths))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "RUN_DIR", ", ".join(paths), f"its records cannot be read ({error})", "Restore its files"
        ) from error


def build_page(runs: Sequence[RunFiles]) -> Page:
    """Return the report on some runs; the first is the baseline of comparisons."""
    found = caveats(runs)
    metrics = metrics_of(runs)
    groups = observers(runs)
    title = f"Report on {runs[0].name}" if len(runs) == 1 else f"Report on {len(runs)} runs"
    subtitle = ", ".join(run.name for run in runs[:8]) + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")
    sections = [
        Section("verdict", "Verdict", _verdict_blocks(runs, found)),
        Section("training", "Training", [*held_out_blocks(metrics, found), *training_blocks(metrics, found)]),
        Section("dynamics", "Token dynamics", dynamics_blocks(groups)),
        Section("selected", "What was selected", selection_blocks(groups)),
        Section("quality", "Selection and quality", quality_blocks(metrics, groups, found)),
        Section("cost", "Cost and health", cost_blocks(metrics)),
        Section("configuration", "Configuration", configuration_blocks(runs)),
        Section("about", "How this page was made", [Paragraph(text) for text in _about(runs)]),
    ]
    axes = {"step": "step", **{name: words for name, (_, words) in AXES.items()}}
    return Page(title, subtitle, [run_head(run) for run in runs], axes, sections)


def _verdict_blocks(runs: Sequence[RunFiles], found: Sequence[Caveat]) -> list[Block]:
    blocks: list[Block] = []
    if found:
        blocks.append(Warnings("Before you compare these runs", [caveat.sentence for caveat in found]))
    if len(runs) > 1:
        sets = dict.fromkeys(name for run in runs for name in run.evaluation_sets)
        compared = comparisons(runs, {name: comparable_unit(found, name) for name in sets})
        items = [(item.level, item.sentence) for item in compared]
        blocks.append(Findings(f"Compared with {runs[0].name}", items or [("info", "No set may be compared.")]))
    for number, run in enumerate(runs):
        items = [(item.level, item.sentence) for item in verdict(run)]
        blocks.append(Findings(run.name, items or [("info", "Nothing notable was found.")], number))
    return blocks


def _about(runs: Sequence[RunFiles]) -> list[str]:
    counts = [f"{run.name}: {len(run.records):,} records" for run in runs]
    observed = [
        f"{len(run.observed):,} observed tokens at {len(run.observed.steps)} steps" if run.observed else ""
        for run in runs
    ]
    listed = "; ".join(", ".join(filter(None, pair)) for pair in zip(counts, observed, strict=True))
    return [
        f"Read: {listed}.",
        "All statistics use all records and all observed tokens. Only what is drawn is sampled.",
        f"Curves show at most {CURVE_POINTS} points each, and at most {ALL_POINTS:,} in all charts: the points are "
        "divided into buckets of equal count, and the lowest and the highest of each are drawn. The horizontal axes "
        f"other than the step are interpolated between at most {CURVE_POINTS} records of each run.",
        f"Text shows at most {PASSAGES} passages of {PASSAGE_TOKENS} tokens, spread evenly over the observed corpora, "
        f"at most {PASSAGE_STEPS} of the recorded steps, evenly chosen with the first and the last, and at most "
        f"{PASSAGE_LOSSES:,} losses in all.",
        "The figures follow Lin et al., Rho-1: Not All Tokens Are What You Need (arXiv 2404.07965).",
    ]


def write_figures(page: Page, folder: Path) -> None:
    """Write every chart as PNG and SVG and, in full, as CSV; text as PNG and SVG; and every table as CSV.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for chart in page.charts():
        axis = "tokens"
        on_axis = chart if chart.xlabel or chart.categories else _along(chart, page.runs, axis)
        if any(len(curve.x) for curve in on_axis.curves):
            draw_chart(on_axis, page.axes[axis], folder / f"{chart.name}.png", folder / f"{chart.name}.svg")
        _write_chart(chart, page, folder)
    blocks = (block for section in page.sections for block in section.blocks if isinstance(block, Passages))
    for group, block in enumerate(blocks):
        _draw_passages(block, page.runs, folder / f"text-{group}")
    tables = [Table(t.name, t.title, list(t.columns), [list(row) for row in t.rows]) for t in page.tables()]
    write_csv(tables, folder)


def _draw_passages(block: Passages, runs: Sequence[RunHead], path: Path) -> None:
    """Draw the first and the middle passage for each run with selections, at evenly chosen steps."""
    for of in block.losses:
        if of.reference is None or not any(of.has_mask_S):
            continue
        rows = np.unique(np.linspace(0, len(of.steps) - 1, TEXT_STEPS).astype(int))
        for number in sorted({0, len(block.texts) // 2}):
            title, tokens = block.texts[number]
            excess_ST = of.loss[number] - of.reference[number]
            panes = [
                (
                    f"{runs[of.run].name}, step {of.steps[row]:,}: {title}",
                    list(map(ShadedToken, tokens, excess_ST[row].tolist(), of.selected[number][row].tolist())),
                )
                for row in rows
            ]
            draw_text(panes, *(Path(f"{path}-{of.run}-{number}.{suffix}") for suffix in ("png", "svg")))


def _along(chart: Chart, runs: Sequence[RunHead], axis: str) -> Chart:
    """Return a chart over an axis other than steps."""
    curves = [
        curve._replace(x=_clock(runs[curve.run], axis, curve.x)) if curve.run is not None else curve
        for curve in chart.curves
    ]
    return Chart(
        chart.name, chart.title, chart.caption, chart.ylabel, curves, chart.xlabel, chart.categories, chart.run
    )


def _clock(run: RunHead, axis: str, steps: Sequence[float]) -> list[float]:
    place_P = np.interp(np.asarray(steps, dtype=np.float64), run.clock["step"], run.clock[axis])
    return [float(place) for place in place_P]


def _write_chart(chart: Chart, page: Page, folder: Path) -> None:
    """Write the points of a chart: a row per point, with all horizontal axes if `x` holds steps."""
    over_steps = not chart.xlabel and not chart.categories
    axes = list(page.axes)[1:] if over_steps else []
    first = "category" if chart.categories else chart.xlabel or "step"
    with (folder / f"{chart.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["curve", first, *(page.axes[axis] for axis in axes), chart.ylabel])
        for curve in chart.curves:
            x = [chart.categories[int(place)] for place in curve.x] if chart.categories else curve.x
            along = [_clock(page.runs[curve.run], axis, curve.x) for axis in axes] if curve.run is not None else []
            writer.writerows([curve.label, *point] for point in zip(x, *along, curve.y, strict=True))
