"""The parts of a report that need only the records of runs: held-out and training losses, selection, cost, settings."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

import numpy as np

from megatron_slm.analysis.comparison import Caveat, comparable_unit, configuration_differences
from megatron_slm.analysis.runs import AXES, RunFiles
from megatron_slm.analysis.tables import Table
from megatron_slm.config import dump_config
from megatron_slm.reporting.blocks import Block, Figures, Fold, Listing, Paragraph, RunHead
from megatron_slm.reporting.charts import Chart, Curve
from megatron_slm.reporting.tables import Cell

UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
LOSSES = {
    "loss/all": ("Training loss of all tokens", "Mean loss of all valid tokens of a step."),
    "loss/selected": (
        "Training loss of the selected tokens",
        "A mean over different tokens at every step: it rises when the selection moves to harder tokens.",
    ),
    "loss/unselected": ("Training loss of the other tokens", "Mean loss of the valid tokens that are not selected."),
    "loss/reference": ("Loss of the reference on the same tokens", "Mean loss of the reference on all valid tokens."),
}
HEALTH = {
    "grad_norm": ("Gradient norm", "norm before clipping", "It should settle after the warm-up."),
    "lr": ("Learning rate", "learning rate", "Of each update."),
    "tokens_per_second": ("Speed", "tokens per second", "All ranks together, without evaluations and checkpoints."),
    "mfu": ("Model FLOPs utilization", "share of the peak", "FLOPs of the student, as a share of the devices' peak."),
}
QUANTILES = {"excess/q10": "10 % quantile", "excess/q50": "median", "excess/q90": "90 % quantile"}
SOURCE_LOSS = (
    "Training loss by source",
    "Mean loss of the valid tokens of each entry of data.train. A corrupted source stands out, or does not fall.",
    UNITS["loss"],
)
SOURCE_SHARE = (
    "Selected share by source",
    "Selected share of the valid tokens of each entry of data.train: what the reference prefers.",
    "selected share",
)


@dataclass(frozen=True)
class Metrics:
    """The metrics of a run as arrays: steps and values by key. Steps at which a metric is undefined are left out."""

    number: int
    run: RunFiles
    columns: "dict[str, tuple[list[int], list[float]]]"

    def curve(self, key: str, label: str | None = None, look: int | None = None) -> Curve:
        """Return a metric over the steps, with the label and look of the run unless others are given."""
        steps, values = self.columns.get(key, ([], []))
        label, look = (self.run.name if label is None else label), (self.number if look is None else look)
        return Curve(label, steps, values, run=self.number, look=look)


def metrics_of(runs: Sequence[RunFiles]) -> list[Metrics]:
    """Return the metrics of each run."""
    return [Metrics(number, run, _columns(run)) for number, run in enumerate(runs)]


def _columns(run: RunFiles) -> dict[str, tuple[list[int], list[float]]]:
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for record in run.records:
        for key, value in record.items():
            if isinstance(value, int | float):
                steps, values = columns.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(value)
    return columns


def run_head(run: RunFiles) -> RunHead:
    """Return the name, the kind and the axes of a run."""
    selection = run.config.selection
    kind = f"slm, {selection.score}, ratio {selection.ratio:g}" if run.config.objective == "slm" else "clm"
    clock = {"step": np.array([record["step"] for record in run.records], dtype=np.float64)}
    for name, (key, _) in AXES.items():
        values = [record.get(key) for record in run.records]
        clock[name] = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    # Every count is 0 before the first step.
    clock = {name: np.concatenate([[0.0], values_R]) for name, values_R in clock.items()}
    return RunHead(run.name, kind, clock)


def slug(*words: object) -> str:
    """Return a name for files and anchors; characters of names that are not safe there become dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")


def held_out_blocks(metrics: Sequence[Metrics], found: Sequence[Caveat]) -> list[Block]:
    """Return a chart per evaluation set, in the unit in which the runs may be compared, and a table of the ends."""
    sets = list(dict.fromkeys(name for of in metrics for name in of.run.evaluation_sets))
    charts: list[Chart] = []
    units = {name: comparable_unit(found, name) for name in sets}
    for number, name in enumerate(sets):
        unit = units[name]
        if unit is None:
            charts += [_own_held_out(of, name, number) for of in metrics if name in of.run.evaluation_sets]
            continue
        curves = [of.curve(f"eval/{name}/{unit}") for of in metrics if name in of.run.evaluation_sets]
        words = "Held-out loss" if unit == "loss" else "Held-out bits per byte"
        why = "" if unit == "loss" else " The tokenizers differ, so losses per token are not comparable."
        caption = f"Every evaluated step of each run; lower is better.{why}"
        charts.append(Chart(f"held-out-{number}-{slug(name)}", f"{words}: {name}", caption, UNITS[unit], curves))
    note = "" if charts else "No run has evaluated a held-out set yet."
    blocks: list[Block] = [Figures("Held-out losses", charts, note)]
    compared = [name for name in sets if units[name]]
    return [*blocks, *([_ends(metrics, compared, units)] if compared else [])]


