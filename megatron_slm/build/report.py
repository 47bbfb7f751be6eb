"""The report of a dry run: what the first phase of a run resolved, and what the run will cost."""

import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_slm.build.corpora import Corpora, describe_kept
from megatron_slm.build.resolve import Resolved, resolve
from megatron_slm.build.sizes import RunSizes, precision_of, run_sizes
from megatron_slm.config import Config
from megatron_slm.data.loader import accumulation_steps
from megatron_slm.data.samples import tokens_per_epoch
from megatron_slm.data.tokenizer import vocabulary_size
from megatron_slm.dist import World
from megatron_slm.planning.disk import checkpoint_bytes
from megatron_slm.planning.memory import RankMemory
from megatron_slm.reporting.tables import quantity
from megatron_slm.run_directory import RunDirectory
from megatron_slm.selection.settings import rule_in_words
from megatron_slm.training.cost import ModelSize, step_flops
from megatron_slm.training.state import Plan


def dry_run(config: Config, ranks: int, rollback: int | None = None) -> str:
    """Return the report on a run of `ranks` ranks, without loading weights or writing files.

    `rollback` is the step of the checkpoint to resume from; None for the newest.

    Raises:
        UserError: all errors that were found, as one.
    """
    world = World(0, ranks, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    directory = RunDirectory(config.run_dir, world)
    resolved = resolve(config, directory, world, rollback)
    lines = [_line("run", f"{config.run_dir}, {'resumes' if directory.has_begun else 'new'}")]
    lines += [_line("", f"WARNING: {warning}") for warning in resolved.warnings]
    lines += _data_lines(resolved.config, resolved.corpora)
    lines += _plan_lines(resolved.config, resolved.plan, resolved.corpora, world)
    lines += [
        _line("reference", f"read from {one.store.path}, scores of {one.scorer}")
        for one in resolved.references
        if one.store is not None
    ]
    if config.objective == "slm":
        lines.append(_line("selection", rule_in_words(config.selection)))
    try:
        lines += _size_lines(resolved, world)
    except Exception as error:  # some third-party models do not run on the meta device
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        lines.append(_line("memory", f"memory, cost and disk cannot be estimated for this model ({reason})"))
    lines.append("No error was found.")
    return "\n".join(lines) + "\n"


def _line(subject: str, text: str) -> str:
    return f"{subject:10} {text}"


def _size_lines(resolved: Resolved, world: World) -> list[str]:
    """Return the models, cost, memory and disk."""
    config, plan = resolved.config, resolved.plan
    sizes = run_sizes(config, plan, resolved.student, resolved.references, world)
    origin = f"from {config.model.path or 'scratch'}"
    lines = [_line("student", _describe_model(resolved.student, sizes.student, origin))]
    for reference, size in sizes.references:
        place = "split over the ranks" if reference.settings.shard else "whole on each rank"
        origin = f"from {reference.settings.path}, {place}"
        assert reference.model is not None
        lines.append(_line("reference", _describe_model(reference.model, size, origin)))
    lines.append(_cost_line(plan, sizes))
    return [*lines, *_memory_lines(sizes.memory, world), *_disk_lines(config, sizes.student)]


def _cost_line(plan: Plan, sizes: RunSizes) -> str:
    """Return the cost of a step at `selection.ratio`, as the records of the run will count it, and of the whole run."""
    plain = sizes.models.student.training * plan.tokens_per_step
    flops = step_flops(sizes.models, sizes.tokens)
    whole = plan.total_steps * flops
    return _line("cost", f"{flops:.2g} FLOPs per step, {flops / plain:.2f} of a plain step; {whole:.2g} in all")


def _data_lines(config: Config, corpora: Corpora) -> list[str]:
    trained = ", ".join(f"{corpus.name} {quantity(corpus.num_tokens)}" for corpus in corpora.train)
    held_out = ", ".join(f"{name} {quantity(corpus.num_tokens)}" for name, corpus in corpora.valid.items()) or "none"
    entries = vocabulary_size(corpora.tokenizer)
    lines = [_line("data", f"tokens: {trained}; held out: {held_out}; one tokenizer of {entries:,} entries")]
    if corpora.kept is not None:
        lines.append(_line("keep", f"{config.data.keep}: {describe_kept(corpora)}"))
    return lines


def _plan_lines(config: Config, plan: Plan, corpora: Corpora, world: World) -> list[str]:
    training = config.training
    micro_steps = accumulation_steps(plan.global_batch_size, training.micro_batch_size, world.data.size)
    read = plan.total_samples * plan.seq_length
    passes = read / tokens_per_epoch(config.data, corpora.train, corpora.kept)
    candidates = f", the best of {plan.samples_per_step} candidates" if plan.candidates > 1 else ""
    checkpointed = ", activations checkpointed" if training.activation_checkpointing == "full" else ""
    return [
        _line(
            "plan",
            f"{plan.total_steps:,} steps of {quantity(plan.tokens_per_step)} tokens, {passes:.2g} passes over "
            f"data.train, {training.precision}",
        ),
        _line(
            "step",
            f"{plan.global_batch_size} samples = {world.size} ranks x {training.micro_batch_size} x {micro_steps} "
            f"micro-steps, {plan.seq_length} tokens each{candidates}{checkpointed}",
        ),
    ]


def _describe_model(config: PretrainedConfig, size: ModelSize, origin: str) -> str:
    return f"{config.model_type}, {quantity(size.parameters)} parameters, {size.layers} layers, {origin}"


def _memory_lines(memory: RankMemory, world: World) -> list[str]:
    lines = []
    on_cuda = world.device.type == "cuda"
    places = {" on the GPU": memory.device, " on the host": memory.host}
    for place, parts in (places if on_cuda else {"": memory.device | memory.host}).items():
        if parts:
            listed = ", ".join(f"{name} {_size(n)}" for name, n in sorted(parts.items(), key=lambda part: -part[1]))
            total = _size(sum(parts.values()))
            text = f"about {total} per rank{place} ({listed}). Leave a third more for the libraries."
            lines.append(_line("memory", text))
    if on_cuda:
        memory_here = torch.cuda.get_device_properties(world.device).total_memory
        lines.append(_line("", f"the GPU here has {_size(memory_here)}"))
    return lines


def _disk_lines(config: Config, size: ModelSize) -> list[str]:
    """Return the disk space that checkpoints take.

    While a checkpoint is written, the disk holds one more than `training.keep_checkpoints`.
    """
    checkpoint = checkpoint_bytes(size, precision_of(config).itemsize)
    kept = config.training.keep_checkpoints + 1
    place = next(path for path in (Path(config.run_dir), *Path(config.run_dir).absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    lines = [_line("disk", f"{kept} checkpoints of {_size(checkpoint)}; {_size(free)} are free")]
    if free < kept * checkpoint:
        text = "WARNING: too little disk space: lower training.keep_checkpoints, or put run_dir on another disk"
        lines.append(_line("", text))
    return lines


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
