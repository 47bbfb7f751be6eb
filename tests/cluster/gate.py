"""A callback that holds a run before a step, so that a test can interrupt it there."""

import os
import socket
import time
from pathlib import Path

from megatron_slm import Callback
from megatron_slm.training.state import RunState


class Gate(Callback):
    """Holds every rank after a step until the file `open` exists.

    Args:
        folder: each rank writes its host and process id there, into `rank0`, `rank1`, ...
        step: number of the last step before the gate.
    """

    def __init__(self, folder: str, step: int) -> None:
        self._folder = Path(folder)
        self._step = step

    def on_step_start(self, state: RunState) -> None:
        if state.step != self._step:
            return
        mark = self._folder / f"rank{os.environ['RANK']}"
        mark.with_suffix(".new").write_text(f"{socket.gethostname()} {os.getpid()}")
        mark.with_suffix(".new").replace(mark)
        deadline = time.monotonic() + 200
        while not (self._folder / "open").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._folder / 'open'} was not created")
            time.sleep(0.05)
