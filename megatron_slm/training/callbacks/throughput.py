"""Speed: seconds a step, tokens a second over all ranks, model FLOPs utilisation."""

import logging
import time

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.flops import ModelFlops, step_flops
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


class Throughput(Callback):
    """Mean over the steps since the last record; evaluation and checkpoints are not counted.

    Args:
        models: FLOPs a token; forwards of the reference, and of the student to score alone, are in the hardware's
            share, not in the MFU.
        peak_flops: of all devices together, FLOP/s; None if not known, then the shares are null.
    """

    def __init__(self, models: ModelFlops, peak_flops: float | None) -> None:
        self._models = models
        self._peak_flops = peak_flops
        self._started = 0.0
        self._seconds = self._flops = 0.0
        self._steps = 0

    def on_train_start(self, state: RunState) -> None:
        if self._peak_flops is None:
            return
        logging.getLogger(__name__).info(
            "FLOPs a token: student %.3g, reference %.3g; peak of all devices: %.0f TFLOP/s (dense)",
            self._models.student.training,
            self._models.reference,
            self._peak_flops / 1e12,
        )

    def on_step_start(self, state: RunState) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += 1
        self._flops += step_flops(self._models, result.tokens)
        if state.record is None:
            return
        seconds = self._seconds / self._steps
        speed = state.plan.tokens_per_step / seconds
        peak = self._peak_flops
        state.record |= {
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "mfu": speed * self._models.student.training / peak if peak else None,
            "hardware_utilization": self._flops / self._seconds / peak if peak else None,
        }
        self._seconds, self._flops, self._steps = 0.0, 0.0, 0
