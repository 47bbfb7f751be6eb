"""Is this accelerator right, and how fast is it? One process, one device, minutes; the same checks run on a CPU.

First correctness at a small shape: losses, masks and gradients against float32 on the CPU; steps
in bf16 under ZeRO-3; resume; the backward of selected rows, and replay. Then speed at a shape of your choice:
tokens/s, MFU and peak memory of CLM and of SLM with a live reference of the same size, scoring a corpus, the threshold
alone, and steps whose backward follows the selection (tools/bench_step.py). Weights are random.

    python tools/gpu_check.py --preset tinyllama --output gpu_check.json
    python tools/gpu_check.py --preset tiny          # also without an accelerator

Ends with status 1 if a correctness check fails.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_step
import torch
from transformers import AutoConfig, PretrainedConfig

from megatron_slm.backend import Backend, EngineSettings, TrainingEngine
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.build.models import make_learner
from megatron_slm.dist import World, connect, disconnect
from megatron_slm.models.causal_lm import CausalLM, build_student, initialize_weights, score_batch
from megatron_slm.models.settings import ModelSettings
from megatron_slm.reference.references import LiveReference, NoReference
from megatron_slm.reference.scoring import ModelSource, ScoringBatch, Shard
from megatron_slm.selection import Rule, SelectionSettings, select_tokens
from megatron_slm.training.cost import peak_flops, token_flops
from megatron_slm.training.objective import CausalLanguageModeling, Objective, SelectiveLanguageModeling
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.settings import TrainingSettings
from megatron_slm.training.step import TrainingStep
from megatron_slm.types import Batch

RATIO = 0.6


@dataclass(frozen=True)
class Shape:
    """A model and the batch that its speed is measured with."""

    model: dict[str, Any]
    seq_length: int
    micro_batch_size: int
    steps: int
    checkpointing: bool = False


def llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    }


SHAPES = {
    "tiny": Shape(llama(2, 64, 128, 4, 2, 512), seq_length=64, micro_batch_size=2, steps=3),
    "tinyllama": Shape(llama(22, 2048, 5632, 32, 4, 32000), seq_length=2048, micro_batch_size=8, steps=6),
    "llama-7b": Shape(llama(32, 4096, 11008, 32, 32, 32000), 2048, 4, steps=4, checkpointing=True),
}
STEP_PRESETS = {"tiny": "tiny", "tinyllama": "gpu-1b", "llama-7b": "gpu-7b"}
"""Of tools/bench_step.py, whose shapes are the same."""
SMALL = Shape(llama(2, 256, 512, 4, 2, 1024), seq_length=128, micro_batch_size=4, steps=4)


def hf_config(shape: Shape) -> PretrainedConfig:
    options = dict(shape.model)
    return AutoConfig.for_model(options.pop("model_type"), **options)


def make_model(shape: Shape, seed: int, backend: Backend, dtype: torch.dtype, device: torch.device) -> CausalLM:
    config = hf_config(shape)
    lm = backend.construct(lambda: build_student(ModelSettings(config=shape.model), config, dtype, device))
    initialize_weights(lm, seed, backend.gathered)
    if shape.checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return CausalLM(lm)


def make_batch(shape: Shape, device: torch.device, first: int = 0) -> Batch:
    """Random tokens that depend on the sample's number alone."""
    rows = []
    for ordinal in range(first, first + shape.micro_batch_size):
        generator = torch.Generator().manual_seed(ordinal)
        rows.append(torch.randint(shape.model["vocab_size"], (shape.seq_length + 1,), generator=generator))
    text_BS = torch.stack(rows)
    position_BT = torch.arange(shape.seq_length).expand(shape.micro_batch_size, -1)
    return Batch(
        tokens_BT=text_BS[:, :-1],
        labels_BT=text_BS[:, 1:],
        valid_BT=torch.ones_like(position_BT, dtype=torch.bool),
        position_ids_BT=position_BT,
        sample_index_B=torch.arange(first, first + shape.micro_batch_size),
        source_B=torch.zeros(shape.micro_batch_size, dtype=torch.long),
        label_offset_BT=position_BT,
        continued_B=torch.zeros(shape.micro_batch_size, dtype=torch.long),
    ).to(device)


