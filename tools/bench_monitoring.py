"""The cost of monitoring a run: seconds of all monitoring callbacks against the seconds of a step."""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import is_rank, start_ranks

from megatron_slm.build.run import Run, build_run
from megatron_slm.config import parse_config
from megatron_slm.demo.chain import MODEL, SEQ_LENGTH
from megatron_slm.dist import World, connect, disconnect
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback

BLOCK = 10
WAYS = {"not watched": 0, "log_interval 10": 10, "log_interval 1": 1}
INTERVALS = {"ExcessHistogram": 50, "TokenTable": 500}
"""The default intervals of the callbacks that have one."""


def main() -> None:
    options = parse_arguments()
    if not is_rank():
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            sys.exit(start_ranks(options.ranks, "--folder", folder))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = connect()
    run = build_run(parse_config(configuration(Path(options.folder), world.size)), world)
    measured = measure(run, options.rounds)
    if world.is_main:
        report(*measured, world, options.json)
    disconnect()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"Blocks of {BLOCK} steps alternate: not watched, every tenth step logged, every step logged. A barrier "
        "before the callbacks keeps the wait for a slower rank's step out of their time.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start on this host; ignored under torchrun")
    parser.add_argument("--rounds", type=int, default=4, help="blocks of each kind to measure, after a first one")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(folder: Path) -> None:
    """Make two corpora of Python's own sources, and a reference with random weights, which do not affect its cost."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_slm.data.tokenizer import load_tokenizer, save_tokenizer, vocabulary_size
    from megatron_slm.prepare.prepare import prepare_corpus

    library = Path(sysconfig.get_path("stdlib"))
    tokenizer = None
    for name in ("asyncio", "email"):
        texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob(f"{name}/*.py"))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source, prefix = str(folder / f"{name}.jsonl"), str(folder / name)
        prepare_corpus([source], prefix, tokenizer=tokenizer, train_size=None if tokenizer else 2048)
        tokenizer = tokenizer or str(folder / f"{name}.tokenizer")
    loaded = load_tokenizer(str(tokenizer))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL, vocab_size=vocabulary_size(loaded)))
    model.save_pretrained(folder / "reference")
    save_tokenizer(loaded, folder / "reference")


def configuration(folder: Path, ranks: int) -> dict[str, Any]:
    """Return a selective run that never ends, in which every callback with an interval runs once per block."""
    return {
        "run_dir": str(folder / "run"),
        "model": {"config": MODEL},
        "reference": {"path": str(folder / "reference")},
        "data": {"train": [0.5, str(folder / "asyncio"), 0.5, str(folder / "email")], "seq_length": SEQ_LENGTH},
        "training": {
            "micro_batch_size": 16 // ranks,
            "global_batch_size": 16,
            "train_tokens": "100M",
            "eval_interval": 10**9,
            "save_interval": 10**9,
            "histogram_interval": BLOCK,
            "token_table_interval": BLOCK,
        },
    }


class TimedCallback(Callback):
    """A callback that measures the step ends of another one on this rank.

    Args:
        inner: the other callback.
        waits: whether to wait in a barrier first. The first callback of a step does, because rank 0 has more callbacks
            than the other ranks.
    """

    def __init__(self, inner: Callback, waits: bool) -> None:
        self.inner = inner
        self._waits = waits
        self.seconds: list[float] = []

    def on_train_start(self, state: RunState) -> None:
        self.inner.on_train_start(state)

    def on_step_start(self, state: RunState) -> None:
        self.inner.on_step_start(state)

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if self._waits:
            dist.barrier()
        start = time.perf_counter()
        self.inner.on_step_end(state, result)
        self.seconds.append(time.perf_counter() - start)

    def on_record(self, state: RunState, record: dict[str, Any]) -> None:
        start = time.perf_counter()
        self.inner.on_record(state, record)
        self.seconds[-1] += time.perf_counter() - start


def measure(run: Run, rounds: int) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """Return the seconds of each step, and of each callback's step ends, by log interval, on this rank."""
    trainer, state = run.trainer, run.state
    watching = [TimedCallback(callback, waits=index == 0) for index, callback in enumerate(trainer._callbacks)]
    for callback in watching:
        callback.on_train_start(state)
    steps: dict[str, list[float]] = defaultdict(list)
    ends: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way, interval in WAYS.items() if interval}
    for index in range(rounds + 1):
        for way, interval in WAYS.items():
            trainer._callbacks = watching if interval else []
            state.plan = dataclasses.replace(state.plan, log_interval=interval or 10**9)
            for _ in range(BLOCK):
                start = time.perf_counter()
                trainer._run_step(state)
                if index:
                    steps[way].append(time.perf_counter() - start)
            for callback in watching:
                if index and interval:
                    ends[way][type(callback.inner).__name__] += callback.seconds
                callback.seconds = []
    return steps, ends


def seconds_per_step(name: str, seconds: list[float], log_interval: int) -> float:
    """Return the median seconds of the step ends at which a callback does its work, divided by its interval."""
    measured, default = (BLOCK, INTERVALS[name]) if name in INTERVALS else (log_interval, log_interval)
    return statistics.median(sorted(seconds)[-(len(seconds) // measured) :]) / default


def report(steps: dict[str, list[float]], ends: dict[str, dict[str, list[float]]], world: World, as_json: bool) -> None:
    """Print milliseconds per step, and the share that monitoring takes at the default intervals."""
    step = statistics.median(steps["not watched"])
    per_step = {
        way: {name: seconds_per_step(name, seconds, WAYS[way]) for name, seconds in found.items()}
        for way, found in ends.items()
    }
    shares = {way: sum(found.values()) / step for way, found in per_step.items()}
    if as_json:
        print(json.dumps({"ranks": world.size, "step_seconds": step, "callback_seconds": per_step, "shares": shares}))
        return
    print(f"{world.size} ranks on {world.device.type}, median step not watched: {1e3 * step:.0f} ms")
    for way, found in per_step.items():
        print(f"\n{way}: {1e3 * sum(found.values()):.2f} ms per step, {shares[way]:.2%} of it; of that")
        for name, seconds in found.items():
            print(f"  {name:18}{1e3 * seconds:8.2f}")


if __name__ == "__main__":
    main()
