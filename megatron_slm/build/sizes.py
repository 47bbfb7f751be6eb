"""The sizes, FLOPs and memory that the models of a run need, from their configurations alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_slm.build.models import PRECISIONS
from megatron_slm.build.references import CheckedReference
from megatron_slm.config import Config
from megatron_slm.data.loader import accumulation_steps
from megatron_slm.dist import World
from megatron_slm.planning.memory import MemorySettings, RankMemory, rank_memory
from megatron_slm.training.cost import ModelFlops, ModelSize, StepTokens, model_size
from megatron_slm.training.state import Plan


@dataclass(frozen=True)
class RunSizes:
    """The sizes, FLOPs and memory of a run.

    Attributes:
        student: size of the student, for its micro-batch.
        references: each reference that is a model, with its size for its own batch.
        models: FLOPs per token of the models.
        tokens: tokens of one step at `selection.ratio`, over all ranks.
        micro_steps: micro-steps per optimizer step.
        memory: of one rank.
    """

    student: ModelSize
    references: list[tuple[CheckedReference, ModelSize]]
    models: ModelFlops
    tokens: StepTokens
    micro_steps: int
    memory: RankMemory

    @property
    def sharded(self) -> list[ModelSize]:
        """The sizes of the references that are sharded over the ranks."""
        return [size for reference, size in self.references if reference.settings.shard]


def run_sizes(
    config: Config, plan: Plan, student: PretrainedConfig, references: Sequence[CheckedReference], world: World
) -> RunSizes:
    """Return what a run needs.

    Args:
        config: with every default resolved.
        plan: length of the run.
        student: Hugging Face configuration of the student.
        references: checked.
        world: one of the ranks; its device may be absent.

    Raises:
        Exception: a third-party model does not run without memory.
    """
    training, precision, length = config.training, precision_of(config), config.data.seq_length
    micro_steps = accumulation_steps(plan.global_batch_size, training.micro_batch_size, world.data.size)
    size = model_size(student, training.micro_batch_size, length, precision)
    samples = plan.candidates * training.micro_batch_size * micro_steps  # of one rank in one step
    frozen = [
        (one, model_size(one.model, min(one.settings.micro_batch_size, samples), length, precision))
        for one in references
        if one.model is not None
    ]
    backward = config.selection.backward if config.objective == "slm" else "exact"
    return RunSizes(
        size,
        frozen,
        ModelFlops(size.flops, sum(other.flops.forward for _, other in frozen), backward),
        _step_tokens(config, plan, micro_steps),
        micro_steps,
        rank_memory(
            size,
            [(other, one.settings.shard) for one, other in frozen],
            MemorySettings(
                ranks=world.size,
                each=precision.itemsize,
                zero=zero_section(config),
                checkpointing=training.activation_checkpointing == "full",
                replayed=_replayed(config),
                on_cpu=world.device.type == "cpu",
            ),
        ),
    )


def precision_of(config: Config) -> torch.dtype:
    """Return the type of the weights in the forward pass."""
    return PRECISIONS[config.training.precision]


def zero_section(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's `zero_optimization` section; stage 0 stands for plain PyTorch."""
    if config.training.backend != "deepspeed":
        return {"stage": 0}
    section: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    return section


def _step_tokens(config: Config, plan: Plan, micro_steps: int) -> StepTokens:
    trained, read = plan.tokens_per_step, plan.samples_per_step * plan.seq_length
    if config.objective == "clm":
        return StepTokens(candidates=0, trained=trained, selected=None, reference=0)
    rule = config.selection
    return StepTokens(
        candidates=read if plan.candidates > 1 else 0,
        trained=trained,
        selected=round(rule.ratio * trained),
        reference=read,
        ranked_first=rule.pool == "step" and micro_steps > 1,
    )


def _replayed(config: Config) -> float | None:
    """Return the share of the tokens that replay runs again; None if some steps hold all activations."""
    rule = config.selection
    if config.objective == "clm" or rule.backward != "replay":
        return None
    return None if rule.start or rule.of or rule.schedule != "constant" else rule.ratio
