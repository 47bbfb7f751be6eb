"""Show runs in the terminal, on any machine that sees their directories.

Each run has curves of its held-out and training losses, its threshold and the selected share of each source, and its
speed, progress, last checkpoint and health. Lines that begin with ! need attention. The files are only read. The
command ends when all runs have finished, or at Ctrl-C.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.errors import Mistakes, UserError
from megatron_slm.reporting.watch import TICKS, WatchedRun

EXAMPLES = """examples:
  megatron-slm watch runs/slm
  megatron-slm watch runs/slm runs/clm --interval 30
  megatron-slm watch runs/slm --once
"""

ASCII = str.maketrans(TICKS, "_.,-=+*#")
"""Marks of a curve for terminals that cannot show its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="directory of a run")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=float, default=5.0, help="time between updates (default: 5)"
    )
    parser.add_argument("--once", action="store_true", help="show the runs once, and exit")


def run(arguments: argparse.Namespace) -> None:
    """Show the runs until they have finished, or until the user stops the command."""
    runs = _open(arguments.run_dirs, arguments.interval)
    try:
        _show(runs)
        while not arguments.once and not all(one.is_finished for one in runs):
            time.sleep(arguments.interval)
            _show(runs)
    except KeyboardInterrupt:
        return
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has ended. Flushing at the exit of Python must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open(paths: Sequence[Path], interval: float) -> list[WatchedRun]:
    runs = [WatchedRun(path) for path in paths]
    mistakes = Mistakes()
    with mistakes.collect():
        if not 0 < interval < float("inf"):
            raise UserError("--interval", interval, "it is the time between updates in seconds", "Use 1 or more")
    for path, one in zip(paths, runs, strict=True):
        with mistakes.collect():
            if one.configuration() is None:
                remedy = "Pass the directory of a run, which writes this file once its settings are checked"
                raise UserError("RUN_DIR", path, "it holds no config.yaml of a run", remedy)
    mistakes.raise_any()
    return runs


def _show(runs: Sequence[WatchedRun]) -> None:
    """Write a frame; in a terminal, it replaces the frame before."""
    columns, rows = shutil.get_terminal_size()
    width = max(60, min(columns, 120)) - 1
    lines: list[str] = []
    for one in runs:
        lines += [*([""] if lines else []), *one.frame(width, time.time())]
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        # From the upper left corner on, clear what is left of each line, and all below the last line.
        text = "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines[: rows - 1]) + "\x1b[J"
    else:
        text = "\n".join(lines) + "\n"
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.translate(ASCII).encode("ascii", "replace").decode()
    sys.stdout.write(text)
    sys.stdout.flush()