def _own_held_out(of: Metrics, name: str, number: int) -> Chart:
    caption = f"{of.run.name} alone: the other runs evaluate another corpus under this name."
    title = f"Held-out loss: {name}, {of.run.name}"
    curves = [of.curve(f"eval/{name}/loss")]
    return Chart(f"held-out-{number}-{of.number}", title, caption, UNITS["loss"], curves, run=of.number)


def _ends(metrics: Sequence[Metrics], sets: Sequence[str], units: dict[str, str | None]) -> Listing:
    rows: list[list[Cell]] = []
    for of in metrics:
        row: list[Cell] = [of.run.name]
        for name in sets:
            steps, values = of.columns.get(f"eval/{name}/{units[name]}", ([], []))
            lowest = int(np.argmin(values)) if values else 0
            row += [values[-1], values[lowest], steps[lowest]] if values else [float("nan")] * 3
        rows.append(row)
    titles = [(f"{name}, end ({UNITS[units[name] or 'loss']})", "lowest", "at step") for name in sets]
    table = Table("held_out", "Held-out results", ["run", *(title for triple in titles for title in triple)], rows)
    return Listing(table, row_runs=[of.number for of in metrics])


def training_blocks(metrics: Sequence[Metrics], found: Sequence[Caveat]) -> list[Block]:
    """Return the charts of training losses, selection, optimizer and speed."""
    # Without a set, a caveat forbids every loss per token.
    is_split = any(caveat.forbids == "loss" and not caveat.sets for caveat in found)
    losses: list[Chart] = []
    if is_split:
        for of in metrics:
            curves = [of.curve(key, key.split("/")[1], look) for look, key in enumerate(LOSSES) if key in of.columns]
            caption = "One run alone, because the runs have different tokenizers."
            title = f"Training losses: {of.run.name}"
            losses.append(Chart(f"loss-of-{of.number}", title, caption, UNITS["loss"], curves, run=of.number))
    else:
        losses = [_together(metrics, key, *words, UNITS["loss"]) for key, words in LOSSES.items() if _any(metrics, key)]
    health = [_together(metrics, key, t, c, u) for key, (t, u, c) in HEALTH.items() if _any(metrics, key)]
    losses += [chart for of in metrics for chart in _by_source(of, "loss/all", *SOURCE_LOSS)]
    selection = [*_thresholds(metrics, is_split), *(chart for of in metrics for chart in _selection(of))]
    none = "No run of these selects tokens, so there is no threshold and no share by source."
    return [
        Figures("Training losses", losses),
        Figures("Selection during training", selection, "" if selection else none),
        Figures("Optimizer and speed", health),
    ]


def _any(metrics: Sequence[Metrics], key: str) -> bool:
    return any(key in of.columns for of in metrics)


def _together(metrics: Sequence[Metrics], key: str, title: str, caption: str, unit: str) -> Chart:
    return Chart(slug(key), title, caption, unit, [of.curve(key) for of in metrics if key in of.columns])


def _thresholds(metrics: Sequence[Metrics], is_split: bool) -> list[Chart]:
    """Return a chart of thresholds per score, because each score has its own unit."""
    key = "selection/threshold"
    having = [of for of in metrics if key in of.columns]
    groups: dict[str, list[Metrics]] = {}
    for of in having:
        score = of.run.config.selection.score
        groups.setdefault(f"{score}, {of.run.name}" if is_split else score, []).append(of)
    caption = "The lowest selected score, as a mean over the pools of a step. It falls as the student learns."
    return [
        Chart(
            slug("threshold", number), f"Threshold of the score {name}", caption, "score", [o.curve(key) for o in group]
        )
        for number, (name, group) in enumerate(groups.items())
    ]


