"""What can be said of a run before it starts: everything is looked at, nothing is loaded or written."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from megatron_slm.backend import refuse_other_ranks
from megatron_slm.build.corpora import Corpora, kept_in_words, open_run_corpora, require_tokenizer
from megatron_slm.build.models import PRECISIONS, make_rule, student_config
from megatron_slm.build.plan import resolve, schedule_changes
from megatron_slm.build.stores import Order, open_reference_store, student_as_reference
from megatron_slm.config import Config
from megatron_slm.data.loader import accumulation_steps, position_after
from megatron_slm.data.samples import check_order, order_fingerprint, tokens_per_epoch
from megatron_slm.data.tokenizer import vocabulary_size
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.models.checks import check_length, refuse_untied_files
from megatron_slm.models.configuration import pretrained_config
from megatron_slm.models.sparse_backward.attention import require_registered
from megatron_slm.reference.settings import PartSettings
from megatron_slm.reference.store import open_store
from megatron_slm.run_folder import RunFolder
from megatron_slm.selection.rule import Rule
from megatron_slm.selection.settings import rule_in_words
from megatron_slm.training.callbacks import quantity
from megatron_slm.training.checkpoints import (
    list_checkpoints,
    refuse_missing_checkpoint,
    saved_ranks,
    saved_steps,
    step_of,
)
from megatron_slm.training.cost import (
    ModelFlops,
    ModelSize,
    RankMemory,
    StepTokens,
    model_size,
    rank_memory,
    step_flops,
)
from megatron_slm.training.state import Plan
from megatron_slm.training.trainer import make_callback

T = TypeVar("T")


@dataclass
class Findings:
    """Lines of the report, and every mistake that was met."""

    lines: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    def take(self, look: Callable[[], T]) -> T | None:
        """What `look` finds; a mistake is noted, and what needs this answer is not looked at."""
        try:
            return look()
        except UserError as error:
            if str(error) not in self.mistakes:
                self.mistakes.append(str(error))
            return None

    def say(self, subject: str, text: str) -> None:
        self.lines.append(f"{subject:10} {text}")


def dry_run(config: Config, ranks: int, rollback: int | None = None) -> str:
    """The report on a run of so many ranks, which goes back to the checkpoint of step `rollback` if one is given.

    Raises:
        UserError: with all mistakes that were found, a sentence each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, found = World(0, ranks, 0, device), Findings()
    folder = RunFolder(config.run_dir, world)
    config = found.take(lambda: folder.compare(config)) or config
    found.say("run", f"{config.run_dir}, {'goes on where it stands' if folder.has_begun else 'new'}")
    if rollback is not None:
        found.take(lambda: refuse_missing_checkpoint(folder.checkpoints, rollback))
    found.take(lambda: _refuse_other_ranks(config, folder, ranks, rollback))
    found.take(lambda: _refuse_other_weights("model", config.model.path))
    found.take(lambda: _refuse_unregistered_attention(config))
    for part in config.reference.parts if config.reference else []:
        found.take(partial(_refuse_other_weights, "reference", part.path))
    for name in config.callbacks:
        found.take(partial(make_callback, name))
    corpora = found.take(lambda: open_run_corpora(config))
    found.take(lambda: make_rule(config, world))
    if warning := found.take(lambda: student_as_reference(config)):
        found.say("", f"WARNING: {warning}")
    if corpora is not None:
        _look_at_models(config, corpora, world, found)
    if found.mistakes:
        raise UserError("\n".join(found.mistakes))
    found.lines.append("Nothing is wrong that shows before training.")
    return "\n".join(found.lines) + "\n"


def _look_at_models(config: Config, corpora: Corpora, world: World, found: Findings) -> None:
    """Everything that depends on the corpora."""
    _say_data(config, corpora, found)
    resolved = found.take(lambda: resolve(config, corpora, world))
    hf_config = found.take(lambda: student_config(config, corpora))
    path, trust = config.model.path, config.model.trust_remote_code
    if hf_config is not None and path is not None:
        found.take(lambda: refuse_untied_files(hf_config, path, trust))
    references = found.take(lambda: _live_references(config, corpora))
    if resolved is not None:
        total_samples = resolved[1].total_steps * resolved[1].samples_per_step
        found.take(lambda: check_order(config.data, corpora.train, total_samples))
    if found.mistakes or resolved is None or hf_config is None or references is None:
        return
    config, plan = resolved
    _say_plan(config, plan, corpora, world, found)
    found.take(lambda: _say_moved_schedules(resolved, corpora, world, found))
    found.take(lambda: _look_at_stores(config, corpora, plan, world, found))
    if config.objective == "slm":
        found.say("selection", rule_in_words(config.selection))
    try:
        _say_sizes(config, plan, hf_config, references, world, found)
    except Exception as error:  # models are foreign code, and not all of it runs without memory
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        found.say("memory", f"neither it nor cost nor disk can be estimated for this model ({reason})")


