"""The callbacks that read the record of a step, and the profiler."""

import datetime
import json
import logging
from pathlib import Path
from typing import IO

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_slm.dist import World
from megatron_slm.reporting.tables import quantity
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback


class JsonLines(Callback):
    """Appends records to a file, on rank 0. Each record is flushed before the next step begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def on_train_start(self, state: RunState) -> None:
        self._file = self._path.open("a", encoding="utf-8")

    def on_record(self, state: RunState, record: dict[str, float | int | None]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(finite(record)) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def finite(record: dict[str, float | int | None]) -> dict[str, float | int | None]:
    """Return a record with null for NaN and infinity, which JSON does not have."""
    return {key: value if value is None or abs(value) < float("inf") else None for key, value in record.items()}


class Console(Callback):
    """Logs the record on rank 0, with the time that the remaining steps will take."""

    def on_record(self, state: RunState, record: dict[str, float | int | None]) -> None:
        logging.getLogger(__name__).info(" | ".join(describe(state, record)))

    def on_train_end(self, state: RunState) -> None:
        log = logging.getLogger(__name__).info
        if state.is_last:
            log("finished: %d steps, %s tokens%s", state.step, f"{state.trained_tokens:,}", _beside(state))
        else:
            log(
                "stopped by a signal: step %d of %d is saved; the same command resumes from it",
                state.step,
                state.plan.total_steps,
            )


def describe(state: RunState, record: dict[str, float | int | None]) -> list[str]:
    """Return the parts of the console's line.

    The selected loss is never shown alone, because it also falls if only the selection changes.
    """
    parts = [f"step {state.step}/{state.plan.total_steps}", f"tokens {quantity(state.trained_tokens)}{_beside(state)}"]
    losses = {name: record.get(f"loss/{name}") for name in ("all", "selected", "unselected", "reference")}
    parts.append(" ".join(["loss", *(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)]))
    if record.get("selection/threshold") is not None:
        parts.append(f"cut {record['selection/threshold']:.3f}")
    parts.append(f"lr {record['lr']:.2e} grad {record['grad_norm']:.2f}")
    mfu = record.get("mfu")
    parts.append(f"{quantity(record['tokens_per_second'])} tokens/s" + (f" MFU {mfu:.1%}" if mfu else ""))
    remaining = (state.plan.total_steps - state.step) * (record["step_seconds"] or 0.0)
    parts.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
    if state.skipped_updates:
        parts.append(f"skipped {state.skipped_updates}")
    parts += [f"{key} {value:.4f}" for key, value in record.items() if key.startswith("eval/") and value is not None]
    return parts


def _beside(state: RunState) -> str:
    """Return the number of tokens read, if the run reads more tokens than it trains on."""
    return f" of {quantity(state.consumed_tokens)} read" if state.plan.candidates > 1 else ""


ROWS = 15


class Profiler(Callback):
    """Writes a Chrome trace per rank over some steps, and logs the operators that took longest.

    The trace lacks callbacks that run before this one at the first step, and after it at the last step.

    Args:
        folder: folder for the traces.
        first, last: first and last step to profile.
        world: the place of this process among all ranks.
    """

    def __init__(self, folder: Path, first: int, last: int, world: World) -> None:
        self._folder = folder
        self._first, self._last = first, last
        self._world = world
        self._profile: profile | None = None

    def on_step_start(self, state: RunState) -> None:
        if self._profile is None and self._first <= state.step + 1 <= self._last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if self._profile is not None and (state.step == self._last or state.is_over):
            self._profile.stop()
            self._write(self._profile, state.step)
            self._profile = None

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, finished: profile, step: int) -> None:
        log = logging.getLogger(__name__)
        path = self._folder / f"steps-{self._first}-{step}-rank{self._world.rank:04d}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            finished.export_chrome_trace(str(path))
        except OSError as error:
            log.warning("the profile %s cannot be written: %s", path, error)
        if self._world.is_main:
            order = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
            table = finished.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=40)
            log.info("profile of steps %d to %d, also in %s\n%s", self._first, step, self._folder, table)