def _selection(of: Metrics) -> list[Chart]:
    """Return the share by source and the quantiles of the excess loss of one run."""
    name, number = of.run.name, of.number
    charts = _by_source(of, "selection/ratio", *SOURCE_SHARE)
    quantiles = [
        of.curve(key, title, index) for index, (key, title) in enumerate(QUANTILES.items()) if key in of.columns
    ]
    if quantiles:
        caption = "Student loss minus reference loss of all valid tokens of a step."
        title = f"Quantiles of the excess loss: {name}"
        charts.append(Chart(f"excess-{number}", title, caption, "nats", quantiles, run=number))
    return charts


def _by_source(of: Metrics, metric: str, title: str, caption: str, unit: str) -> list[Chart]:
    """Return a chart of `metric` and `metric/SOURCE` of one run; none if it has one source."""
    sources = [key for key in of.columns if key.startswith(f"{metric}/")]
    if len(sources) < 2:
        return []
    labels = _short([key.removeprefix(f"{metric}/") for key in sources])
    curves = [of.curve(key, label, look) for look, (key, label) in enumerate(zip(sources, labels, strict=True), 1)]
    curves = [of.curve(metric, "all sources", 0), *curves]
    return [Chart(slug(title, of.number), f"{title}: {of.run.name}", caption, unit, curves, run=of.number)]


def _short(sources: Sequence[str]) -> list[str]:
    """Return the last parts of paths, or the whole paths if these are not unique."""
    ends = [source.rstrip("/").rpartition("/")[2] for source in sources]
    return ends if len(set(ends)) == len(ends) else list(sources)


def cost_blocks(metrics: Sequence[Metrics]) -> list[Block]:
    """Return what each run cost, and what interrupted it."""
    columns = [
        *("run", "steps", "trained tokens", "tokens in the loss", "FLOPs", "seconds of training", "tokens per second"),
        *(
            "MFU",
            "starts",
            "effective time",
            "loss spikes",
            "skipped updates",
            "NaN scores",
            "failed saves",
            "finished",
        ),
    ]
    table = Table("cost", "Cost and health", columns, [_cost(of) for of in metrics])
    note = (
        "Seconds are those of training steps. The effective time is their share of the time from the first start to "
        "the last change of metrics.jsonl; a copy that did not keep the time of this file shows too low a share."
    )
    return [Listing(table, note, row_runs=[of.number for of in metrics])]


def _cost(of: Metrics) -> list[Cell]:
    run, last = of.run, of.run.last
    flops = last.get("flops")
    utilization = of.columns.get("mfu", ([], []))[1]
    effective = effective_time(run)
    return [
        run.name,
        last["step"],
        last["trained_tokens"],
        last["consumed_selected_tokens"],
        float("nan") if flops is None else float(flops),
        float(last["seconds"]),
        last["trained_tokens"] / last["seconds"] if last["seconds"] else float("nan"),
        fmean(utilization) if utilization else float("nan"),
        len(run.environment.get("starts", [])),
        float("nan") if effective is None else effective,
        len(run.spikes),
        int(last.get("skipped_updates") or 0),
        int(sum(of.columns.get("selection/nan", ([], []))[1])),
        int(last.get("failed_saves") or 0),
        "yes" if run.is_finished else "no",
    ]


def effective_time(run: RunFiles) -> float | None:
    """Return the share of the run's time that its steps took; None if it cannot be derived.

    The records hold no time of day, so the end is the last change of `metrics.jsonl`. A copy may have another one.
    """
    starts = [start["time"] for start in run.environment.get("starts", []) if "time" in start]
    metrics = run.path / "metrics.jsonl"
    if not starts or not metrics.exists() or not run.last["seconds"]:
        return None
    elapsed = metrics.stat().st_mtime - datetime.fromisoformat(starts[0]).timestamp()
    share = float(run.last["seconds"]) / elapsed if elapsed > 0 else None
    return share if share is not None and share <= 1 else None


def configuration_blocks(runs: Sequence[RunFiles]) -> list[Block]:
    """Return the settings that differ between the runs, and the whole configuration of each."""
    blocks: list[Block] = []
    if len(runs) > 1:
        different = configuration_differences(runs)
        if different:
            rows: list[list[Cell]] = [
                [run.name, *(_setting(values[number]) for _, values in different)] for number, run in enumerate(runs)
            ]
            table = Table("differences", "Settings that differ", ["run", *(name for name, _ in different)], rows)
            blocks.append(Listing(table, row_runs=range(len(runs))))
        else:
            blocks.append(Paragraph("All runs have the same settings, apart from their run directories."))
    folds = (Fold(f"config.yaml of {run.name}", dump_config(run.config), number) for number, run in enumerate(runs))
    return [*blocks, *folds]


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
