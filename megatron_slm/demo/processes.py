"""Commands that run with their output in a log file, and that end when this process is stopped.

Only SIGKILL to this process leaves its children running.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import psutil

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0


class StoppedError(Exception):
    """The end of this program by a signal; `status` is the exit status that a shell expects."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class StopRequest:
    """A signal handler that records the signal for `check`, so that it interrupts nothing halfway."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def check(self) -> None:
        """Raise a StoppedError if a signal has arrived."""
        if self._number:
            raise StoppedError(self._number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield a request whose `check` raises after SIGINT, SIGTERM or SIGHUP."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_process(
    command: list[str], log: Path, stop: StopRequest, poll: Callable[[], None], environment: Mapping[str, str]
) -> int:
    """Run a command in a session of its own, and return its exit status.

    Args:
        command: the program and its arguments.
        log: the file to which its output is appended.
        stop: checked twice per second.
        poll: called as often.
        environment: variables in addition to this process's own.

    Raises:
        StoppedError: a signal has arrived; the command and all its descendants have ended.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL_SECONDS)
                stop.check()
                poll()
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its descendants. torchrun starts ranks in other sessions, so a group kill is not enough."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True), root]
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(tree, timeout=GRACE_SECONDS)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