def selected_gradient(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses, mask and gradient of one selective step of the small model, from weights drawn on the CPU."""
    cpu = torch.device("cpu")
    plain = PlainBackend(World(0, 1, 0, cpu))
    student, reference = (make_model(SMALL, seed, plain, torch.float32, cpu).to(device, dtype) for seed in (1, 2))
    batch = make_batch(SMALL, device)
    loss_BT = score_batch(student, batch)["loss"]
    with torch.no_grad():
        excess_BT = loss_BT - score_batch(reference, batch)["loss"]
    choice = select_tokens(excess_BT, batch.valid_BT, RATIO)
    (loss_BT * choice.weights).sum().div(choice.num_selected).backward()
    gradient = torch.cat([p.grad.flatten().float() for _, p in sorted(student.named_parameters())])
    found = {"loss": loss_BT.detach(), "excess": excess_BT, "mask": choice.mask, "gradient": gradient}
    return {name: value.cpu() for name, value in found.items()} | {"threshold": choice.threshold.cpu()}


def check_against_cpu(device: torch.device) -> dict[str, Any]:
    """float32 on the device gives the CPU's losses, masks and gradients; bf16 is reported, not judged."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = selected_gradient(torch.device("cpu"), torch.float32)
    report: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found = selected_gradient(device, dtype)
        differs = found["mask"] != expected["mask"]
        near = (expected["excess"] - expected["threshold"]).abs() <= 1e-5
        error = (found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
        report[name] = {
            "largest_loss_difference": float((found["loss"] - expected["loss"]).abs().max()),
            "masks_flipped": int((differs & ~near).sum()),
            "masks_flipped_within_1e-5": int((differs & near).sum()),
            "relative_gradient_difference": float(error),
        }
    fp32 = report["fp32"]
    close = fp32["largest_loss_difference"] < 1e-4 and fp32["relative_gradient_difference"] < 1e-4
    return report | {"ok": close and fp32["masks_flipped"] == 0}


def gradient_of(way: str, device: torch.device, dtype: torch.dtype, mask_BT: torch.Tensor) -> torch.Tensor:
    """The small model's gradient of the masked loss, from weights drawn on the CPU."""
    cpu = torch.device("cpu")
    plain = PlainBackend(World(0, 1, 0, cpu))
    module = make_model(SMALL, 1, plain, torch.float32, cpu).to(device, dtype)
    training = TrainingSettings(global_batch_size=SMALL.micro_batch_size, train_tokens=1)
    settings = EngineSettings(SMALL.micro_batch_size, 1, 1.0, dtype)
    world = World(0, 1, 0, device)
    engine = PlainBackend(world).training_engine(module, adamw(module, training, device), settings)
    student = make_learner(way, module, engine, SMALL.seq_length)
    _, tape = student.score(make_batch(SMALL, device), (), keep=True)
    student.backward(tape, {"loss": mask_BT.float().to(device)}, 1 / int(mask_BT.sum()), last=True)
    return torch.cat([p.grad.flatten().float().cpu() for _, p in sorted(module.named_parameters())])


def check_selected_backward(device: torch.device) -> dict[str, Any]:
    """float32 on the device gives the CPU's gradient in every way; bf16 is reported, not judged."""
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.rand(SMALL.micro_batch_size, SMALL.seq_length, generator=generator) < RATIO
    mask_BT[1] = False
    report: dict[str, Any] = {}
    for way in ("exact", "rows", "replay"):
        expected = gradient_of(way, torch.device("cpu"), torch.float32, mask_BT)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            found = gradient_of(way, device, dtype, mask_BT)
            report[f"{way} {name}"] = float((found - expected).norm() / expected.norm())
    right = all(report[f"{way} fp32"] < 1e-3 for way in ("exact", "rows", "replay"))
    return {"relative_gradient_difference": report, "ok": right}


@dataclass
class Job:
    """A step and its engine, ready to be run."""

    step: TrainingStep
    objective: Objective
    engine: TrainingEngine
    module: CausalLM


def make_job(shape: Shape, selective: bool, world: World) -> Job:
    """The step as a run has it: ZeRO-3 student, and a sharded live reference of the same shape."""
    from megatron_slm.backend.deepspeed import DeepSpeedBackend

    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    backend = DeepSpeedBackend(world, {"zero_optimization": {"stage": 3}}, dtype)
    module = make_model(shape, 1, backend, dtype, world.device)
    training = TrainingSettings(global_batch_size=shape.micro_batch_size, train_tokens=1)
    settings = EngineSettings(shape.micro_batch_size, 1, 1.0, dtype)
    engine = backend.training_engine(module, adamw(module, training, world.device), settings)
    if not selective:
        step = TrainingStep(engine, NoReference(), seed=1, num_sources=1, world=world)
        return Job(step, CausalLanguageModeling(), engine, module)
    # Built whole like one that is read from a folder; only the student is partitioned as it is built.
    reference = make_model(shape, 2, PlainBackend(world), dtype, world.device)
    live = LiveReference(backend.frozen_engine(reference, shard=True), 2 * shape.micro_batch_size)
    objective = SelectiveLanguageModeling(Rule(SelectionSettings()), RATIO, pools_whole_step=False)
    return Job(TrainingStep(engine, live, seed=1, num_sources=1, world=world), objective, engine, module)


def check_training_and_resume(world: World) -> dict[str, Any]:
    """Loss falls on a batch that is seen again; a run from a checkpoint repeats the run without one, bit by bit."""
    batch = make_batch(SMALL, world.device)
    whole = make_job(SMALL, selective=True, world=world)
    losses: list[float] = []

    def run(job: Job, first: int, last: int) -> None:
        for number in range(first, last):
            sums = job.step([batch], job.objective, 1e-3, number + 1).statistics.reduce()
            losses.append(sums["loss"] / sums["valid"])

    with tempfile.TemporaryDirectory() as folder:
        run(whole, 0, 4)
        whole.engine.save(Path(folder) / "checkpoint")
        run(whole, 4, 8)
        resumed = make_job(SMALL, selective=True, world=world)
        resumed.engine.load(Path(folder) / "checkpoint")
        run(resumed, 4, 8)
    bitwise = losses[4:8] == losses[8:]
    return {"losses": losses[:8], "resume_is_bitwise": bitwise, "ok": bitwise and losses[7] < losses[0]}


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_step(shape: Shape, selective: bool, world: World) -> dict[str, Any]:
    """Tokens/s, MFU of the student alone, and peak memory of whole optimizer steps."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    job = make_job(shape, selective, world)
    batches = iter([make_batch(shape, world.device, first) for first in range(shape.steps + 1)])
    seconds = timed(lambda: job.step([next(batches)], job.objective, 1e-4, 1), shape.steps, world.device)
    median = statistics.median(seconds)
    speed = shape.micro_batch_size * shape.seq_length / median
    flops = token_flops(job.module, hf_config(shape), shape.seq_length).training
    peak = peak_flops(world.device)
    return {
        "tokens_per_second": speed,
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "mfu": speed * flops / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if peak else None,
    }


class RepeatedBatch:
    """Work for `ModelSource`: one batch, so many times in one shard."""

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
    """Scoring a corpus as `megatron-slm score` does, against the model's own forward with its logits, in turn."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    module = make_model(shape, 2, PlainBackend(world), dtype, world.device).eval().requires_grad_(False)
    report = {}
    flops, peak = token_flops(module, hf_config(shape), shape.seq_length).forward, peak_flops(world.device)
    for factor in (1, 2, 4):
        larger = Shape(shape.model, shape.seq_length, factor * shape.micro_batch_size, shape.steps)
        batch = make_batch(larger, world.device)
        source = ModelSource(module, RepeatedBatch(batch, shape.steps), ["loss"], world)

        @torch.no_grad()
        def plain(batch: Batch = batch) -> None:
            for _ in range(shape.steps):
                module.lm(input_ids=batch.tokens_BT, position_ids=batch.position_ids_BT, use_cache=False)

        seconds: dict[str, list[float]] = {"scoring": [], "plain forward": []}
        for _ in range(3):
            seconds["scoring"] += timed(lambda s=source: s.values(0, lambda done: None), 1, world.device)
            seconds["plain forward"] += timed(plain, 1, world.device)
        report[f"{larger.micro_batch_size} sequences"] = {
            name: {
                "tokens_per_second": source.rows / statistics.median(found),
                "mfu": source.rows / statistics.median(found) * flops / peak if peak else None,
            }
            for name, found in seconds.items()
        }
    return report


def measure_threshold(shape: Shape, world: World) -> dict[str, Any]:
    """Selecting from as many scores as the step has, and from a million."""
    report = {}
    for count in (shape.micro_batch_size * shape.seq_length, 1_000_000):
        scores = torch.randn(count, device=world.device)
        valid = torch.ones(count, dtype=torch.bool, device=world.device)
        seconds = timed(lambda s=scores, v=valid: select_tokens(s, v, RATIO), 20, world.device)
        report[str(count)] = {"seconds": statistics.median(seconds)}
    return report


def measure_selected_steps(preset: str, device: torch.device) -> dict[str, Any]:
    """Forward and backward in each way and at each ratio, against a plain step; the shape's own micro-batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return bench_step.measure(bench_step.SHAPES[preset], device, list(bench_step.MODES), list(bench_step.RATIOS))


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    packages = ("torch", "deepspeed", "transformers", "megatron-core")
    versions = {package: version(package) for package in packages}
    return {"device": name, "python": platform.python_version(), "versions": versions, "command": sys.argv}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="tinyllama", help="shape whose speed is measured")
    parser.add_argument("--micro-batch-size", type=int, help="sequences at a time; default: the preset's")
    parser.add_argument("--output", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.preset]
    if arguments.micro_batch_size:
        shape = Shape(shape.model, shape.seq_length, arguments.micro_batch_size, shape.steps, shape.checkpointing)
    world = connect()
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "environment": lambda: environment(world.device),
        "against_cpu": lambda: check_against_cpu(world.device),
        "selected_backward": lambda: check_selected_backward(world.device),
        "training_and_resume": lambda: check_training_and_resume(world),
        "clm": lambda: measure_step(shape, False, world),
        "slm": lambda: measure_step(shape, True, world),
        "scoring": lambda: measure_scoring(shape, world),
        "threshold": lambda: measure_threshold(shape, world),
        "selected_steps": lambda: measure_selected_steps(STEP_PRESETS[arguments.preset], world.device),
    }
    report: dict[str, Any] = {"preset": arguments.preset, "micro_batch_size": shape.micro_batch_size}
    for name, section in sections.items():
        start = time.perf_counter()
        report[name] = section()
        sys.stdout.write(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(report[name], indent=1)}\n")
        sys.stdout.flush()
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    disconnect()
    sys.exit(0 if all(section.get("ok", True) for section in report.values() if isinstance(section, dict)) else 1)


if __name__ == "__main__":
    main()
