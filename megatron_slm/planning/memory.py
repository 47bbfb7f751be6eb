"""The peak memory of a rank by part, phase by phase of an optimizer step.

The formulas follow DeepSpeed 0.19.8 (`runtime/zero/stage3.py`, `partitioned_param_coordinator.py`). docs/benchmarks.md
compares them with measured peaks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.training.cost import ModelSize

LIVE_PARAMETERS, REDUCE_BUCKET, SUB_GROUP = 1_000_000_000, 500_000_000, 1_000_000_000
PREFETCH_BUCKET, PERSISTENCE = 50_000_000, 100_000
"""DeepSpeed's defaults of stage3_max_live_parameters, reduce_bucket_size, sub_group_size, stage3_prefetch_bucket_size
and stage3_param_persistence_threshold, in parameters."""

OFFLOADS = {"offload_optimizer": ("optimizer", "gradients"), "offload_param": ("weights",)}
"""The keys of `zero_optimization` that offload, each with the parts that it moves to the host."""

MASTER_AND_MOMENTS = 12
"""Bytes per parameter of DeepSpeed's float32 copy of the weights and of AdamW's two moments."""
REDUCED = 4
"""Bytes per gradient that is reduced: `communication_data_type` is float32."""


@dataclass(frozen=True)
class MemorySettings:
    """The settings of a run that its memory depends on.

    ranks          number of ranks
    each           bytes per weight in the forward pass
    zero           DeepSpeed's `zero_optimization` section
    checkpointing  True if the backward recomputes each layer
    replayed       share of the tokens that replay runs again, over keys and values of all; None without replay
    on_cpu         True on a CPU, whose optimizer makes temporary tensors, and which does not hold memory that it has
                   allocated and not written
    """

    ranks: int
    each: int
    zero: Mapping[str, Any]
    checkpointing: bool
    replayed: float | None = None
    on_cpu: bool = False

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 3))

    def limit(self, key: str, default: int) -> int:
        """Return a limit of DeepSpeed, in parameters."""
        return int(self.zero.get(key, default))

    def share(self, numbers: int, from_stage: int) -> int:
        """Return a rank's share of some numbers, which are partitioned from a stage on."""
        return -(-numbers // self.ranks) if self.stage >= from_stage else numbers

    def is_offloaded(self, key: str) -> bool:
        return bool((self.zero.get(key) or {}).get("device", "none") != "none")


@dataclass(frozen=True)
class RankMemory:
    """The bytes of one rank.

    phases  by phase of a step, and then by part, on the device
    host    by part, what DeepSpeed offloads to the host
    """

    phases: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def device(self) -> dict[str, int]:
        """The parts at the peak."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        return sum(self.device.values())


def rank_memory(
    student: ModelSize, references: Sequence[tuple[ModelSize, bool]], settings: MemorySettings
) -> RankMemory:
    """Return the memory of one rank in each phase of a step.

    Args:
        student: size of the student, for its micro-batch.
        references: size of each reference model, for its own batch, and whether it is sharded.
        settings: of the run.
    """
    held = _held(student, references, settings)
    phases: dict[str, dict[str, int]] = {}
    if references:
        phases["reference"] = held | {
            "gathered weights": max((_gathered(size, settings) for size, shard in references if shard), default=0),
            "activations": max(size.layer_bytes for size, _ in references),
            "head": max(size.head_bytes for size, _ in references),
        }
    phases["forward, backward"] = held | _backward_begins(student, settings)
    if settings.stage:
        phases["reduction"] = held | _reduction(student, settings)
    phases["update"] = held | _update(student, settings)
    moved = [name for key, names in OFFLOADS.items() if settings.is_offloaded(key) for name in names]
    on_device = {
        phase: {name: size for name, size in parts.items() if size and name not in moved}
        for phase, parts in phases.items()
    }
    return RankMemory(on_device, {name: held[name] for name in moved})


def _held(student: ModelSize, references: Sequence[tuple[ModelSize, bool]], settings: MemorySettings) -> dict[str, int]:
    """Return what a rank holds during the whole step."""
    number, each, stage = student.parameters, settings.each, settings.stage
    bucket = settings.limit("reduce_bucket_size", REDUCE_BUCKET)
    frozen = 0
    for size, shard in references:
        frozen += each * (-(-size.parameters // settings.ranks) if shard else size.parameters)
        frozen += each * _persistent(size, settings) if shard else 0
    return {
        "weights": each * settings.share(number, 3) + (each * _persistent(student, settings) if stage == 3 else 0),
        "gradients": 4 * settings.share(number, 2),
        # Without ZeRO, there is no float32 copy beside the weights.
        "optimizer": MASTER_AND_MOMENTS * settings.share(number, 1) if stage else 8 * number,
        "reference": frozen,
        # At stage 3, DeepSpeed allocates the whole bucket, however small the model is.
        "buffers": (REDUCED * (min(bucket, number) if settings.on_cpu else bucket) if stage == 3 else 0),
    }


def _persistent(size: ModelSize, settings: MemorySettings) -> int:
    """Return the number of parameters that stay whole on every rank at stage 3, beside the shares of them."""
    if settings.ranks == 1:
        return 0
    limit = settings.limit("stage3_param_persistence_threshold", PERSISTENCE)
    return sum(number for number in size.numels if number <= limit)


def _gathered(size: ModelSize, settings: MemorySettings, left: float = 1.0) -> int:
    """Return the bytes of the weights that are whole at the same time, while a share of the model is left to run.

    Every module gathers a further bucket of `stage3_prefetch_bucket_size` ahead, with more weights than its own. From
    the second step on, what is gathered thus grows to `stage3_max_live_parameters`, and exceeds it by one weight.
    """
    if settings.ranks == 1 or settings.stage < 3:
        return 0
    live = settings.limit("stage3_max_live_parameters", LIVE_PARAMETERS)
    partitioned = int(left * (size.parameters - _persistent(size, settings)))
    return settings.each * min(partitioned, live + size.largest)


def _kept_per_layer(student: ModelSize, settings: MemorySettings) -> int:
    kept = student.boundary_bytes if settings.checkpointing else student.layer_bytes
    return kept if settings.replayed is None else int(settings.replayed * kept) + student.cache_bytes


def _backward_begins(student: ModelSize, settings: MemorySettings) -> dict[str, int]:
    """Return what is added where the backward begins: all activations, and the work of the head or the last layer."""
    head = student.head_bytes + settings.each * student.head  # the gradient of its weight, before it is reduced
    layer = student.layer_bytes  # recomputed, or the gradients of what the layer keeps
    return {
        "gathered weights": _gathered(student, settings),
        "activations": student.layers * _kept_per_layer(student, settings) + max(0, layer - head),
        "head": head,
    }


def _reduction(student: ModelSize, settings: MemorySettings) -> dict[str, int]:
    """Return what is added where the first full bucket of gradients is reduced, in the middle of the backward."""
    bucket = min(student.parameters, settings.limit("reduce_bucket_size", REDUCE_BUCKET))
    # The backward has passed as many parameters as are in the bucket, and freed their layers.
    left = 1 - bucket / student.parameters
    layers = int(left * student.layers * _kept_per_layer(student, settings))
    parts = {
        "gathered weights": _gathered(student, settings, left),
        "activations": layers + (student.layer_bytes if left else 0),
    }
    if settings.ranks > 1:
        # The bucket is copied in the order of the ranks. The next gradient is there, but not in the bucket.
        parts["reduction"] = REDUCED * (bucket + student.largest)
    if settings.stage < 3:
        parts["reduction"] = parts.get("reduction", 0) + REDUCED * bucket
    return parts


def _update(student: ModelSize, settings: MemorySettings) -> dict[str, int]:
    """Return what is added in the update: a flat gradient per sub-group, and the temporary tensors of AdamW."""
    if not settings.stage:
        return {}
    # Weights with and without decay are groups of their own.
    largest = max(student.decayed, student.parameters - student.decayed)
    group = min(settings.share(largest, 1), settings.limit("sub_group_size", SUB_GROUP))
    flat = REDUCED * group if settings.stage == 3 else 0
    # Without a fused kernel, AdamW makes two float32 tensors as large as what it updates.
    return {"update": flat + (8 * group if settings.on_cpu else 0)}
