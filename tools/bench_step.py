"""What a selective step costs, in each of its ways, against a plain one of the same shape.

    python tools/bench_step.py --preset cpu
    python tools/bench_step.py --preset gpu-1b --json > step.json
    python tools/bench_step.py --preset cpu --profile rows@0.6

All ways take turns in one process, a round after the other: forward, selection with stored reference losses, and
backward. The optimizer is the same for all and reported apart. Ratios are those of one round, their median over the
rounds. A plain step is the faster of two: this package's head, and full logits. Weights and tokens are random.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.profiler import profile
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_slm.backend import EngineSettings
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.build.models import make_learner
from megatron_slm.dist import World
from megatron_slm.models.causal_lm import CausalLM, score_batch
from megatron_slm.selection import select_tokens
from megatron_slm.training.cost import peak_flops, token_flops
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.settings import TrainingSettings
from megatron_slm.types import Batch

RATIOS = (1.0, 0.7, 0.6, 0.5, 0.3)
MODES = ("exact", "rows", "replay")


@dataclass(frozen=True)
class Shape:
    """A Llama, and the micro-batch that it is trained on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    seq_length: int
    micro_batch_size: int
    dtype: str
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of {self.hidden} ({self.intermediate}, {self.heads} heads in {self.kv_heads} "
            f"groups), vocabulary {self.vocabulary}, T {self.seq_length}, B {self.micro_batch_size}, {self.dtype}"
        )


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 512, 64, 2, "float32", rounds=2),
    "cpu": Shape(6, 512, 1408, 8, 8, 8192, 512, 4, "float32", rounds=9),
    "gpu-1b": Shape(22, 2048, 5632, 32, 4, 32000, 2048, 8, "bfloat16", rounds=9),
    "gpu-7b": Shape(32, 4096, 11008, 32, 32, 32000, 2048, 2, "bfloat16", rounds=5),
}


@dataclass(frozen=True)
class Way:
    """How one step is made. Full logits: without this package's head, for the plain step alone."""

    mode: str
    ratio: float | None = None
    checkpointing: bool = False
    full_logits: bool = False

    @property
    def name(self) -> str:
        plain = "clm_full_logits" if self.full_logits else "clm"
        return (plain if self.ratio is None else f"{self.mode}@{self.ratio}") + "_checkpointed" * self.checkpointing


PLAIN = [Way("exact", None, checkpointing, full) for checkpointing in (False, True) for full in (False, True)]


class Bench:
    """One model and one batch, on which every way makes its step."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        world = World(0, 1, 0, device)
        with device:
            lm = AutoModelForCausalLM.from_config(hf_config(shape), dtype=getattr(torch, shape.dtype))
        self.module = CausalLM(lm).train()
        self.flops = token_flops(self.module, lm.config, shape.seq_length).training
        optimizer = adamw(self.module, TrainingSettings(global_batch_size=1, train_tokens=1), device)
        settings = EngineSettings(shape.micro_batch_size, 1, 1.0, getattr(torch, shape.dtype))
        self._engine = PlainBackend(world).training_engine(self.module, optimizer, settings)
        self._students = {way: make_learner(way, self.module, self._engine, shape.seq_length) for way in MODES}
        self._batch = make_batch(shape).to(device)
        with torch.no_grad():
            loss_BT = score_batch(self.module, self._batch)["loss"]
        self._reference_BT = loss_BT + torch.randn_like(loss_BT)

    def prepare(self, way: Way) -> None:
        """What a step begins with, and is not timed."""
        self.module.zero_grad()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            if way.checkpointing:
                self.module.lm.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.module.lm.gradient_checkpointing_disable()

    def step(self, way: Way) -> None:
        """Forward, selection and backward."""
        if way.full_logits:
            self._full_logits()
            return
        student, valid_BT = self._students[way.mode], self._batch.valid_BT
        signals, tape = student.score(self._batch, (), keep=True)
        weights_BT = valid_BT.float()
        if way.ratio is not None:
            weights_BT = select_tokens(signals["loss"] - self._reference_BT, valid_BT, way.ratio).weights
        student.backward(tape, {"loss": weights_BT}, 1 / valid_BT.numel(), last=True)

    def update(self) -> None:
        """The optimizer's part of a step; its rate is 0, so that all steps see the same weights."""
        self._engine.step(0.0)

    def _full_logits(self) -> None:
        batch = self._batch
        output = self.module.lm(input_ids=batch.tokens_BT, position_ids=batch.position_ids_BT, use_cache=False)
        F.cross_entropy(output.logits.float().flatten(0, 1), batch.labels_BT.flatten()).backward()


def hf_config(shape: Shape) -> Any:
    return AutoConfig.for_model(
        "llama",
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.seq_length,
    )


def make_batch(shape: Shape) -> Batch:
    size = (shape.micro_batch_size, shape.seq_length)
    tokens_BT, labels_BT = torch.randint(shape.vocabulary, (2, *size))
    position_BT = torch.arange(shape.seq_length).repeat(shape.micro_batch_size, 1)
    sample_B = torch.arange(shape.micro_batch_size)
    valid_BT = torch.ones(size, dtype=torch.bool)
    return Batch(tokens_BT, labels_BT, valid_BT, position_BT, sample_B, sample_B * 0, position_BT, sample_B * 0)


