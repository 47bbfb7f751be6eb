"""Checks that a device agrees with the CPU, and that a run on it resumes bit for bit.

Only float32 can fail a check. bf16 is reported, because its differences from float32 depend on the model.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.backend import EngineSettings, TrainingEngine
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.build.models import make_learner
from megatron_slm.device_check.shapes import SMALL, Shape, default_dtype, make_batch, make_model, plain_engine
from megatron_slm.dist import World
from megatron_slm.models.causal_lm import CausalLM, score_batch
from megatron_slm.reference.references import LiveReference, NoReference
from megatron_slm.selection import Rule, SelectionSettings, select_tokens
from megatron_slm.training.objective import CausalLanguageModeling, Objective, SelectiveLanguageModeling
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.settings import TrainingSettings
from megatron_slm.training.step import TrainingStep

RATIO = 0.6
BACKWARDS = ("exact", "rows", "replay")
_CPU = torch.device("cpu")
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Devices sum matrix products in different orders, so float32 losses and gradients differ by a few units in the last
# place per layer.
_LARGEST_LOSS_DIFFERENCE = 1e-4
_LARGEST_GRADIENT_DIFFERENCE = 1e-4
_LARGEST_SPARSE_GRADIENT_DIFFERENCE = 1e-3
_NEAR_THRESHOLD = 1e-5  # nats; within this distance, round-off can move a score across the threshold


def check_against_cpu(device: torch.device) -> dict[str, Any]:
    """Compare the losses, the mask and the gradient of a selective step with the CPU's in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = _selective_step(_CPU, torch.float32)
    near = (expected["excess"] - expected["threshold"]).abs() <= _NEAR_THRESHOLD
    report: dict[str, Any] = {}
    for name, dtype in _PRECISIONS.items():
        found = _selective_step(device, dtype)
        differs = found["mask"] != expected["mask"]
        report[name] = {
            "largest_loss_difference": float((found["loss"] - expected["loss"]).abs().max()),
            "masks_flipped": int((differs & ~near).sum()),
            "masks_flipped_within_1e-5": int((differs & near).sum()),
            "relative_gradient_difference": _relative_difference(found["gradient"], expected["gradient"]),
        }
    fp32 = report["fp32"]
    losses_agree = fp32["largest_loss_difference"] < _LARGEST_LOSS_DIFFERENCE
    gradients_agree = fp32["relative_gradient_difference"] < _LARGEST_GRADIENT_DIFFERENCE
    return report | {"ok": losses_agree and gradients_agree and fp32["masks_flipped"] == 0}


def check_selected_backward(device: torch.device) -> dict[str, Any]:
    """Compare the gradient of each kind of backward with the CPU's in float32."""
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.rand(SMALL.micro_batch_size, SMALL.seq_length, generator=generator) < RATIO
    mask_BT[1] = False  # a sequence without a selected token
    report: dict[str, float] = {}
    for backward in BACKWARDS:
        expected = _masked_gradient(backward, _CPU, torch.float32, mask_BT)
        for name, dtype in _PRECISIONS.items():
            found = _masked_gradient(backward, device, dtype, mask_BT)
            report[f"{backward} {name}"] = _relative_difference(found, expected)
    right = all(report[f"{backward} fp32"] < _LARGEST_SPARSE_GRADIENT_DIFFERENCE for backward in BACKWARDS)
    return {"relative_gradient_difference": report, "ok": right}


def check_training_and_resume(world: World) -> dict[str, Any]:
    """Check that the loss falls on a repeated batch, and that a resumed run repeats the uninterrupted one bitwise."""
    batch = make_batch(SMALL, world.device)
    whole = prepare_step(SMALL, selective=True, world=world)
    losses: list[float] = []

    def run(prepared: PreparedStep, first: int, last: int) -> None:
        for number in range(first, last):
            sums = prepared.step([batch], prepared.objective, 1e-3, number + 1).statistics.sums
            losses.append(sums["loss"] / sums["valid"])

    with tempfile.TemporaryDirectory() as folder:
        run(whole, 0, 4)
        whole.engine.save(Path(folder) / "checkpoint")
        run(whole, 4, 8)
        resumed = prepare_step(SMALL, selective=True, world=world)
        resumed.engine.load(Path(folder) / "checkpoint")
        run(resumed, 4, 8)
    bitwise = losses[4:8] == losses[8:]
    return {"losses": losses[:8], "resume_is_bitwise": bitwise, "ok": bitwise and losses[7] < losses[0]}


