"""Speed: seconds a step, tokens a second over all ranks, model FLOPs utilisation."""

import logging
import time

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


class Throughput(Callback):
    """Mean over the steps since the last record; evaluation and checkpoints are not counted.

    Args:
        student_flops: FLOPs a token of training the student.
        reference_flops: FLOPs a token of the reference; in the hardware's share, not in the MFU.
        peak_flops: of all devices together, FLOP/s; None if not known, then the shares are null.
    """

    def __init__(self, student_flops: float, reference_flops: float, peak_flops: float | None) -> None:
        self._student_flops = student_flops
        self._reference_flops = reference_flops
        self._peak_flops = peak_flops
        self._started = 0.0
        self._seconds = 0.0
        self._steps = self._reference_steps = 0

    def on_train_start(self, state: RunState) -> None:
        if self._peak_flops is None:
            return
        logging.getLogger(__name__).info(
            "FLOPs a token: student %.3g, reference %.3g; peak of all devices: %.0f TFLOP/s (dense)",
            self._student_flops,
            self._reference_flops,
            self._peak_flops / 1e12,
        )

    def on_step_start(self, state: RunState) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += 1
        self._reference_steps += result.statistics.has_reference
        if state.record is None:
            return
        seconds = self._seconds / self._steps
        speed = state.plan.tokens_per_step / seconds
        peak = self._peak_flops
        flops = self._student_flops + self._reference_flops * self._reference_steps / self._steps
        state.record |= {
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "mfu": speed * self._student_flops / peak if peak else None,
            "hardware_utilization": speed * flops / peak if peak else None,
        }
        self._seconds, self._steps, self._reference_steps = 0.0, 0, 0
