"""The text of a plan and of a rehearsal."""

from megatron_slm.build.plan_report import HOUR, PlanReport
from megatron_slm.build.rehearsal import Rehearsal
from megatron_slm.devices import CPU
from megatron_slm.reporting.tables import aligned_table, quantity

GIB = 2**30


def plan_text(report: PlanReport) -> str:
    """Return the tables of a plan."""
    options = report.options
    nodes = -(-options.ranks // options.per_node)
    head = (
        f"{report.run_dir} on {options.ranks} x {report.device.name} ({nodes} node{'s' * (nodes > 1)}): "
        f"{quantity(report.parameters)} parameters, {report.precision}, ZeRO-{report.stage}"
    )
    parts = [head, _memory(report), _time(report), _run(report), _disk(report)]
    parts.append("\n".join(["Assumptions", *(f"  {sentence}" for sentence in report.assumptions)]))
    return "\n\n".join(parts) + "\n"


def rehearsal_text(rehearsal: Rehearsal, expected: int) -> str:
    """Return the tables of a rehearsal, beside the peak that was expected on its device, in bytes."""
    rows = [[name, f"{phase.seconds:.1f}", f"{phase.peak / GIB:.2f}"] for name, phase in rehearsal.phases.items()]
    verdict = "applied" if rehearsal.applied else "skipped, because a gradient was not finite"
    difference = expected / rehearsal.peak_of_step - 1
    lines = [
        f"Rehearsal of rank 0 of {rehearsal.ranks} on {rehearsal.device}",
        aligned_table(["phase", "seconds", "peak GiB"], rows),
        f"Peak of the step: {rehearsal.peak_of_step / GIB:.2f} GiB, of which {rehearsal.libraries / GIB:.2f} GiB were "
        f"in use before. The estimate for this device is {expected / GIB:.2f} GiB ({100 * difference:+.0f} %).",
        f"The step had {rehearsal.micro_steps} micro-steps and selected {rehearsal.selected:,} tokens of this rank; "
        f"the loss was {rehearsal.loss:.3f}, and the update was {verdict}.",
        "Faked",
        *(f"  {sentence}" for sentence in rehearsal.faked),
    ]
    return "\n".join(lines) + "\n"


def _memory(report: PlanReport) -> str:
    phases = report.memory.phases
    names = list(dict.fromkeys(name for parts in phases.values() for name in parts))
    rows = [[name, *(_gib(parts.get(name, 0)) for parts in phases.values())] for name in names]
    rows.append(["total", *(_gib(sum(parts.values())) for parts in phases.values())])
    table = aligned_table(["Memory per rank, GiB", *phases], rows)
    lines = [table, f"Peak: {_gib(report.memory.peak)} GiB in the phase {report.memory.peak_phase}"]
    if report.device.name != CPU:
        held = report.device.memory
        lines[-1] += f", of {held / GIB:.1f} GiB ({100 * report.memory.peak / held:.0f} %)"
        if report.memory.peak > held:
            lines.append(
                "WARNING: it does not fit. Use more ranks, training.activation_checkpointing=full, a smaller "
                "training.micro_batch_size, or offload (deepspeed.zero_optimization)."
            )
    if report.memory.host:
        offloaded = ", ".join(f"{name} {_gib(size)}" for name, size in report.memory.host.items())
        lines.append(f"On the host, GiB per rank: {offloaded}")
    if report.loading:
        lines.append(
            f"While a pretrained model is loaded, the host of a node holds up to {_gib(report.loading)} GiB of "
            "weights: each rank reads the whole model."
        )
    return "\n".join(lines)


def _time(report: PlanReport) -> str:
    step = report.step
    rows = [
        [f"{group}: {name}", f"{seconds:.4f}", f"{100 * seconds / step.seconds:.1f} %"]
        for group, parts in (
            ("compute", step.compute),
            ("communication", step.communication),
            ("exposed", step.exposed),
        )
        for name, seconds in parts.items()
        if seconds
    ]
    rows.append(["step", f"{step.seconds:.4f}", ""])
    beside = "the longer of compute and communication, and what is exposed" if step.overlaps else "the sum of all"
    lines = [
        aligned_table(["Time of a step, seconds", "", "share of the step"], rows),
        f"A step takes {beside}. Without any overlap it would take {step.apart:.4f} s.",
    ]
    if step.compute["forward of the reference"]:
        stored = step.with_store().seconds
        lines.append(
            f"With the losses of the reference in a store (megatron-slm score), a step would take {stored:.4f} s."
        )
    return "\n".join(lines)


def _run(report: PlanReport) -> str:
    interval = report.interval
    rows = [
        ["trained tokens", quantity(report.steps * report.tokens_per_step)],
        ["steps", f"{report.steps:,} of {quantity(report.tokens_per_step)} tokens"],
        ["tokens/s", f"{report.tokens_per_second:,.0f}"],
        ["tokens/s per device", f"{report.tokens_per_second / report.options.ranks:,.0f}"],
        *([["MFU with the reference", f"{100 * report.mfu:.1f} %"]] if report.mfu else []),
        ["days", f"{report.hours / 24:.2f}"],
        ["device-hours", f"{report.device_hours:,.0f}"],
        *([["money", f"{report.money:,.0f}"]] if report.money is not None else []),
        ["a checkpoint stops the run for", f"{interval.stall:.1f} s"],
        ["mean time between failures", f"{interval.failure_hours:.1f} hours"],
        ["best training.save_interval", _best_interval(report)],
        ["training.save_interval is", f"{interval.configured:,} steps; loses {100 * interval.configured_lost:.2f} %"],
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["The run", *(f"{name:{width}}  {value}" for name, value in rows)])


def _best_interval(report: PlanReport) -> str:
    interval = report.interval
    if interval.steps >= report.steps:
        return "longer than the run, whose last step is always saved"
    hours = interval.steps * report.step.seconds / HOUR
    return f"{interval.steps:,} steps ({hours:.2f} hours); loses {100 * interval.lost:.2f} % of the time"


def _disk(report: PlanReport) -> str:
    disk = report.disk
    rows = [
        ["tokens of the corpora", _gib(disk.tokens)],
        ["losses of all tokens read, in a store", _gib(disk.losses)],
        ["one checkpoint", _gib(disk.checkpoint)],
        ["training.keep_checkpoints, and the one being written", _gib(disk.checkpoints)],
    ]
    return aligned_table(["Disk, GiB", ""], rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
