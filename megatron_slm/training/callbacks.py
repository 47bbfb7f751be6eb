"""When to save."""

import datetime
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_slm.backend import TrainingEngine
from megatron_slm.dist import World
from megatron_slm.errors import AgreedError
from megatron_slm.training.checkpoints import CheckpointStore
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback


class Checkpoints(Callback):
    """Saves every `save_interval` steps, after the last one, and when asked to.

    Last of the callbacks: its step's record is written. A checkpoint that cannot be written ends the run only
    where none would follow.
    """

    def __init__(self, store: CheckpointStore, engine: TrainingEngine) -> None:
        self._store = store
        self._engine = engine

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if not state.is_saved:
            return
        try:
            self._store.save(self._engine, state.progress())
        except AgreedError as error:
            if state.is_over:
                raise
            state.failed_saves += 1
            logging.getLogger(__name__).warning("%s Training goes on; the next checkpoint is tried as planned.", error)


class Console(Callback):
    """Logs the record on rank 0, with the time that the remaining steps will take."""

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.record is None:
            return
        logging.getLogger(__name__).info(" | ".join(describe(state, state.record)))

    def on_train_end(self, state: RunState) -> None:
        log = logging.getLogger(__name__).info
        if state.is_last:
            log("finished: %d steps, %s tokens%s", state.step, f"{state.trained_tokens:,}", _beside(state))
        else:
            log(
                "stopped by a signal: step %d of %d is saved; the same command goes on from there",
                state.step,
                state.plan.total_steps,
            )


def describe(state: RunState, record: dict[str, float | int | None]) -> list[str]:
    """The parts of the line. The selected loss never stands alone: it falls when the selection changes."""
    parts = [f"step {state.step}/{state.plan.total_steps}", f"tokens {quantity(state.trained_tokens)}{_beside(state)}"]
    parts.append("loss " + " ".join(_named(record, "loss/", ("all", "selected", "unselected", "reference"))))
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
    """Where candidates were read, how many tokens."""
    return f" of {quantity(state.consumed_tokens)} read" if state.plan.candidates > 1 else ""


def quantity(value: float | int | None) -> str:
    """1234567 as 1.23M."""
    if value is None:
        return "n/a"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _named(record: dict[str, float | int | None], prefix: str, names: tuple[str, ...]) -> list[str]:
    return [f"{name} {record[prefix + name]:.4f}" for name in names if record.get(prefix + name) is not None]


ROWS = 15


class Profiler(Callback):
    """Writes a Chrome trace a rank over some steps, and logs the operators that took longest.

    First of the callbacks, so that a trace holds the training of its steps and the callbacks between them only.

    Args:
        folder: for the traces.
        first, last: steps, both included.
        world: this process among all.
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

    def _write(self, taken: profile, step: int) -> None:
        log = logging.getLogger(__name__)
        path = self._folder / f"steps-{self._first}-{step}-rank{self._world.rank:04d}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            taken.export_chrome_trace(str(path))
        except OSError as error:
            log.warning("the profile %s cannot be written: %s", path, error)
        if self._world.is_main:
            order = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
            table = taken.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=40)
            log.info("profile of steps %d to %d, also in %s\n%s", self._first, step, self._folder, table)


WARM_UP = 50
"""Steps from which no spike is told: the average knows too little."""
WINDOW = 100
"""Steps that the averages look back on: each new one weighs a hundredth."""


@dataclass
class LossAverage:
    """Exponentially weighted mean and variance of the loss of the steps so far, and the spikes among them."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    spikes: int = 0

    def deviation(self, loss: float) -> float:
        """How many standard deviations a loss lies above the mean."""
        return (loss - self.mean) / max(math.sqrt(self.variance), 1e-12)

    def add(self, loss: float) -> None:
        """Count one step: plainly at first, with exponential weights once there is a window of them."""
        self.steps += 1
        weight = max(1 / self.steps, 1 / WINDOW)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)


class Spikes(Callback):
    """Looks at every step, on every rank alike; warns, counts, and writes `spikes.jsonl` on rank 0.

    A spike moves the averages no more than a loss at the limit would: the next one is still
    seen, and a level that stays higher is accepted in time.

    Args:
        path: of the records; None on the ranks that write nothing.
        sigma: standard deviations above the mean from which a loss is a spike.
    """

    def __init__(self, path: Path | None, sigma: float) -> None:
        self._path = path
        self._sigma = sigma
        self._average = LossAverage()

    def on_train_start(self, state: RunState) -> None:
        self._average = LossAverage(**state.carried.get("spikes", {}))

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        average, loss = self._average, result.loss
        if math.isfinite(loss):
            if average.steps >= WARM_UP and average.deviation(loss) > self._sigma:
                average.spikes += 1
                self._tell(state, loss)
                loss = average.mean + self._sigma * math.sqrt(average.variance)
            average.add(loss)
        state.carried["spikes"] = asdict(average)
        if state.record is not None:
            state.record["loss/spikes"] = average.spikes

    def _tell(self, state: RunState, loss: float) -> None:
        expected, sigma = self._average.mean, self._average.deviation(loss)
        samples = [state.first_sample, state.next_sample]
        logging.getLogger(__name__).warning(
            "loss spike at step %d: %.4f, expected %.4f, %.1f standard deviations above; to leave its samples out, "
            "roll back and set data.skip_samples=[%s]",
            state.step,
            loss,
            expected,
            sigma,
            samples,
        )
        if self._path is not None:
            spike = {"step": state.step, "loss": loss, "expected": expected, "sigma": sigma, "samples": samples}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(spike) + "\n")
