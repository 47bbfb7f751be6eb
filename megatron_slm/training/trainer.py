"""The training loop, and the callbacks that it calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from megatron_slm.data.loader import StepLoader
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.training.objective import Objective
from megatron_slm.training.state import Requests, RunState
from megatron_slm.training.step import StepResult, TrainingStep


class Callback:
    """The base class of callbacks, whose methods do nothing. Override those that are needed.

    Every rank calls every method. All callbacks fill the record of a step before any of them reads it, so their order
    makes no difference to the records.
    """

    def on_train_start(self, state: RunState) -> None:
        """Called after a resume, before the first step."""

    def on_step_start(self, state: RunState) -> None:
        """Called before the samples of a step are read."""

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        """Called after the update, when `state` already includes the step.

        Add metrics to `state.record` here. It is a dict if the step is logged, and None otherwise. Other callbacks may
        not have added theirs yet.
        """

    def on_record(self, state: RunState, record: dict[str, float | int | None]) -> None:
        """Called on logged steps, after all callbacks have filled the record. Read or write the record here."""

    def on_train_end(self, state: RunState) -> None:
        """Called after the last step, or after the step in which a stop was requested."""

    def close(self) -> None:
        """Called at the end of every run, even after an error."""


def make_callback(entry: str | Mapping[str, Any]) -> Callback:
    """Return the callback that an entry of the setting `callbacks` names.

    Args:
        entry: `package.module:Class`, or a group with this name as `class` and keyword arguments as `args`.

    Raises:
        UserError: the class cannot be imported, does not accept the arguments, or is not a `Callback`.
    """
    name, arguments = (entry, {}) if isinstance(entry, str) else (entry["class"], entry.get("args") or {})
    module, _, kind = name.partition(":")
    # The class is the user's code, whose import and constructor may raise anything.
    try:
        found = getattr(import_module(module), kind)
    except Exception as error:
        remedy = "Write package.module:Class, and put the package on PYTHONPATH"
        raise UserError("callbacks", name, f"it cannot be imported ({error})", remedy) from error
    try:
        callback = found(**arguments)
    except Exception as error:
        reason = f"it cannot be made with the arguments {dict(arguments)} ({error})"
        remedy = f"Write {{class: {name}, args: {{name: value}}}} with the arguments that the class takes"
        raise UserError("callbacks", name, reason, remedy) from error
    if not isinstance(callback, Callback):
        raise UserError("callbacks", name, "it is not a callback", "Derive the class from megatron_slm.Callback")
    return callback


class Trainer:
    """The training loop.

    Args:
        loader: loads the micro-batches of each step.
        step: the optimizer step.
        learning_rate: returns the learning rate of the step that ends after a number of trained tokens.
        objective: returns the objective of the step that begins after a number of trained tokens.
        callbacks: the callbacks; their order makes no difference to the records.
        save: writes a checkpoint of the state.
        max_skipped_updates: number of skipped updates in a row after which the run stops.
        requests: collects the requests to save or stop that this rank receives.
        activity: receives the step and phase of this rank.
    """

    def __init__(
        self,
        loader: StepLoader,
        step: TrainingStep,
        learning_rate: Callable[[int], float],
        objective: Callable[[int], Objective],
        callbacks: Sequence[Callback],
        save: Callable[[RunState], None],
        max_skipped_updates: int,
        requests: Requests,
        activity: Activity | None = None,
    ) -> None:
        self._loader = loader
        self._step = step
        self._learning_rate = learning_rate
        self._objective = objective
        self._callbacks = callbacks
        self._save = save
        self._max_skipped_updates = max_skipped_updates
        self._requests = requests
        self._activity = activity or Activity()

    def fit(self, state: RunState) -> None:
        """Train from the given state to the end of the plan, or until the run is requested to stop.

        Raises:
            AgreedError: a loss is not finite, too many updates in a row were skipped, or the last checkpoint cannot be
                written.
        """
        with self._requests.listening():
            try:
                self._activity.enter(Phase.CALLBACKS)
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
        self._activity.enter(Phase.CALLBACKS)
        for callback in self._callbacks:
            callback.on_step_start(state)
        result = self._train(state)
        self._activity.enter(Phase.CALLBACKS)
        state.record = {} if state.is_logged else None
        for callback in self._callbacks:
            callback.on_step_end(state, result)
        if state.record is not None:
            for callback in self._callbacks:
                callback.on_record(state, state.record)
        # Save last: if a run is killed between a checkpoint and the record of its step, the resumed run does not repeat
        # the step, and the record stays missing.
        if state.is_saved:
            self._save(state)
        if state.skipped_in_a_row >= self._max_skipped_updates:
            raise AgreedError(
                "training.max_skipped_updates",
                self._max_skipped_updates,
                f"the gradients of as many updates in a row, up to step {state.step}, were not finite",
                "Export the last good checkpoint and continue in another run_dir with a lower training.lr",
            )

    def _train(self, state: RunState) -> StepResult:
        """Run one optimizer step, and count it in the state."""
        start = time.perf_counter()
        self._activity.begin_step(state.step + 1)
        batches = self._loader.load(state.next_sample)
        rate = self._learning_rate(state.trained_tokens + state.plan.tokens_per_step)
        objective = self._objective(state.trained_tokens)
        result = self._step(batches, objective, rate, state.step + 1, self._requests.collect)
        end = self._loader.end(state.next_sample)
        state.advance(end, result.selected_tokens, result.update.applied, result.requested)
        if state.is_logged and torch.accelerator.is_available():
            # The device may still run the update. Without this, callbacks would wait for it outside the measured time.
            torch.accelerator.synchronize()
        state.step_seconds = time.perf_counter() - start
        return result
