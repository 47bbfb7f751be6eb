"""Callbacks that harm a run on purpose, and that time its saves."""

import json
import os
import signal
import time
from pathlib import Path

from megatron_slm import Callback
from megatron_slm.training.state import RunState


class Fault(Callback):
    """Sends a signal to one rank before a step, once.

    Args:
        mark: file that shows that the signal was sent; a restarted run finds it, and goes on.
        step: the number of finished steps at which to send it.
        signal: name of the signal, such as SIGKILL.
        rank: the rank that receives it.
    """

    def __init__(self, mark: str, step: int, signal: str, rank: int) -> None:
        self._mark = Path(mark)
        self._step = step
        self._signal = signal
        self._rank = rank

    def on_step_start(self, state: RunState) -> None:
        if int(os.environ["RANK"]) == self._rank and state.step == self._step and not self._mark.exists():
            self._mark.write_text(f"{time.time()}")
            os.kill(os.getpid(), signal.Signals[self._signal])


class SaveTimes(Callback):
    """Writes the seconds between the end of a step and the start of the next one, which a save takes.

    Args:
        output: JSON of seconds by step.
    """

    def __init__(self, output: str) -> None:
        self._output = Path(output)
        self._end: float | None = None
        self._pauses: dict[int, float] = {}

    def on_step_start(self, state: RunState) -> None:
        if self._end is not None:
            self._pauses[state.step] = time.perf_counter() - self._end

    def on_record(self, state: RunState, record: dict[str, float | int | None]) -> None:
        self._end = time.perf_counter()

    def on_train_end(self, state: RunState) -> None:
        if os.environ["RANK"] == "0":
            self._output.write_text(json.dumps(self._pauses))