@dataclass
class PreparedStep:
    """A training step with its engine, ready to run."""

    step: TrainingStep
    objective: Objective
    engine: TrainingEngine
    module: CausalLM


def prepare_step(shape: Shape, selective: bool, world: World) -> PreparedStep:
    """Build a step as in a run: a ZeRO-3 student, and a sharded live reference of the same shape if selective."""
    from megatron_slm.backend.deepspeed import DeepSpeedBackend

    dtype = default_dtype(world.device)
    backend = DeepSpeedBackend(world, {"zero_optimization": {"stage": 3}}, dtype)
    module = make_model(shape, 1, backend, dtype, world.device)
    training = TrainingSettings(global_batch_size=shape.micro_batch_size, train_tokens=1)
    settings = EngineSettings(shape.micro_batch_size, 1, 1.0, dtype)
    engine = backend.training_engine(module, adamw(module, training, world.device), settings)
    if not selective:
        step = TrainingStep(engine, NoReference(), seed=1, num_sources=1, world=world)
        return PreparedStep(step, CausalLanguageModeling(), engine, module)
    # As in a run, only the student is partitioned while it is built; the reference is sharded afterwards.
    reference = make_model(shape, 2, PlainBackend(world), dtype, world.device)
    live = LiveReference(backend.frozen_engine(reference, shard=True), 2 * shape.micro_batch_size)
    objective = SelectiveLanguageModeling(Rule(SelectionSettings()), RATIO, pools_whole_step=False)
    return PreparedStep(TrainingStep(engine, live, seed=1, num_sources=1, world=world), objective, engine, module)


def _selective_step(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return losses, excess losses, mask, threshold and gradient of one step, from weights drawn on the CPU."""
    plain = PlainBackend(World(0, 1, 0, _CPU))
    student, reference = (make_model(SMALL, seed, plain, torch.float32, _CPU).to(device, dtype) for seed in (1, 2))
    batch = make_batch(SMALL, device)
    loss_BT = score_batch(student, batch)["loss"]
    with torch.no_grad():
        excess_BT = loss_BT - score_batch(reference, batch)["loss"]
    selection = select_tokens(excess_BT, batch.valid_BT, RATIO)
    torch.autograd.backward((loss_BT * selection.weights).sum() / selection.num_selected)
    found = {
        "loss": loss_BT.detach(),
        "excess": excess_BT,
        "mask": selection.mask,
        "threshold": selection.threshold,
        "gradient": _flat_gradient(student),
    }
    return {name: value.cpu() for name, value in found.items()}


def _masked_gradient(backward: str, device: torch.device, dtype: torch.dtype, mask_BT: Tensor) -> Tensor:
    """Return the gradient of the mean loss of the masked tokens, from weights drawn on the CPU."""
    module = make_model(SMALL, 1, PlainBackend(World(0, 1, 0, _CPU)), torch.float32, _CPU).to(device, dtype)
    student = make_learner(backward, module, plain_engine(module, SMALL, dtype, device), SMALL.seq_length)
    _, tape = student.score(make_batch(SMALL, device), (), keep=True)
    student.backward(tape, {"loss": mask_BT.float().to(device)}, 1 / int(mask_BT.sum()), last=True)
    return _flat_gradient(module)


def _flat_gradient(module: CausalLM) -> Tensor:
    gradients = [parameter.grad for _, parameter in sorted(module.named_parameters())]
    return torch.cat([gradient.flatten().float().cpu() for gradient in gradients if gradient is not None])


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
