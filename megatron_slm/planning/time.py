"""The time of an optimizer step by part, and of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slm.devices import Device
from megatron_slm.planning.memory import PREFETCH_BUCKET, REDUCE_BUCKET, REDUCED
from megatron_slm.planning.network import Network
from megatron_slm.selection.threshold import DIGIT_BITS, KEY_BITS
from megatron_slm.training.cost import ModelFlops, ModelSize, StepTokens, StudentTokens, student_tokens

ROUND_BYTES = 8 << DIGIT_BITS
"""Bytes of one round of a selection: an int64 count per digit."""
ROUNDS = -(-KEY_BITS // DIGIT_BITS)
SMALL_REDUCTIONS = 3
"""Further all-reduces per pool of a few bytes: the planned number of tokens, and the counts of the result, twice."""

FUSED_UPDATE_BYTES = 84
"""Bytes read and written per parameter in an update with a fused kernel.

The kernel reads four numbers and writes three (28); DeepSpeed 56: the flat gradient 8, its norm in float64 20, its
checks 8, clipping 8, zeroing 4, the copy of the weights 8.
"""
UPDATE_BYTES, UPDATE_FRESH_BYTES = 122, 12
"""The same without a fused kernel, and the bytes of them that are written to memory that was just allocated.

AdamW (torch/optim/adamw.py): decay 8, moments 12 and 20, denominator 16, step 16, and two new tensors. DeepSpeed: the
flat gradient 4 and a new tensor, its norm in float64 20, its checks 10, clipping 8, the copy of the weights 8.
"""
FORWARD_WRITES, SCORING_WRITES = 1.7, 1.25
"""Bytes that a forward with and without a gradient writes to new memory on a CPU, per byte that it would keep.

These two, and `GRADIENT_FRESH_BYTES` and `GRADIENT_BYTES` per parameter, were fitted on two cores to the steps of
models of 58M, 168M and 445M parameters. docs/benchmarks.md has the errors, also for sizes between them.
"""
GRADIENT_FRESH_BYTES, GRADIENT_BYTES = 12, 72


@dataclass(frozen=True)
class Rates:
    """The speed of one device as it is reached.

    products   FLOP/s of matrix products
    attention  FLOP/s of attention
    memory     bytes per second that are read or written
    fresh      bytes per second that are written to memory that was just allocated; None if `products` accounts for
               all that is not an update
    """

    products: float
    attention: float
    memory: float
    fresh: float | None = None


def assumed_rates(device: Device, mfu: float, checkpointing: bool) -> Rates:
    """Return the speed of a device that is not here, for an assumed MFU of a plain step.

    MFU does not count the layers that activation checkpointing runs again (PaLM, appendix B): the device then runs 4/3
    of the FLOPs that MFU counts. On H100s, MPT's 7B has an MFU of 40.4 % with checkpointing, which is 53.9 % of all
    FLOPs, and of 46.4 % without it, at half the length (mosaicml/llm-foundry, scripts/train/benchmarking/README.md).
    """
    reached = min(1.0, mfu * (4 / 3 if checkpointing else 1)) * device.flops
    return Rates(reached, reached, device.bandwidth)


@dataclass(frozen=True)
class TimeSettings:
    """The settings of a run that its speed depends on.

    ranks          number of ranks
    micro_steps    micro-steps per optimizer step
    micro_tokens   tokens per micro-batch
    pools          selections per optimizer step; 0 under CLM
    each           bytes per weight in the forward pass
    zero           DeepSpeed's `zero_optimization` section
    checkpointing  True if the backward recomputes each layer
    reference_batches  forwards of each reference per step
    stall          seconds that a checkpoint stops the run
    save_interval  steps between checkpoints
    """

    ranks: int
    micro_steps: int
    micro_tokens: int
    pools: int
    each: int
    zero: Mapping[str, Any]
    checkpointing: bool
    reference_batches: int
    stall: float
    save_interval: int

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 3))

    @property
    def overlaps(self) -> bool:
        """True if DeepSpeed communicates beside computing; it is its default at stage 3 alone."""
        overlap = self.zero.get("overlap_comm")
        return self.stage == 3 if overlap is None else bool(overlap)


@dataclass(frozen=True)
class StepTime:
    """The seconds of one optimizer step by part.

    compute        work of the device
    communication  gathers and reductions, which can run beside the compute
    exposed        what nothing runs beside
    overlaps       True if DeepSpeed runs the communication beside the compute
    """

    compute: dict[str, float]
    communication: dict[str, float]
    exposed: dict[str, float]
    overlaps: bool

    @property
    def apart(self) -> float:
        """The seconds of a step whose parts run one after another."""
        return sum(self.compute.values()) + sum(self.communication.values()) + sum(self.exposed.values())

    def with_store(self) -> "StepTime":
        """Return the time of a step that reads the losses of the reference from a store, in next to no time."""

        def rest(parts: dict[str, float]) -> dict[str, float]:
            return {name: seconds for name, seconds in parts.items() if not name.endswith("reference")}

        return StepTime(rest(self.compute), rest(self.communication), self.exposed, self.overlaps)

    @property
    def seconds(self) -> float:
        """The seconds of a step; with overlap, all communication hides behind the compute or the reverse."""
        if not self.overlaps:
            return self.apart
        beside = max(sum(self.compute.values()), sum(self.communication.values()))
        return beside + sum(self.exposed.values())


def step_time(
    models: ModelFlops,
    tokens: StepTokens,
    student: ModelSize,
    sharded: list[ModelSize],
    rates: Rates,
    network: Network,
    settings: TimeSettings,
) -> StepTime:
    """Return the time of one step.

    Args:
        models: FLOPs per token.
        tokens: of one step, over all ranks.
        student: its size.
        sharded: the sizes of the references that are gathered for each forward.
        rates: of one device.
        network: the links of the cluster.
        settings: of the run.
    """
    return StepTime(
        _compute(models, tokens, student, rates, settings),
        _communication(student, sharded, network, settings),
        {
            "selection": _selection(network, settings),
            "update": _update(student, rates, settings),
            "checkpoint": settings.stall / settings.save_interval,
        },
        settings.overlaps,
    )


def _compute(
    models: ModelFlops, tokens: StepTokens, student: ModelSize, rates: Rates, settings: TimeSettings
) -> dict[str, float]:
    """Return the seconds of the models' own work."""
    ran, flops = student_tokens(tokens, models.backward), models.student
    forwards, ranks = ran.scored + ran.forward, settings.ranks
    forward = (flops.weights / rates.products + flops.attention / rates.attention) / ranks
    backward = 2 * (flops.weights * ran.backward / rates.products + flops.attention * ran.attention / rates.attention)
    parts = {
        "student forward": forwards * forward,
        "student backward": backward / ranks,
        "layers run again": ran.forward * forward if settings.checkpointing else 0.0,
        "forward of the reference": models.reference * tokens.reference / rates.products / ranks,
    }
    if rates.fresh is not None:
        parts |= _pointwise(tokens, ran, student, rates.memory, rates.fresh, settings)
    return parts


