"""Held-out losses in the step's record."""

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.evaluate import Evaluator
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


class Evaluation(Callback):
    """Runs every evaluation set every `eval_interval` steps and after the last one."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.is_evaluated and state.record is not None:
            state.record |= self._evaluator.evaluate()