def _say_moved_schedules(now: tuple[Config, Plan], corpora: Corpora, world: World, found: Findings) -> None:
    folder = RunFolder(now[0].run_dir, world)
    stored, steps = folder.stored(), saved_steps(folder.checkpoints)
    if stored is not None and steps:
        for sentence in schedule_changes(resolve(stored, corpora, world), now, steps[-1]):
            found.say("", f"WARNING: {sentence}")


def _say_sizes(
    config: Config,
    plan: Plan,
    hf_config: PretrainedConfig,
    references: list[tuple[PartSettings, PretrainedConfig]],
    world: World,
    found: Findings,
) -> None:
    """Models, cost, memory and disk."""
    precision = PRECISIONS[config.training.precision]
    length = config.data.seq_length
    size = model_size(hf_config, config.training.micro_batch_size, length, precision)
    found.say("student", _model_in_words(hf_config, size, f"from {config.model.path or 'scratch'}"))
    frozen = [(model_size(hf, part.micro_batch_size, length, precision), part.shard) for part, hf in references]
    for (part, reference), (reference_size, sharded) in zip(references, frozen, strict=True):
        place = "split over the ranks" if sharded else "whole on each rank"
        found.say("reference", _model_in_words(reference, reference_size, f"from {part.path}, {place}"))
    _say_cost(config, plan, ModelFlops(size.flops, sum(other.flops.forward for other, _ in frozen)), world, found)
    memory = rank_memory(
        size,
        frozen,
        ranks=world.size,
        precision=precision,
        zero=config.deepspeed.get("zero_optimization", {}) if config.training.backend == "deepspeed" else {"stage": 0},
        checkpointing=config.training.activation_checkpointing == "full",
        replayed=_replayed(config),
        fused=world.device.type == "cuda",
    )
    _say_memory(memory, world, found)
    _say_disk(config, size, precision, found)


def _say_cost(config: Config, plan: Plan, models: ModelFlops, world: World, found: Findings) -> None:
    """Of a step at `selection.ratio`, as the run's records will count it, and against a plain one."""
    trained, read = plan.tokens_per_step, plan.samples_per_step * plan.seq_length
    plain = models.student.training * trained
    flops = plain
    if config.objective == "slm":
        rule = config.selection
        micro_steps = accumulation_steps(plan.global_batch_size, config.training.micro_batch_size, world.size)
        tokens = StepTokens(
            candidates=read if plan.candidates > 1 else 0,
            trained=trained,
            selected=round(rule.ratio * trained),
            reference=read,
            ranked_first=rule.pool == "step" and micro_steps > 1,
        )
        flops = step_flops(replace(models, backward=rule.backward), tokens)
    whole = plan.total_steps * flops
    found.say("cost", f"{flops:.2g} FLOPs a step, {flops / plain:.2f} of a plain one; {whole:.2g} in all")


def _replayed(config: Config) -> float | None:
    """The share of the tokens that replay runs again; None where all activations are held, if only in some steps."""
    rule = config.selection
    if config.objective == "clm" or rule.backward != "replay":
        return None
    return None if rule.start or rule.of or rule.schedule != "constant" else rule.ratio


def _live_references(config: Config, corpora: Corpora) -> list[tuple[PartSettings, PretrainedConfig]]:
    """The reference models that will run along."""
    if config.reference is None or config.objective == "clm":
        return []
    live = [part for part in config.reference.parts if part.path is not None]
    return [(part, _reference_config(config, part, corpora)) for part in live]


def _look_at_stores(config: Config, corpora: Corpora, plan: Plan, world: World, found: Findings) -> None:
    """Open every store that will be read, and say whose scores it holds."""
    data, settings = config.data, config.reference
    fingerprint = order_fingerprint(data, corpora.train, config.seed, data.order_tokens or 0, corpora.kept)
    end = position_after(data.skip_samples, 0, plan.total_steps * plan.samples_per_step)
    for part in settings.parts if settings is not None and config.objective == "slm" else []:
        if part.store is not None:
            needs = Rule(config.selection).needs
            open_reference_store(part.store, config, corpora, Order(fingerprint, end), needs, world)
            found.say("reference", f"read from {part.store}, scores of {open_store(part.store).manifest.scorer}")


