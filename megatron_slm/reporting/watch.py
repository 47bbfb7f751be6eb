"""A run as text for a terminal: curves, speed, progress and health, from its configuration and its records."""

import datetime
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.reporting.records import RecordFile, Records
from megatron_slm.reporting.tables import quantity

TICKS = "▁▂▃▄▅▆▇█"
LABEL, NUMBER = 22, 9
"""Widths of the columns beside a curve."""
MOST_ROWS = 8
"""Largest number of evaluation sets, and of sources, that have a curve."""
SILENT_RECORDS, SILENT_SECONDS = 5, 60
"""A run is silent if its last record is older than this many times the usual time between records, and than this many
seconds. Evaluations and checkpoints, which also take time, are not part of the usual time."""


class WatchedRun:
    """The directory of a run that may be starting, training, stopped or finished; it is only read.

    Args:
        path: the run directory.

    Attributes:
        is_finished: True if the last record that a frame showed is that of the last step.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metrics = path / "metrics.jsonl"
        self._records = RecordFile(self._metrics)
        self.is_finished = False

    def configuration(self) -> dict[str, Any] | None:
        """Return the run's configuration; None if the directory holds none, and is no run."""
        try:
            found = yaml.safe_load((self._path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("training"), dict) else None

    def frame(self, width: int, now: float) -> list[str]:
        """Return the lines that show the run.

        Args:
            width: largest length of a line.
            now: seconds since the epoch.
        """
        name = str(self._path)
        lines = [name if len(name) <= width else f"...{name[3 - width :]}", *self._content(width, now)]
        return [line[:width].rstrip() for line in lines]

    def _content(self, width: int, now: float) -> list[str]:
        config = self.configuration()
        if config is None:
            return ["config.yaml is gone"]
        try:
            records = self._records.read()
        except ValueError as error:
            return [f"metrics.jsonl holds a line that is not a record ({error})"]
        if not records:
            age = now - (self._path / "config.yaml").stat().st_mtime
            return [f"no record yet; the run was started {_duration(age)} ago"]
        total = _total_steps(config)
        self.is_finished = records[-1]["step"] >= total
        lines = [
            *_progress(config, records[-1], total),
            _checkpoint(self._path, config, records[-1]["step"], total),
            *_curves(records, width),
            _health(records),
        ]
        return lines if self.is_finished else [*lines, _age(records, now - self._metrics.stat().st_mtime)]


def _total_steps(config: dict[str, Any]) -> int:
    training, data = config["training"], config["data"]
    # A length in epochs has been counted in `data.order_tokens`, which includes candidates.
    candidates = config["selection"].get("candidates", 1) if config["objective"] == "slm" else 1
    tokens: float = training["train_tokens"] or data["order_tokens"] / candidates
    tokens_per_step: int = training["global_batch_size"] * data["seq_length"]
    return math.ceil(tokens / tokens_per_step)


def _progress(config: dict[str, Any], record: dict[str, Any], total: int) -> list[str]:
    step, seconds = record["step"], record["step_seconds"]
    tokens_per_step = config["training"]["global_batch_size"] * config["data"]["seq_length"]
    mfu = record.get("mfu")
    speed = [
        f"tokens {quantity(step * tokens_per_step)} of {quantity(total * tokens_per_step)}",
        f"{quantity(record['tokens_per_second'])} tokens/s",
        f"{seconds:.3g} s per step",
        *([f"MFU {mfu:.1%}"] if mfu else []),
    ]
    end = "finished" if step >= total else f"ETA {_duration((total - step) * seconds)}"
    return [f"{config['objective']}, step {step:,} of {total:,} ({step / total:.1%}), {end}", ", ".join(speed)]


def _checkpoint(path: Path, config: dict[str, Any], step: int, total: int) -> str:
    latest = path / "checkpoints" / "latest"
    saved = f"step {int(latest.read_text().strip().removeprefix('step_')):,}" if latest.exists() else "none yet"
    interval = config["training"]["save_interval"]
    due = min((step // interval + 1) * interval, total)
    return f"last checkpoint: {saved}" + (f", next at step {due:,}" if step < total else "")


def _curves(records: Records, width: int) -> list[str]:
    names = list(dict.fromkeys(name for record in records for name in record))
    groups = {
        "held-out loss": {name.split("/", 1)[1][:-5]: name for name in names if _is_held_out(name)},
        "training loss": {
            kind: f"loss/{kind}" for kind in ("all", "selected", "unselected") if f"loss/{kind}" in names
        },
        "selection": {"threshold": "selection/threshold"} if "selection/threshold" in names else {},
        "share selected": {
            name.removeprefix("selection/ratio/"): name for name in names if name.startswith("selection/ratio/")
        },
    }
    lines = [f"{'':{LABEL}}{'first':>{NUMBER}}{'last':>{width - LABEL - NUMBER}}"]
    for title, curves in groups.items():
        rows = [
            _curve(label, [r[name] for r in records if r.get(name) is not None], width)
            for label, name in list(curves.items())[:MOST_ROWS]
        ]
        hidden = len(curves) - len(rows)
        if curves:
            lines += [title, *rows, *([f"  and {hidden} more"] if hidden else [])]
    return lines


def _is_held_out(name: str) -> bool:
    return name.startswith("eval/") and name.endswith("/loss")


def _curve(label: str, values: list[float], width: int) -> str:
    """Return a line with a label, the first value, the curve over all records, and the last value."""
    label = f"  {label}"[: LABEL - 1]
    if not values:
        return f"{label:{LABEL}}{'n/a':>{NUMBER}}"
    curve = sparkline(values, width - LABEL - 2 * NUMBER - 2)
    return f"{label:{LABEL}}{values[0]:>{NUMBER}.3f} {curve:{width - LABEL - 2 * NUMBER - 2}} {values[-1]:>{NUMBER}.3f}"


def sparkline(values: list[float], width: int) -> str:
    """Return a curve in one line of `width` characters, each the mean of an equal part of the values.

    The scale leaves out the first tenth, in which a loss falls so far that its later changes would not be visible.
    """
    columns = max(width, 1)
    bounds = [index * len(values) // columns for index in range(columns + 1)]
    means = [statistics.fmean(values[start : max(end, start + 1)]) for start, end in pairwise(bounds)]
    lowest, highest = min(means), max(means[len(means) // 10 :])
    span = (highest - lowest) or 1.0
    return "".join(TICKS[min(int((mean - lowest) / span * len(TICKS)), len(TICKS) - 1)] for mean in means)


def _health(records: Records) -> str:
    last = records[-1]
    counts = {
        "loss spikes": last.get("loss/spikes", 0),
        "skipped updates": last.get("skipped_updates", 0),
        "failed saves": last.get("failed_saves", 0),
        "NaN scores": sum(record.get("selection/nan") or 0 for record in records),
    }
    found = [f"{name}: {count:,}" for name, count in counts.items() if count]
    return f"! {', '.join(found)}" if found else f"health: no {', no '.join(counts)}"


def _age(records: Records, age: float) -> str:
    """Return the age of the last record, with a warning if the run is silent."""
    steps = [record["step"] for record in records[-20:]]
    between = [later - earlier for earlier, later in pairwise(steps)] or [steps[0]]
    usual = statistics.median(between) * records[-1]["step_seconds"]
    if age > max(SILENT_RECORDS * usual, SILENT_SECONDS):
        return f"! no record for {_duration(age)}; usually every {_duration(usual)}"
    return f"last record {_duration(age)} ago; usually every {_duration(usual)}"


def _duration(seconds: float) -> str:
    """Return a duration as text: 0.6 s, 40 s, 12 min, 5:20 h, 3 d 5:20 h."""
    seconds = max(seconds, 0.0)
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    if seconds < 5970:
        return f"{seconds / 60:.0f} min"
    days, rest = divmod(datetime.timedelta(seconds=round(seconds)), datetime.timedelta(days=1))
    hours = ":".join(str(rest).split(":")[:2])
    return f"{days} d {hours} h" if days else f"{hours} h"
