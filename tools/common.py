"""Code that several programs under tools/ share: options, ranks, measured commands, and chains of stages."""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import psutil

from megatron_slm.demo.processes import StoppedError, StopRequest, stop_on_signals
from megatron_slm.demo.stages import Stage
from megatron_slm.errors import UserError


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's docstring with its line breaks."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def show_log_lines() -> None:
    """Print the package's log lines, such as progress."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_slm").setLevel(logging.INFO)


def spread(values: Sequence[float]) -> str:
    """Return the mean of the values, with their standard deviation if there are several."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def is_rank() -> bool:
    """Return whether a launcher started this process."""
    return "RANK" in os.environ


def start_ranks(ranks: int, *options: str) -> int:
    """Start this program again on several ranks of this host, one thread each, and return the exit status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # Ranks on one host share its cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([*torchrun, *sys.argv, *options], env=environment, check=False).returncode


class CommandCost(NamedTuple):
    """The duration of a command, and its peak memory."""

    seconds: float
    peak_bytes: int


def measure_command(arguments: list[str], memory: Callable[[psutil.Process], int], interval: float) -> CommandCost:
    """Run `megatron-slm` with these arguments and watch its memory; exit if it fails.

    Args:
        arguments: the verb and its arguments.
        memory: returns the bytes of a process that count.
        interval: seconds between two measurements.
    """
    command = [sys.executable, "-m", "megatron_slm", *arguments]
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, memory(process))
        time.sleep(interval)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed with status {process.returncode}.")
    return CommandCost(time.perf_counter() - start, peak)


def prepare_stage(name: str, text: Path, folder: Path, first: str = "general") -> Stage:
    """Return a stage that prepares a corpus with the tokenizer that is trained on the corpus `first`."""
    tokenizer = ("--train-tokenizer", "2048") if name == first else ("--tokenizer", f"{folder}/{first}.tokenizer")
    prefix = folder / name
    outputs = tuple(Path(f"{prefix}{suffix}") for suffix in (".json", ".bin", ".idx", ".tokenizer"))
    command = ("-m", "megatron_slm", "prepare", "--input", str(text), "--output", str(prefix), *tokenizer)
    return Stage(f"prepare_{name}", f"prepare {name}", command, outputs, str(text.resolve()), 15.0)


def parse_with_data(parser: argparse.ArgumentParser, holds: str) -> argparse.Namespace:
    """Parse the options, create the output folder and make it absolute, and print log lines from here on.

    Args:
        parser: with the options `--data` and `--output`.
        holds: names of the folders that `--data` must hold, for the error message.
    """
    arguments = parser.parse_args()
    if not arguments.data or not (Path(arguments.data) / "quickstart").is_dir():
        parser.error(f"--data (or SLM_DATA) must name the folder that holds {holds}")
    arguments.data = Path(arguments.data)
    arguments.output = arguments.output.absolute()
    arguments.output.mkdir(parents=True, exist_ok=True)
    show_log_lines()
    return arguments


@contextlib.contextmanager
def exit_on_stop(program: str) -> Iterator[StopRequest]:
    """Yield a stop request; exit with a message if a stage fails, and with the status of a signal that stops it."""
    try:
        with stop_on_signals() as stop:
            yield stop
    except UserError as error:
        sys.exit(f"{program}: {error}")
    except StoppedError as stopped:
        sys.exit(stopped.status)
