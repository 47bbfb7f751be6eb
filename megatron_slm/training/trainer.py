"""The loop. It knows the order of things and no feature: those are callbacks."""

from collections.abc import Callable, Sequence

from megatron_slm.data.loader import StepLoader
from megatron_slm.errors import AgreedError
from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.objective import Objective
from megatron_slm.training.requests import Requests
from megatron_slm.training.state import RunState
from megatron_slm.training.step import TrainingStep


class Trainer:
    """Runs step after step and tells the callbacks.

    Args:
        loader: the micro-batches of each step.
        step: the optimizer step.
        learning_rate: of the step that ends at so many tokens that were trained on.
        objective: of the step that begins after so many.
        callbacks: told of each moment, in this order.
        max_skipped_updates: stop after so many in a row.
        requests: what is asked of this rank while the run is under way.
    """

    def __init__(
        self,
        loader: StepLoader,
        step: TrainingStep,
        learning_rate: Callable[[int], float],
        objective: Callable[[int], Objective],
        callbacks: Sequence[Callback],
        max_skipped_updates: int,
        requests: Requests,
    ) -> None:
        self._loader = loader
        self._step = step
        self._learning_rate = learning_rate
        self._objective = objective
        self._callbacks = callbacks
        self._max_skipped_updates = max_skipped_updates
        self._requests = requests

    def fit(self, state: RunState) -> None:
        """Train from where the state stands to the end of the plan, or until the run is asked to stop.

        Raises:
            AgreedError: a loss that is not finite, or too many skipped updates.
        """
        with self._requests.listening():
            try:
                for callback in self._callbacks:
                    callback.on_train_start(state)
                while not state.is_over:
                    self._run_step(state)
                for callback in self._callbacks:
                    callback.on_train_end(state)
            finally:
                for callback in self._callbacks:
                    callback.close()

    def _run_step(self, state: RunState) -> None:
        for callback in self._callbacks:
            callback.on_step_start(state)
        batches = self._loader.take(state.next_sample)
        rate = self._learning_rate(state.trained_tokens + state.plan.tokens_per_step)
        objective = self._objective(state.trained_tokens)
        result = self._step(batches, objective, rate, state.step + 1, self._requests.take)
        end = self._loader.end(state.next_sample)
        state.advance(end, result.selected_tokens, result.update.applied, result.asked)
        state.record = {} if state.is_logged else None
        for callback in self._callbacks:
            callback.on_step_end(state, result)
        if state.skipped_in_a_row >= self._max_skipped_updates:
            raise AgreedError(
                f"{state.skipped_in_a_row} updates in a row up to step {state.step} had gradients that are not finite "
                "(training.max_skipped_updates): export the last good checkpoint and go on in another run_dir with a "
                "lower training.lr."
            )
