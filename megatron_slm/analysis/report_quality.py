"""The parts of a report on selection and quality (Rho-1, Figures 6, 7 and 9)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_slm.analysis.comparison import Caveat, comparable_unit
from megatron_slm.analysis.quality import Fit, common_selection, fit_quality, ratio_sweeps, selected_losses
from megatron_slm.analysis.report_tokens import Observer
from megatron_slm.analysis.report_training import UNITS, Metrics
from megatron_slm.analysis.runs import RunFiles
from megatron_slm.analysis.tables import Table
from megatron_slm.reporting.blocks import Block, Figures, Listing
from megatron_slm.reporting.charts import Chart, Curve
from megatron_slm.reporting.tables import Cell

FIT_POINTS = 50
"""Points of a fitted curve."""


def quality_blocks(
    metrics: Sequence[Metrics], groups: Sequence[Sequence[Observer]], found: Sequence[Caveat]
) -> list[Block]:
    """Return Figures 6, 7 and 9 of the paper, each as far as the runs hold it."""
    return [*_fixed_selection(groups), *_fits(metrics, groups), *_sweeps([of.run for of in metrics], found)]


def _fixed_selection(groups: Sequence[Sequence[Observer]]) -> list[Block]:
    charts: list[Chart] = []
    for group in groups:
        common = common_selection([of.run for of in group])
        if common is None:
            continue
        selecting, step, mask_N = common
        splits = [(of, selected_losses(of.run, mask_N)) for of in group]
        for part, title in (("selected_S", "selected"), ("unselected_S", "not selected")):
            curves = [
                Curve(of.run.name, split.steps, getattr(split, part), run=of.number, look=of.number)
                for of, split in splits
            ]
            verb = "selects" if part == "selected_S" else "leaves out"
            caption = (
                f"Mean loss of the observed tokens that {selecting.name} {verb} at step {step:,}, under every run. In "
                "the paper, SLM is lower on selected tokens and higher on others."
            )
            name = f"fixed-{part[:-2].replace('_', '-')}-{group[0].number}"
            charts.append(Chart(name, f"Loss of tokens that are {title}", caption, "nats per token", curves))
    missing = "Figure 6 needs a run that records a selection among its observed tokens; none of these does."
    heading = "Losses on a fixed selection (Rho-1, Figure 6; its downstream loss is the held-out loss above)"
    return [Figures(heading, charts, "" if charts else missing)]


@dataclass(frozen=True)
class _Relation:
    """The points of Figure 7 for one run, one evaluation set and one half of the tokens, with their fit."""

    of: Metrics
    evaluation: str
    half: str
    loss_P: "np.ndarray[tuple[int], np.dtype[np.float64]]"
    quality_P: "np.ndarray[tuple[int], np.dtype[np.float64]]"
    fit: Fit | None


def _fits(metrics: Sequence[Metrics], groups: Sequence[Sequence[Observer]]) -> list[Block]:
    by_group = [_relations(metrics, group) for group in groups]
    fitted = [relation for relations in by_group for relation in relations if relation.fit is not None]
    charts = [chart for number, relations in enumerate(by_group) for chart in _fit_charts(number, relations)]
    missing = (
        "Figure 7 needs a selection and four or more steps at which both the observed tokens and a held-out set were "
        "evaluated; no run has them."
    )
    figures = Figures("Loss of the tokens against quality (Rho-1, Figure 7)", charts, "" if charts else missing)
    if not fitted:
        return [figures]
    rows: list[list[Cell]] = [
        [
            r.of.run.name,
            r.evaluation,
            r.half,
            len(r.loss_P),
            r.fit.a,
            r.fit.a_low,
            r.fit.a_high,
            r.fit.c,
            r.fit.r_squared,
        ]
        for r in fitted
        if r.fit is not None
    ]
    columns = ["run", "held-out set", "tokens", "points", "a", "a, low", "a, high", "c", "R²"]
    note = (
        "quality = log(a · loss + c), fitted by least squares on exp(quality); low and high are a 95 % interval from a "
        "bootstrap over the points. Quality is the negative held-out loss. Where the observed tokens come from the "
        "same set, some relation follows from that alone."
    )
    table = Table("fits", "Fits of quality", columns, rows)
    return [figures, Listing(table, note, row_runs=[relation.of.number for relation in fitted])]


def _relations(metrics: Sequence[Metrics], group: Sequence[Observer]) -> list[_Relation]:
    common = common_selection([of.run for of in group])
    if common is None:
        return []
    relations = []
    for observer in group:
        of, split = metrics[observer.number], selected_losses(observer.run, common[2])
        for name in observer.run.evaluation_sets:
            evaluated = dict(zip(*of.columns.get(f"eval/{name}/loss", ([], [])), strict=True))
            shared = [index for index, step in enumerate(split.steps) if step in evaluated]
            quality_P = np.array([-evaluated[split.steps[index]] for index in shared])
            for half, losses in (("selected", split.selected_S), ("not selected", split.unselected_S)):
                loss_P = np.array([losses[index] for index in shared])
                relations.append(_Relation(of, name, half, loss_P, quality_P, fit_quality(loss_P, quality_P)))
    return relations


def _fit_charts(group: int, relations: Sequence[_Relation]) -> list[Chart]:
    """Return a chart per evaluation set and half of the tokens, with the points and the fit of each run."""
    places = dict.fromkeys((relation.evaluation, relation.half) for relation in relations if relation.fit is not None)
    charts = []
    for number, (evaluation, half) in enumerate(places):
        curves: list[Curve] = []
        for relation in relations:
            fit, run = relation.fit, relation.of.number
            if fit is None or (relation.evaluation, relation.half) != (evaluation, half):
                continue
            x, y = relation.loss_P.tolist(), relation.quality_P.tolist()
            line_P = np.linspace(min(x), max(x), FIT_POINTS)
            curves.append(Curve(relation.of.run.name, x, y, run=run, look=run, style="points"))
            fitted = fit.curve(line_P).tolist()
            curves.append(
                Curve(f"fit of {relation.of.run.name}", line_P.tolist(), fitted, run=run, look=run, style="plain")
            )
        caption = "A point per step at which both were measured; the table below holds the fits and their intervals."
        title = f"Quality on {evaluation} by the loss of tokens that are {half}"
        xlabel = f"mean loss of tokens that are {half} (nats)"
        charts.append(Chart(f"fit-{group}-{number}", title, caption, "negative held-out loss (nats)", curves, xlabel))
    return charts


def _sweeps(runs: Sequence[RunFiles], found: Sequence[Caveat]) -> list[Block]:
    charts = []
    for number, group in enumerate(ratio_sweeps(runs)):
        for index, name in enumerate(group[0].evaluation_sets):
            unit = comparable_unit(found, name)
            if unit is None:
                continue
            ends = [(run.config.selection.ratio, run.curve(f"eval/{name}/{unit}", "tokens")) for run in group]
            points = [(ratio, curve[-1][1]) for ratio, curve in ends if curve]
            curve = Curve(name, [ratio for ratio, _ in points], [value for _, value in points], look=0)
            caption = "The last result of each run; the runs differ in selection.ratio alone. The paper's best is 0.6."
            title = f"Select ratio and {name}"
            charts.append(Chart(f"ratio-{number}-{index}", title, caption, UNITS[unit], [curve], "selection.ratio"))
    missing = "Figure 9 needs two or more selective runs that differ in selection.ratio alone; there are none here."
    return [Figures("Select ratio (Rho-1, Figure 9)", charts, "" if charts else missing)]
