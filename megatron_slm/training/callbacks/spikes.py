"""Finds the steps whose loss jumps, and names their samples so that they can be left out."""

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult

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
