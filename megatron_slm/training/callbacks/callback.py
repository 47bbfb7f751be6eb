"""The moments of a run. A callback is one concern in one file, here or anywhere of yours."""

from importlib import import_module

from megatron_slm.errors import UserError
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


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