def _pointwise(
    tokens: StepTokens, ran: StudentTokens, student: ModelSize, memory: float, fresh: float, settings: TimeSettings
) -> dict[str, float]:
    """Return the seconds of pointwise operators and copies, which take a CPU as long as a third of the products."""
    width = student.boundary_bytes // (settings.each * settings.micro_tokens)
    kept = student.layers * student.layer_bytes / settings.micro_tokens + 2 * 4 * student.head / width
    per_token = kept / fresh / settings.ranks
    gradients = student.parameters * (GRADIENT_FRESH_BYTES / fresh + GRADIENT_BYTES / memory)
    again = ran.forward if settings.checkpointing else 0
    return {
        "pointwise, scoring": SCORING_WRITES * per_token * ran.scored,
        "pointwise, reference": SCORING_WRITES * per_token * tokens.reference,
        "pointwise, forward": FORWARD_WRITES * per_token * (ran.forward + again),
        "pointwise, gradients": settings.micro_steps * gradients,
    }


def _communication(
    student: ModelSize, sharded: list[ModelSize], network: Network, settings: TimeSettings
) -> dict[str, float]:
    """Return the seconds of ZeRO's collectives of one step."""
    ranks, micro_steps, whole = settings.ranks, settings.micro_steps, settings.each * student.parameters
    gradients = REDUCED * student.parameters
    bucket = int(settings.zero.get("reduce_bucket_size", REDUCE_BUCKET))
    reduce = network.shard_or_gather(ranks, gradients, -(-student.parameters // bucket))
    if settings.stage == 3:
        ahead = max(1, int(settings.zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)))
        gather = network.shard_or_gather(ranks, whole, -(-student.parameters // ahead))
        parts = {"gathers for the student": 2 * micro_steps * gather, "reduce-scatter": micro_steps * reduce}
        for size in sharded:
            one = network.shard_or_gather(ranks, settings.each * size.parameters, -(-size.parameters // ahead))
            name = "gathers for the reference"
            parts[name] = parts.get(name, 0.0) + settings.reference_batches * one
        return parts
    # Stages 1 and 2 gather the updated weights once. An all-reduce is a reduce-scatter and an all-gather.
    gather = network.shard_or_gather(ranks, whole if settings.stage else gradients)
    times = micro_steps if settings.stage == 2 else 1
    return {"gathers for the student": gather, "reduce-scatter": times * reduce}


def _selection(network: Network, settings: TimeSettings) -> float:
    """Return the seconds of the all-reduces of all selections of a step, if no scores are equal at the threshold."""
    rounds = ROUNDS * network.all_reduce(settings.ranks, ROUND_BYTES, "tree")
    small = SMALL_REDUCTIONS * network.all_reduce(settings.ranks, 8, "tree")
    return settings.pools * (rounds + small)


def _update(student: ModelSize, rates: Rates, settings: TimeSettings) -> float:
    number = student.parameters / (settings.ranks if settings.stage else 1)
    if rates.fresh is None:
        return number * FUSED_UPDATE_BYTES / rates.memory
    return number * (UPDATE_BYTES / rates.memory + UPDATE_FRESH_BYTES / rates.fresh)
