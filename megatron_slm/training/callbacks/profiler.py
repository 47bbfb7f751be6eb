"""Where the time of some steps goes, by torch.profiler."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_slm.dist import World
from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult

ROWS = 15


class Profiler(Callback):
    """Writes a Chrome trace a rank over some steps, and logs the operators that took longest.

    First of the callbacks, so that a trace holds the training of its steps and the callbacks between them only.

    Args:
        folder: for the traces.
        first, last: steps, both included.
        world: this process among all.
    """

    def __init__(self, folder: Path, first: int, last: int, world: World) -> None:
        self._folder = folder
        self._first, self._last = first, last
        self._world = world
        self._profile: profile | None = None

    def on_step_start(self, state: RunState) -> None:
        if self._profile is None and self._first <= state.step + 1 <= self._last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if self._profile is not None and (state.step == self._last or state.is_over):
            self._profile.stop()
            self._write(self._profile, state.step)
            self._profile = None

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, taken: profile, step: int) -> None:
        log = logging.getLogger(__name__)
        path = self._folder / f"steps-{self._first}-{step}-rank{self._world.rank:04d}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            taken.export_chrome_trace(str(path))
        except OSError as error:
            log.warning("the profile %s cannot be written: %s", path, error)
        if self._world.is_main:
            order = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
            table = taken.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=40)
            log.info("profile of steps %d to %d, also in %s\n%s", self._first, step, self._folder, table)
