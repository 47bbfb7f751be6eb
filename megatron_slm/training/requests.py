"""What a person or a scheduler asks of a run that is under way, by signal.

SIGUSR1           save a checkpoint when the step ends
SIGUSR2, SIGTERM  save and stop when the step ends; a second SIGTERM ends the process as usual
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_slm.training.state import Asked

SAVE = signal.SIGUSR1
STOP = (signal.SIGUSR2, signal.SIGTERM)
ECHO_SECONDS = 5.0
"""A launcher may pass on the SIGTERM that a scheduler has sent to this process too: the two are one request."""


class Requests:
    """Listens for signals on this rank. A handler only takes a note: the ranks agree on it within a step."""

    def __init__(self) -> None:
        self._save = False
        self._stop = False
        self._terminated_at: float | None = None

    def take(self) -> Asked:
        """What was asked since the last call, of this rank alone."""
        asked = Asked(self._save, self._stop)
        if asked.save:
            self._save = False
        return asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside, and put back what handled them before."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread alone.
            return
        before = {number: signal.signal(number, self._note) for number in (SAVE, *STOP)}
        logging.getLogger(__name__).info(
            "process %d on %s: SIGUSR1 saves, SIGUSR2 or SIGTERM saves and stops", os.getpid(), socket.gethostname()
        )
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self._save = True
            return
        self._stop = True
        if number == signal.SIGTERM:
            now = time.monotonic()
            if self._terminated_at is not None and now - self._terminated_at > ECHO_SECONDS:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            self._terminated_at = self._terminated_at or now
