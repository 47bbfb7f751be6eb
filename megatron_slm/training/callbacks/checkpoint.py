"""When to save."""

from megatron_slm.backend import TrainingEngine
from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.checkpoints import CheckpointStore
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


class Checkpoints(Callback):
    """Saves every `save_interval` steps, after the last one, and when asked to.

    Last of the callbacks: its step's record is written.
    """

    def __init__(self, store: CheckpointStore, engine: TrainingEngine) -> None:
        self._store = store
        self._engine = engine

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.is_saved:
            self._store.save(self._engine, state.progress())
