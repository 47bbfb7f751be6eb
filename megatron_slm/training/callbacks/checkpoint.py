"""When to save."""

import logging

from megatron_slm.backend import TrainingEngine
from megatron_slm.errors import AgreedError
from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.checkpoints import CheckpointStore
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


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
