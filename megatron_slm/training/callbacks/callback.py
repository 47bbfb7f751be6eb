"""The moments of a run. A callback is one concern in one file."""

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
        """After the last step."""

    def close(self) -> None:
        """Always, also after an error."""
