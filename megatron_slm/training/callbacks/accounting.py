"""What the run has cost so far: tokens scored, tokens trained on, FLOPs."""

import math

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.flops import ModelFlops, step_flops, student_tokens
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult

NAME = "accounting"
"""Of what is carried through checkpoints."""


class Accounting(Callback):
    """Adds up every step, over all ranks and all models, on every rank alike.

    Args:
        models: FLOPs a token of each.
    """

    def __init__(self, models: ModelFlops) -> None:
        self._models = models

    def on_train_start(self, state: RunState) -> None:
        # What a run from before this was counted has cost, nobody knows.
        before = math.nan if state.step else 0
        state.carried.setdefault(NAME, {"scored_tokens": before, "flops": before})

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        spent = state.carried[NAME]
        spent["scored_tokens"] += student_tokens(result.tokens, self._models.backward).scored
        spent["flops"] += step_flops(self._models, result.tokens)
        if state.record is not None:
            state.record |= {"trained_tokens": state.trained_tokens, **spent}
