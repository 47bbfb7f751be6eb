"""The moments of a run. A callback is one concern in one file, here or anywhere of yours."""

from collections.abc import Callable, Sequence
from importlib import import_module

from megatron_slm.data.loader import StepLoader
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.training.objective import Objective
from megatron_slm.training.state import Requests, RunState
from megatron_slm.training.step import StepResult, TrainingStep


class Callback:
    """Does nothing at any moment; override what is needed. Called on every rank."""

    def on_train_start(self, state: RunState) -> None:
        """After a resume, before the first step."""

    def on_step_start(self, state: RunState) -> None:
        """Before the samples are fetched."""

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        """After the update; `state` counts it already, and `state.record` is a dict if the step is logged."""

    def on_train_end(self, state: RunState) -> None:
        """After the last step, or the one at which the run was asked to stop."""

    def close(self) -> None:
        """Always, also after an error."""


def make_callback(name: str) -> Callback:
    """An object of the class `package.module:Class`, which takes no arguments.

    Raises:
        UserError: it cannot be imported or made, or is no `Callback`.
    """
    module, _, kind = name.partition(":")
    try:
        made = getattr(import_module(module), kind)()
    except Exception as error:
        raise UserError(
            f"callbacks names '{name}', which cannot be made ({error}): write package.module:Class, put the package "
            "on PYTHONPATH, and let the class take no arguments."
        ) from error
    if not isinstance(made, Callback):
        raise UserError(f"callbacks names '{name}', which is no callback: derive the class from megatron_slm.Callback.")
    return made


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
