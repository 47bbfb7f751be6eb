"""The time and memory of a selective step with each kind of backward, against a plain step of the same shape.

All kinds of steps alternate in one process: forward, selection with stored reference losses, and backward. The
optimizer is the same for all of them, and is measured apart. Ratios are taken within a round, and their median over
the rounds. A plain step is the faster of two: with this package's head, and with full logits. Weights and tokens are
random.
"""

import ctypes
import re
import statistics
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from megatron_slm.backend.plain import PlainBackend
from megatron_slm.build.models import make_learner
from megatron_slm.device_check.correctness import BACKWARDS
from megatron_slm.device_check.shapes import Shape, default_dtype, make_batch, make_model, plain_engine, time_once
from megatron_slm.dist import World
from megatron_slm.io.progress import Meter
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.selection import select_tokens
from megatron_slm.training.cost import peak_flops, token_flops

RATIOS = (1.0, 0.7, 0.6, 0.5, 0.3)


@dataclass(frozen=True)
class StepKind:
    """A kind of step.

    backward       as `selection.backward`
    ratio          share of the tokens that is selected; None for a plain step
    checkpointing  activation checkpointing
    full_logits    a plain step without this package's head
    """

    backward: str
    ratio: float | None = None
    checkpointing: bool = False
    full_logits: bool = False

    @property
    def name(self) -> str:
        plain = "clm_full_logits" if self.full_logits else "clm"
        name = plain if self.ratio is None else f"{self.backward}@{self.ratio}"
        return name + "_checkpointed" * self.checkpointing


PLAIN = tuple(StepKind("exact", None, checkpointing, full) for checkpointing in (False, True) for full in (False, True))


def selective_kinds(backwards: Sequence[str] = BACKWARDS, ratios: Sequence[float] = RATIOS) -> list[StepKind]:
    """Return every kind of backward at every ratio."""
    return [StepKind(backward, ratio) for backward in backwards for ratio in ratios]


class StepBench:
    """One model and one batch, on which every kind of step runs."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        dtype = default_dtype(device)
        self.module = make_model(shape, 1, PlainBackend(World(0, 1, 0, device)), dtype, device).train()
        self.flops = token_flops(self.module, shape.hf_config(), shape.seq_length).training
        self._engine = plain_engine(self.module, shape, dtype, device)
        self._students = {
            backward: make_learner(backward, self.module, self._engine, shape.seq_length) for backward in BACKWARDS
        }
        self._batch = make_batch(shape, device)
        with torch.no_grad():
            loss_BT = score_batch(self.module, self._batch)["loss"]
        self._reference_BT = loss_BT + torch.randn_like(loss_BT)

    def prepare(self, kind: StepKind) -> None:
        """Clear the gradients and set activation checkpointing; this is not timed."""
        self.module.zero_grad()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            if kind.checkpointing:
                self.module.lm.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.module.lm.gradient_checkpointing_disable()

    def step(self, kind: StepKind) -> None:
        """Run forward, selection and backward."""
        if kind.full_logits:
            self._full_logits()
            return
        student, valid_BT = self._students[kind.backward], self._batch.valid_BT
        signals, tape = student.score(self._batch, (), keep=True)
        weights_BT = valid_BT.float()
        if kind.ratio is not None:
            weights_BT = select_tokens(signals["loss"] - self._reference_BT, valid_BT, kind.ratio).weights
        student.backward(tape, {"loss": weights_BT}, 1 / valid_BT.numel(), last=True)

    def update(self) -> None:
        """Run the optimizer at a rate of 0, so that all steps see the same weights."""
        self._engine.step(0.0)

    def _full_logits(self) -> None:
        batch = self._batch
        output = self.module.lm(input_ids=batch.tokens_BT, position_ids=batch.position_ids_BT, use_cache=False)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), batch.labels_BT.flatten())
        torch.autograd.backward(loss)


def measure_steps(
    shape: Shape, device: torch.device, backwards: Sequence[str] = BACKWARDS, ratios: Sequence[float] = RATIOS
) -> dict[str, Any]:
    """Time every kind of step, alternating over `shape.repeats` rounds, and run each once more for its memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    bench = StepBench(shape, device)
    kinds = [*PLAIN, *selective_kinds(backwards, ratios)]
    seconds: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    with Meter((shape.repeats + 2) * len(kinds), "steps") as meter:
        for turn in range(shape.repeats + 1):
            for index, kind in enumerate(kinds):
                bench.prepare(kind)
                taken = _seconds(partial(bench.step, kind), device)
                if turn and taken is not None:  # the first round warms up
                    seconds[kind.name].append(taken)
                meter.reach(turn * len(kinds) + index + 1)
        peaks = {kind.name: _peak_bytes(bench, kind, device) for kind in kinds}
    return _report(seconds, peaks) | {
        "shape": f"{shape}, {str(default_dtype(device)).removeprefix('torch.')}",
        "optimizer": statistics.median([_update_seconds(bench, device) for _ in range(4)][1:]),
        "tokens_per_second": shape.tokens / statistics.median(_fastest(seconds, False)),
        "flops_per_token": bench.flops,
        "peak_flops": peak_flops(device),
    }


def steps_table(found: dict[str, Any]) -> str:
    """Return the result of `measure_steps` as a text table."""
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


def _seconds(work: partial[None], device: torch.device) -> float | None:
    """Return the seconds of a step, or None if the GPU has too little memory for it."""
    try:
        return time_once(work, device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _update_seconds(bench: StepBench, device: torch.device) -> float:
    bench.prepare(PLAIN[0])
    bench.step(PLAIN[0])
    return time_once(bench.update, device)


def _peak_bytes(bench: StepBench, kind: StepKind, device: torch.device) -> int | None:
    """Return the memory that a step adds to that of the weights, gradients included; None if it cannot be measured."""
    bench.prepare(kind)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = _seconds(partial(bench.step, kind), device)
        return None if taken is None else torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
        before = _resident_bytes("VmRSS")
        bench.step(kind)
        return _resident_bytes("VmHWM") - before
    return None


def _resident_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def _fastest(seconds: dict[str, list[float]], checkpointing: bool) -> list[float]:
    """Return the rounds of the faster plain step."""
    rounds = [seconds[kind.name] for kind in PLAIN if kind.checkpointing == checkpointing]
    return min(filter(None, rounds), key=statistics.median)


def _report(seconds: dict[str, list[float]], peaks: dict[str, int | None]) -> dict[str, Any]:
    plain, checkpointed = _fastest(seconds, False), _fastest(seconds, True)

    def row(name: str) -> dict[str, Any]:
        taken = seconds[name]
        spread = {"seconds": statistics.median(taken), "min": min(taken), "max": max(taken)} if taken else {}
        return spread | {
            "of_clm": _ratio(taken, plain),
            "of_checkpointed": _ratio(taken, checkpointed),
            "peak_bytes": peaks[name],
        }

    names = {kind.name for kind in PLAIN}
    return {
        "clm": statistics.median(plain),
        "clm_checkpointed": statistics.median(checkpointed),
        "plain": {name: row(name) for name in seconds if name in names},
        "modes": {name: row(name) for name in seconds if name not in names},
    }


def _ratio(taken: list[float], base: list[float]) -> float | None:
    """Return the median of the ratios within each round, in which a busy machine slows both steps."""
    ratios = [one / other for one, other in zip(taken, base, strict=False)]
    return statistics.median(ratios) if ratios else None
