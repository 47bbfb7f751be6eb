"""TensorBoard as a child of a run, on this machine's loopback address only."""

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_slm.errors import UserError

HOST = "127.0.0.1"
"""TensorBoard has no authentication, so no other machine may reach it."""
USUAL_PORT = 6006

PROGRAM = """
import os, sys, threading
# The pipe to the run ends with the run, even if the run is killed.
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
from tensorboard.main import run_main
run_main()
"""


def choose_port(wanted: int) -> int:
    """Return a free port: the wanted one; or, if that is 0, 6006 or any other.

    Raises:
        UserError: the wanted port is not free.
    """
    for port in (wanted,) if wanted else (USUAL_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                reason = error.strerror
            else:
                return int(probe.getsockname()[1])
    remedy = "Use another port, or give none to use a free one"
    raise UserError("--tensorboard", wanted, f"TensorBoard cannot listen at this port ({reason})", remedy)


@contextmanager
def serving(run_dir: Path, port: int) -> Iterator[None]:
    """Serve the curves of a run while the context lasts; the server also ends if this process is killed."""
    messages = run_dir / "log-tensorboard.txt"
    options = ["--logdir", str(run_dir), "--host", HOST, "--port", str(port)]
    # -P: a file in the working directory must not take the place of a package.
    command = [sys.executable, "-P", "-c", PROGRAM, *options]
    with messages.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
    logging.getLogger(__name__).info(
        "TensorBoard: http://%s:%d/#custom_scalars while the run lasts; its messages are in %s", HOST, port, messages
    )
    try:
        yield
    finally:
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
