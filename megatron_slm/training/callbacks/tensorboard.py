"""The same records as curves."""

from pathlib import Path
from typing import Any

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult

AXES = ("step", "consumed_samples")


class TensorBoard(Callback):
    """Writes scalars on rank 0. The horizontal axis is the step.

    Args:
        folder: for the event files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_train_start(self, state: RunState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote after its checkpoint disappears from the curves.
        self._writer = SummaryWriter(str(self._folder), purge_step=state.step + 1)

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        for name, value in (state.record or {}).items():
            if name not in AXES and value is not None:
                self._writer.add_scalar(name, value, state.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
