"""The report of `plan`: memory, time, money and disk of a run on a cluster that need not exist yet."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_slm.build.outline import Outline, outline
from megatron_slm.build.sizes import RunSizes, precision_of, run_sizes, zero_section
from megatron_slm.config import Config
from megatron_slm.devices import CPU, Device, find_device
from megatron_slm.dist import World
from megatron_slm.errors import UserError, first_line
from megatron_slm.planning.calibrate import measured_rates
from megatron_slm.planning.disk import (
    FAILURE_HOURS,
    Disk,
    checkpoint_bytes,
    disk_space,
    lost_share,
    optimal_interval,
)
from megatron_slm.planning.measure import resident_memory
from megatron_slm.planning.memory import RankMemory
from megatron_slm.planning.network import GIGA, Network
from megatron_slm.planning.time import Rates, StepTime, TimeSettings, assumed_rates, step_time
from megatron_slm.training.cost import step_flops

HOUR = 3600.0
CPU_LINK, CPU_NETWORK = 10e9, 10.0
"""Assumed for CPUs: bytes per second between the ranks of a host, and gigabits per second of its network."""


@dataclass(frozen=True)
class PlanOptions:
    """The options of `plan`.

    Attributes:
        ranks: number of ranks, one per device.
        device: name of the device.
        per_node: devices per node.
        mfu: MFU of a plain step.
        network: gigabits per second of each device's network adapter; None for the device's own.
        storage: gigabytes per second that each node writes to the file system.
        price: money per device and hour; None if unknown.
        failure_hours: mean hours between failures of the run; None for the rate that Llama 3's training had.
    """

    ranks: int
    device: str
    per_node: int = 8
    mfu: float = 0.4
    network: float | None = None
    storage: float = 1.0
    price: float | None = None
    failure_hours: float | None = None


@dataclass(frozen=True)
class Interval:
    """The checkpoint interval that loses the least time, and what is lost with it and with that of the run.

    Attributes:
        stall: seconds that a checkpoint stops the run.
        failure_hours: mean hours between failures of the run.
        steps: steps between checkpoints that lose the least.
        lost: share of the time that is lost with them.
        configured: `training.save_interval`.
        configured_lost: share of the time that is lost with it.
    """

    stall: float
    failure_hours: float
    steps: int
    lost: float
    configured: int
    configured_lost: float


@dataclass(frozen=True)
class PlanReport:
    """A plan.

    Attributes:
        run_dir, parameters, precision, stage: of the run.
        options: of the command.
        device: the device.
        memory: of one rank, with the libraries on a CPU.
        step: seconds of one step by part.
        steps: steps of the run.
        tokens_per_step, train_tokens: trained tokens.
        mfu: FLOPs of the models over those that the devices' peaks allow in a step; None on a CPU.
        disk: bytes on disk.
        interval: between checkpoints.
        loading: bytes of host memory per node while a pretrained model is loaded.
        assumptions: sentences.
    """

    run_dir: str
    parameters: int
    precision: str
    stage: int
    options: PlanOptions
    device: Device
    memory: RankMemory
    step: StepTime
    steps: int
    tokens_per_step: int
    mfu: float | None
    disk: Disk
    interval: Interval
    loading: int
    assumptions: list[str]

    @property
    def hours(self) -> float:
        """Hours of the whole run, without evaluations, starts and failures."""
        return self.steps * self.step.seconds / HOUR

    @property
    def device_hours(self) -> float:
        return self.hours * self.options.ranks

    @property
    def money(self) -> float | None:
        return None if self.options.price is None else self.options.price * self.device_hours

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step.seconds

    def values(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        totals = {
            "seconds_per_step": self.step.seconds,
            "tokens_per_second": self.tokens_per_second,
            "days": self.hours / 24,
            "device_hours": self.device_hours,
            "money": self.money,
            "peak_bytes": self.memory.peak,
        }
        return asdict(self) | totals


def plan_run(config: Config, options: PlanOptions) -> tuple[Outline, PlanReport]:
    """Return the outline and the plan of a run; nothing is loaded or written.

    Raises:
        UserError: the run has errors, or an input that the plan needs is unknown.
    """
    device = find_device(options.device)
    world = World(0, options.ranks, 0, torch.device("cpu" if device.name == CPU else "cuda"))
    run = outline(config, world)
    sizes = _sizes(run, world)
    rates = _rates(device, options, run)
    network = _network(device, options)
    nodes = -(-options.ranks // options.per_node)
    each = precision_of(run.config).itemsize
    stall = checkpoint_bytes(sizes.student, each) / (options.storage * GIGA * nodes)
    step = _step(run, sizes, rates, network, options, stall)
    flops = step_flops(sizes.models, sizes.tokens)
    report = PlanReport(
        run.config.run_dir,
        sizes.student.parameters,
        str(run.config.training.precision),
        int(zero_section(run.config).get("stage", 3)),
        options,
        device,
        _with_libraries(sizes.memory, on_cpu=device.name == CPU),
        step,
        run.plan.total_steps,
        run.plan.tokens_per_step,
        flops / (step.seconds * options.ranks * device.flops) if device.flops else None,
        _disk(run, sizes, each),
        _interval(run, step, stall, options),
        _loading(run, sizes, options, each),
        [*run.assumptions, *_assumptions(run, device, options, rates)],
    )
    return run, report


def _sizes(run: Outline, world: World) -> RunSizes:
    try:
        return run_sizes(run.config, run.plan, run.student, run.references, world)
    except Exception as error:  # some third-party models do not run without memory
        reason = f"the model cannot be sized without its weights ({type(error).__name__}: {first_line(error)})"
        raise UserError(
            "model", run.student.model_type, reason, "Use train --dry-run, which checks the rest"
        ) from error


def _rates(device: Device, options: PlanOptions, run: Outline) -> Rates:
    if device.name != CPU:
        return assumed_rates(device, options.mfu, run.config.training.activation_checkpointing == "full")
    student, data = run.student, run.config.data
    tokens = run.config.training.micro_batch_size * data.seq_length
    return measured_rates(
        tokens, student.hidden_size, _inner_size(student), student.num_attention_heads, data.seq_length
    )


def _inner_size(student: PretrainedConfig) -> int:
    names = ("intermediate_size", "ffn_dim", "n_inner")
    return int(
        next((getattr(student, name) for name in names if getattr(student, name, None)), 4 * student.hidden_size)
    )


def _network(device: Device, options: PlanOptions) -> Network:
    on_cpu = device.name == CPU
    gigabits = options.network or (CPU_NETWORK if on_cpu else device.network)
    link = CPU_LINK if on_cpu else device.link
    return Network(gpus_per_node=options.per_node, nvlink_gb=link / GIGA, network_gb=gigabits / 8)


def _step(
    run: Outline, sizes: RunSizes, rates: Rates, network: Network, options: PlanOptions, stall: float
) -> StepTime:
    config = run.config
    selects = config.objective == "slm"
    pools = 0 if not selects else 1 if config.selection.pool == "step" else sizes.micro_steps
    samples = run.plan.candidates * config.training.micro_batch_size * sizes.micro_steps
    batches = [-(-samples // one.settings.micro_batch_size) for one, _ in sizes.references]
    return step_time(
        sizes.models,
        sizes.tokens,
        sizes.student,
        sizes.sharded,
        rates,
        network,
        TimeSettings(
            ranks=options.ranks,
            micro_steps=sizes.micro_steps,
            micro_tokens=config.training.micro_batch_size * config.data.seq_length,
            pools=pools,
            each=precision_of(config).itemsize,
            zero=zero_section(config),
            checkpointing=config.training.activation_checkpointing == "full",
            reference_batches=max(batches, default=0),
            stall=stall,
            save_interval=config.training.save_interval,
        ),
    )


def expected_memory(run: Outline, world: World) -> RankMemory:
    """Return the memory of one rank on the device of `world`, for a rehearsal there; see `plan_run`."""
    return _with_libraries(_sizes(run, world).memory, on_cpu=world.device.type == "cpu")


def _with_libraries(memory: RankMemory, *, on_cpu: bool) -> RankMemory:
    """Add the resident set of this process, which has imported what training imports, on a CPU."""
    if not on_cpu:
        return memory
    libraries = {"libraries": resident_memory()}
    return RankMemory({phase: parts | libraries for phase, parts in memory.phases.items()}, memory.host)


def _disk(run: Outline, sizes: RunSizes, each: int) -> Disk:
    config = run.config
    read = run.plan.total_samples * config.data.seq_length
    corpora = read if run.corpora is None else sum(corpus.num_tokens for corpus in run.corpora.train)
    return disk_space(sizes.student, each, corpora, read, run.student.vocab_size, config.training.keep_checkpoints)


def _interval(run: Outline, step: StepTime, stall: float, options: PlanOptions) -> Interval:
    hours = options.failure_hours or FAILURE_HOURS / options.ranks
    seconds = step.seconds - step.exposed["checkpoint"]
    best = max(1, round(optimal_interval(stall, hours * HOUR) / seconds))
    configured = run.config.training.save_interval
    lost, configured_lost = (lost_share(n * seconds, stall, hours * HOUR) for n in (best, configured))
    return Interval(stall, hours, best, lost, configured, configured_lost)


def _loading(run: Outline, sizes: RunSizes, options: PlanOptions, each: int) -> int:
    """Return the host memory of a node while its ranks load a pretrained model, which each rank reads whole."""
    ranks = min(options.ranks, options.per_node)
    loaded = [size.parameters for _, size in sizes.references]
    if run.config.model.path is not None:
        loaded.append(sizes.student.parameters)
    return ranks * each * max(loaded, default=0)


def _assumptions(run: Outline, device: Device, options: PlanOptions, rates: Rates) -> list[str]:
    """Return a sentence for each figure that is neither a setting nor measured."""
    found = []
    if run.corpora is None:
        found.append("The corpora hold as many tokens as the run reads (training.train_tokens).")
    if device.name == CPU:
        found.append(
            f"Measured here: products {rates.products / GIGA:.0f} GFLOP/s, attention {rates.attention / GIGA:.0f} "
            f"GFLOP/s, copies {rates.memory / GIGA:.1f} GB/s, new memory "
            f"{(rates.fresh or 0) / GIGA:.1f} GB/s. Each rank has a machine of this speed."
        )
    else:
        found.append(
            f"{device.name}: {device.flops / 1e12:.0f} TFLOP/s in bf16, {device.memory / GIGA:.0f} GB, "
            f"{device.bandwidth / 1e12:.2f} TB/s, {device.link / GIGA:.0f} GB/s to its node ({device.source})."
        )
        found.append(
            f"A plain step has an MFU of {100 * options.mfu:.0f} % (--mfu); all products together reach "
            f"{100 * rates.products / device.flops:.0f} % of the peak."
        )
        found.append("The memory leaves out the CUDA context, the buffers of NCCL, and fragmentation.")
    if options.ranks > options.per_node:
        gigabits = _network(device, options).network_gb * 8
        found.append(f"The network has {gigabits:.0f} Gb/s per device (--network), and links reach their bandwidth.")
    found.append(f"Each node writes {options.storage:g} GB/s to the file system (--storage).")
    if options.failure_hours is None:
        found.append(
            f"A failure every {FAILURE_HOURS:,.0f} device-hours, as in the training of Llama 3 (arXiv 2407.21783, "
            "3.3.4; --mtbf)."
        )
    found.append("Evaluations, the start, and repeated work after failures take no time.")
    return found
