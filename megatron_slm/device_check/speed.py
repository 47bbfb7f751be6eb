"""The speed and memory of a device: whole training steps, scoring a corpus, and the threshold."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_slm.backend.plain import PlainBackend
from megatron_slm.device_check.correctness import RATIO, prepare_step
from megatron_slm.device_check.shapes import Shape, default_dtype, make_batch, make_model, time_repeats
from megatron_slm.dist import World
from megatron_slm.reference.scoring import ModelSource, ScoringBatch, Shard
from megatron_slm.selection import select_tokens
from megatron_slm.training.cost import peak_flops, token_flops
from megatron_slm.types import Batch


def measure_step(shape: Shape, selective: bool, world: World) -> dict[str, Any]:
    """Return tokens per second, MFU of the student alone, and peak memory of optimizer steps under ZeRO-3."""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prepared = prepare_step(shape, selective, world)
    batches = iter([make_batch(shape, world.device, first) for first in range(shape.repeats + 1)])
    seconds = time_repeats(
        lambda: prepared.step([next(batches)], prepared.objective, 1e-4, 1), shape.repeats, world.device
    )
    median = statistics.median(seconds)
    speed = shape.tokens / median
    flops = token_flops(prepared.module, shape.hf_config(), shape.seq_length).training
    peak = peak_flops(world.device)
    return {
        "tokens_per_second": speed,
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "mfu": speed * flops / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


class RepeatedBatch:
    """Work for `ModelSource`: one shard with the same batch several times."""

    num_shards = 1

    def __init__(self, batch: Batch, times: int) -> None:
        self._batch = batch
        self._times = times
        self.rows = times * batch.tokens_BT.numel()

    def shard(self, number: int) -> Shard:
        size = self._batch.tokens_BT.numel()
        row_BT = torch.arange(size, device=self._batch.tokens_BT.device).view_as(self._batch.tokens_BT)
        makers = [partial(ScoringBatch, self._batch, row_BT + turn * size) for turn in range(self._times)]
        return Shard(0, self.rows, makers)


def measure_scoring(shape: Shape, world: World) -> dict[str, Any]:
    """Compare the speed of scoring with that of the model's own forward with full logits, at three batch sizes."""
    dtype = default_dtype(world.device)
    module = make_model(shape, 2, PlainBackend(world), dtype, world.device).eval().requires_grad_(False)
    flops, peak = token_flops(module, shape.hf_config(), shape.seq_length).forward, peak_flops(world.device)
    report = {}
    for factor in (1, 2, 4):
        size = factor * shape.micro_batch_size
        batch = make_batch(shape, world.device, samples=size)
        source = ModelSource(module, RepeatedBatch(batch, shape.repeats), ["loss"], world)
        ways: dict[str, Callable[[], object]] = {
            "scoring": partial(source.values, 0, lambda done: None),
            "plain forward": partial(_run_forwards, module, batch, shape.repeats),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(3):
            for name, work in ways.items():
                seconds[name] += time_repeats(work, 1, world.device)
        speeds = {name: source.rows / statistics.median(found) for name, found in seconds.items()}
        report[f"{size} sequences"] = {
            name: {"tokens_per_second": speed, "mfu": speed * flops / peak if peak else None}
            for name, speed in speeds.items()
        }
    return report


@torch.no_grad()
def _run_forwards(module: Any, batch: Batch, times: int) -> None:
    for _ in range(times):
        module.lm(input_ids=batch.tokens_BT, position_ids=batch.position_ids_BT, use_cache=False)


def measure_threshold(shape: Shape, world: World) -> dict[str, Any]:
    """Return the seconds to select from the scores of a micro-batch, and from a million scores."""
    report = {}
    for count in (shape.tokens, 1_000_000):
        scores = torch.randn(count, device=world.device)
        valid = torch.ones(count, dtype=torch.bool, device=world.device)
        seconds = time_repeats(partial(select_tokens, scores, valid, RATIO), 20, world.device)
        report[str(count)] = {"seconds": statistics.median(seconds)}
    return report