def _reference_config(config: Config, part: PartSettings, corpora: Corpora) -> PretrainedConfig:
    path = str(part.path)
    require_tokenizer(path, "reference", corpora)
    found = pretrained_config(path, "reference", part.trust_remote_code)
    check_length(found, "reference", config.data.seq_length)
    return found


def _refuse_other_ranks(config: Config, folder: RunFolder, ranks: int, rollback: int | None) -> None:
    """Loading the checkpoint would refuse them too, after the models are built."""
    saved = [path for path in list_checkpoints(folder.checkpoints) if rollback is None or step_of(path) == rollback]
    if not saved or config.training.backend == "plain":
        return
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 3)
    refuse_other_ranks(saved[-1], stage, saved_ranks(saved[-1]) or ranks, ranks)


def _refuse_other_weights(setting: str, path: str | None) -> None:
    """Loading would refuse them too, later."""
    if path and Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise UserError(f"{setting}.path is '{path}', which holds no *.safetensors: save the model as safetensors.")


def _refuse_unregistered_attention(config: Config) -> None:
    """That Hugging Face chooses without being told shows when the model is there."""
    kernel = config.model.attn_implementation
    if config.objective == "slm" and config.selection.backward != "exact" and kernel is not None:
        require_registered(kernel, "the student")


def _say_data(config: Config, corpora: Corpora, found: Findings) -> None:
    trained = ", ".join(f"{corpus.name} {quantity(corpus.num_tokens)}" for corpus in corpora.train)
    held_out = ", ".join(f"{name} {quantity(corpus.num_tokens)}" for name, corpus in corpora.valid.items()) or "none"
    entries = vocabulary_size(corpora.tokenizer)
    found.say("data", f"tokens: {trained}; held out: {held_out}; one tokenizer of {entries:,} entries")
    if corpora.kept is not None:
        found.say("keep", f"{config.data.keep}: {kept_in_words(corpora)}")


def _say_plan(config: Config, plan: Plan, corpora: Corpora, world: World, found: Findings) -> None:
    training = config.training
    micro_steps = accumulation_steps(plan.global_batch_size, training.micro_batch_size, world.size)
    read = plan.total_steps * plan.samples_per_step * plan.seq_length
    passes = read / tokens_per_epoch(config.data, corpora.train, corpora.kept)
    candidates = f", the best of {plan.samples_per_step} candidates" if plan.candidates > 1 else ""
    checkpointed = ", activations checkpointed" if training.activation_checkpointing == "full" else ""
    found.say(
        "plan",
        f"{plan.total_steps:,} steps of {quantity(plan.tokens_per_step)} tokens, {passes:.2g} passes over data.train, "
        f"{training.precision}",
    )
    found.say(
        "step",
        f"{plan.global_batch_size} samples = {world.size} ranks x {training.micro_batch_size} x {micro_steps} "
        f"micro-steps, {plan.seq_length} tokens each{candidates}{checkpointed}",
    )


def _model_in_words(config: PretrainedConfig, size: ModelSize, origin: str) -> str:
    return f"{config.model_type}, {quantity(size.parameters)} parameters, {size.layers} layers, {origin}"


def _say_memory(memory: RankMemory, world: World, found: Findings) -> None:
    on_cuda = world.device.type == "cuda"
    places = {" on the GPU": memory.device, " on the host": memory.host}
    for place, parts in (places if on_cuda else {"": memory.device | memory.host}).items():
        if parts:
            listed = ", ".join(f"{name} {_size(n)}" for name, n in sorted(parts.items(), key=lambda part: -part[1]))
            total = _size(sum(parts.values()))
            found.say("memory", f"about {total} per rank{place} ({listed}). Leave a third more for the libraries.")
    if on_cuda:
        found.say("", f"the GPU here has {_size(torch.cuda.get_device_properties(world.device).total_memory)}")


def _say_disk(config: Config, size: ModelSize, precision: torch.dtype, found: Findings) -> None:
    """Weights, float32 copy and two moments a checkpoint; one more is on the disk while it is written."""
    checkpoint = (12 + precision.itemsize) * size.parameters
    kept = config.training.keep_checkpoints + 1
    place = next(path for path in (Path(config.run_dir), *Path(config.run_dir).absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    found.say("disk", f"{kept} checkpoints of {_size(checkpoint)}; {_size(free)} are free")
    if free < kept * checkpoint:
        found.say("", "WARNING: too little room: lower training.keep_checkpoints, or put run_dir on another disk")


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
