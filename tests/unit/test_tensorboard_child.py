"""TensorBoard as a child: on the loopback address alone, and never longer than its run."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_slm.commands import _tensorboard
from megatron_slm.commands._tensorboard import choose_port, serving
from tests.refusal import refuses
from tests.runs import free_port

PARENT = """
import sys, time
from pathlib import Path
from megatron_slm.commands._tensorboard import serving
with serving(Path(sys.argv[1]), int(sys.argv[2])):
    print("started", flush=True)
    time.sleep(600)
"""


def children(process: psutil.Process | None = None) -> list[psutil.Process]:
    return (process or psutil.Process()).children(recursive=True)


def wait_for(port: int) -> bytes:
    """Return TensorBoard's page, once it is served."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugins_listing", timeout=5).read()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


@pytest.fixture
def busy() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_it_listens_on_the_loopback_address_only_and_ends_with_the_context(tmp_path: Path) -> None:
    port = int(free_port())
    before = children()  # such as the server from which other tests fork their ranks
    with serving(tmp_path, port):
        wait_for(port)
        found = [child for child in children() if child not in before]
        addresses = {c.laddr.ip for one in found for c in one.net_connections() if c.status == psutil.CONN_LISTEN}
        assert addresses <= {"127.0.0.1", "::1"} and "127.0.0.1" in addresses
    assert ended(found)
    assert f"http://127.0.0.1:{port}/" in (tmp_path / "log-tensorboard.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_when_its_run_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), port], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    wait_for(int(port))
    found = children(psutil.Process(parent.pid))
    os.kill(parent.pid, number)
    parent.wait(timeout=20)
    assert found and ended(found)


def test_a_port_in_use_is_refused_if_it_was_asked_for(busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses("--tensorboard", busy, "cannot listen"):
        choose_port(busy)
    monkeypatch.setattr(_tensorboard, "USUAL_PORT", busy)
    assert choose_port(0) not in (0, busy)


def test_the_usual_port_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = int(free_port())
    monkeypatch.setattr(_tensorboard, "USUAL_PORT", usual)
    assert choose_port(0) == usual
    assert choose_port(usual) == usual