def measure(shape: Shape, device: torch.device, modes: list[str], ratios: list[float]) -> dict[str, Any]:
    """Every way in turn, round after round; then each once more for its memory."""
    bench = Bench(shape, device)
    ways = PLAIN + [Way(mode, ratio) for mode in modes for ratio in ratios]
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in tqdm(range(shape.rounds + 1), desc="rounds", disable=None):
        for way in ways:
            bench.prepare(way)
            taken = timed(partial(bench.step, way), device)
            if turn and taken is not None:  # the first round warms up
                seconds[way.name].append(taken)
    peaks = {way.name: peak_bytes(bench, way, device) for way in tqdm(ways, desc="memory", disable=None)}
    updates = [timed_update(bench, device) for _ in range(4)][1:]
    return report(shape, seconds, peaks) | {
        "optimizer": statistics.median(updates),
        "tokens_per_second": shape.micro_batch_size * shape.seq_length / fastest(seconds, False)[0],
        "flops_per_token": bench.flops,
        "peak_flops": peak_flops(device),
    }


def timed(work: Callable[[], None], device: torch.device) -> float | None:
    """Seconds; None where the accelerator has too little memory."""
    synchronize(device)
    start = time.perf_counter()
    try:
        work()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    synchronize(device)
    return time.perf_counter() - start


def timed_update(bench: Bench, device: torch.device) -> float:
    bench.prepare(PLAIN[0])
    bench.step(PLAIN[0])
    return timed(bench.update, device) or math.nan


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(bench: Bench, way: Way, device: torch.device) -> int | None:
    """What one step needs beyond weights, gradients of weights included; None where it cannot be told."""
    bench.prepare(way)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return None if timed(partial(bench.step, way), device) is None else torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set begins anew
        before = resident("VmRSS")
        bench.step(way)
        return resident("VmHWM") - before
    return None


def resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def fastest(seconds: dict[str, list[float]], checkpointing: bool) -> list[float]:
    """Median, and the rounds, of the faster plain step."""
    names = [way.name for way in PLAIN if way.checkpointing == checkpointing and seconds[way.name]]
    name = min(names, key=lambda name: statistics.median(seconds[name]))
    return [statistics.median(seconds[name]), *seconds[name]]


def report(shape: Shape, seconds: dict[str, list[float]], peaks: dict[str, int | None]) -> dict[str, Any]:
    plain, checkpointed = fastest(seconds, False), fastest(seconds, True)

    def of(name: str, base: list[float]) -> float | None:
        """Round by round, so that what slows the machine down for a while slows both."""
        ratios = [taken / other for taken, other in zip(seconds[name], base[1:], strict=False)]
        return statistics.median(ratios) if ratios else None

    def row(name: str) -> dict[str, Any]:
        taken = seconds[name]
        spread = {"seconds": statistics.median(taken), "min": min(taken), "max": max(taken)} if taken else {}
        return spread | {
            "of_clm": of(name, plain),
            "of_checkpointed": of(name, checkpointed),
            "peak_bytes": peaks[name],
        }

    names = {way.name for way in PLAIN}
    return {
        "shape": str(shape),
        "clm": plain[0],
        "clm_checkpointed": checkpointed[0],
        "plain": {name: row(name) for name in seconds if name in names},
        "modes": {name: row(name) for name in seconds if name not in names},
    }


def table(found: dict[str, Any]) -> str:
    lines = [found["shape"], f"{'':28} {'seconds':>8} {'from - to':>15} {'of CLM':>7} {'of chkpt':>8} {'peak GiB':>8}"]
    for name, row in (found["plain"] | found["modes"]).items():
        if row["of_clm"] is None:
            lines.append(f"{name:28} out of memory")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:8.2f}"
        spread = f"{row['min']:.3f} - {row['max']:.3f}"
        ratios = f"{row['of_clm']:7.3f} {row['of_checkpointed']:8.3f}"
        lines.append(f"{name:28} {row['seconds']:8.3f} {spread:>15} {ratios} {peak:>8}")
    lines.append(f"the optimizer takes {found['optimizer']:.3f} s; plain: {found['tokens_per_second']:,.0f} tokens/s")
    return "\n".join(lines)


def profiled(shape: Shape, device: torch.device, name: str) -> str:
    """Where the time of one way goes, operator by operator."""
    bench = Bench(shape, device)
    ways = PLAIN + [Way(mode, ratio) for mode in MODES for ratio in RATIOS]
    way = next(way for way in ways if way.name == name)
    for turn in range(2):
        bench.prepare(way)
        if not turn:
            bench.step(way)
    with profile() as found:
        bench.step(way)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="cpu", help="shape of model and batch; default: cpu")
    parser.add_argument("--rounds", type=int, help="of all ways in turn; default: the preset's")
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS), help="default: all")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--profile", metavar="MODE@RATIO", help="instead, show where the time of one way goes")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    return parser.parse_args()


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {package: version(package) for package in ("torch", "transformers")}
    load = os.getloadavg()[0]
    return {"device": name, "threads": torch.get_num_threads(), "load": load, "versions": versions}


def main() -> None:
    options = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[options.preset]
    shape = replace(shape, rounds=options.rounds or shape.rounds)
    if options.profile:
        sys.stdout.write(profiled(shape, device, options.profile) + "\n")
        return
    found = measure(shape, device, options.modes, options.ratios) | {"environment": environment(device)}
    sys.stdout.write((json.dumps(found) if options.json else table(found)) + "\n")


if __name__ == "__main__":
    main()
