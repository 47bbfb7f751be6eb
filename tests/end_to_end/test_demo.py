"""The demo with a few steps: interrupted, resumed, and started again, without a compiler."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.reader import Reader


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a demo with an empty path: no compiler, no ninja, no git."""
    variables = os.environ | {"PATH": "/nowhere", "CC": "/bin/false", "CXX": "/bin/false"}
    command = [sys.executable, "-m", "megatron_slm", "demo", "--output", str(folder), "--quick"]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, demo: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert demo.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)


@pytest.mark.slow
def test_an_interrupted_demo_leaves_no_process_and_resumes_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo = start(folder)
    wait_for(folder / "runs" / "base" / "metrics.jsonl", demo)
    started = psutil.Process(demo.pid).children(recursive=True)
    assert len(started) >= 3  # torchrun and two ranks
    demo.send_signal(signal.SIGINT)
    _, said = demo.communicate(timeout=60)
    assert demo.returncode == 130 and "to resume" in said
    assert not psutil.wait_procs(started, timeout=5)[1]

    demo = start(folder)
    shown, said = demo.communicate(timeout=600)
    assert demo.returncode == 0, said
    assert "stage 1 of 10" not in said and "stage 2 of 10" in said
    assert "| SLM |" in shown and "| mathematics |" in shown
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "<title>" in (folder / "report.html").read_text()
    page = Reader((folder / "selected.html").read_text())
    assert sum("kept" in (attributes.get("class") or "") for _, attributes in page.elements) > 100
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "img")]

    demo = start(folder)
    again, said = demo.communicate(timeout=60)
    assert demo.returncode == 0 and again == shown
    assert "stage" not in said
