"""Student and reference, and where their weights live."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megatron_slm.backend import Backend, EngineSettings, TrainingEngine
from megatron_slm.build.corpora import Corpora, require_tokenizer
from megatron_slm.build.stores import Order, open_reference_store
from megatron_slm.config import Config
from megatron_slm.data.loader import accumulation_steps
from megatron_slm.data.tokenizer import vocabulary_size
from megatron_slm.dist import World, agree, gather_objects
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.models.causal_lm import (
    CausalLM,
    build_student,
    initialize_weights,
    load_pretrained,
)
from megatron_slm.models.checks import check_dropout, check_dropout_settings, check_head, check_length, check_packing
from megatron_slm.models.configuration import model_config
from megatron_slm.models.router import check_own_losses, find_router_loss
from megatron_slm.models.sparse_backward.attention import open_attention, packed_attention
from megatron_slm.models.sparse_backward.checks import (
    check_attention,
    check_opening,
    check_plain,
    check_replay,
    packed_for_rows,
    sequence_losses,
)
from megatron_slm.models.sparse_backward.replay import ReplayStudent
from megatron_slm.models.sparse_backward.rows import RowStudent
from megatron_slm.models.student import ExactStudent, Student
from megatron_slm.reference.references import LiveReference, MixedReference, NoReference, Reference
from megatron_slm.reference.settings import PartSettings, ReferenceSettings
from megatron_slm.reference.store import open_store
from megatron_slm.selection.rule import Rule, ratio_at
from megatron_slm.selection.scores import find_score
from megatron_slm.signals import SIGNALS
from megatron_slm.training.cost import token_flops
from megatron_slm.training.objective import CausalLanguageModeling, Objective, SelectiveLanguageModeling
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.state import Plan
from megatron_slm.training.step import Candidates

logger = logging.getLogger(__name__)

PRECISIONS: dict[str | None, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def student_config(config: Config, corpora: Corpora) -> PretrainedConfig:
    """The student's Hugging Face configuration, with the corpora's vocabulary and without dropout under SLM."""
    tokenizer = corpora.tokenizer
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special_ids = {name: getattr(tokenizer, name) for name in names}
    if config.model.path is not None:
        require_tokenizer(config.model.path, "model", corpora)
    hf_config = model_config(config.model, vocabulary_size(tokenizer), special_ids)
    check_length(hf_config, "model", config.data.seq_length)
    if config.objective == "slm":
        check_dropout_settings(hf_config)
    return hf_config


def make_backend(config: Config, world: World) -> Backend:
    """Where the run's weights live. DeepSpeed changes torch for the whole process, so it is imported on demand."""
    if config.training.backend == "plain":
        from megatron_slm.backend.plain import PlainBackend

        return PlainBackend(world)
    from megatron_slm.backend.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(world, config.deepspeed, PRECISIONS[config.training.precision])


def make_student(
    config: Config, hf_config: PretrainedConfig, backend: Backend, world: World
) -> tuple[CausalLM, TrainingEngine]:
    """The student's module and its engine."""
    training = config.training
    precision = PRECISIONS[training.precision]
    if config.model.path is None:
        lm = backend.construct(lambda: build_student(config.model, hf_config, precision, world.device))
        initialize_weights(lm, config.seed, backend.gathered)
    else:
        # Read whole to host memory and partitioned one parameter at a time: reading
        # under ZeRO-3 needs as much in sum, and more on rank 0 (tools/bench_load_memory.py).
        lm = agree(lambda: build_student(config.model, hf_config, precision, world.device))
    if config.objective == "slm":
        check_dropout(lm)
    lm.config.use_cache = False
    if training.activation_checkpointing == "full":
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    module = CausalLM(lm, router=find_router_loss(lm))
    accumulation = accumulation_steps(training.global_batch_size, training.micro_batch_size, world.size)
    settings = EngineSettings(training.micro_batch_size, accumulation, training.clip_grad, precision)
    engine = backend.training_engine(module, adamw(module, training, world.device), settings)
    _check_answers(config, engine.module, lm)
    check_own_losses(lm, module.router)
    return module, engine


def make_learner(backward: str, module: CausalLM, engine: TrainingEngine, seq_length: int) -> Student[Any]:
    """The way in which steps score and run the backward; every rank calls it.

    Args:
        backward: `selection.backward`; exact for a run that selects nothing.
        module, engine: as `make_student` returns them.
        seq_length: tokens a sample.

    Raises:
        UserError: rows or replay are not right for this model.
    """
    if backward == "exact":
        return ExactStudent(engine, module.router.coefficient if module.router else 0.0)
    if module.router is not None:
        raise UserError(
            f"selection.backward is {backward}, but the student has a router loss of all tokens "
            "(output_router_logits), which needs the backward of all: set selection.backward=exact, or "
            "model.config.output_router_logits=false."
        )
    lm = module.lm
    before_BT = sequence_losses(engine.module, lm, seq_length, {})
    agree(lambda: open_attention(lm))
    check_opening(lm, before_BT, sequence_losses(engine.module, lm, seq_length, {}))
    check_attention(engine.module, lm)
    if backward == "rows":
        return RowStudent(engine, lm.base_model, packed_for_rows(engine.module, lm, seq_length))
    packed = packed_attention(next(lm.parameters()).device)
    check_plain(engine.module, lm, packed, seq_length)
    student = ReplayStudent(engine, packed)
    check_replay(student, lm)
    return student


def make_reference(
    config: Config, corpora: Corpora, backend: Backend, order: Order, needs: tuple[str, ...], world: World
) -> tuple[Reference, float]:
    """Where reference signals come from, and the FLOPs a token of the models among them.

    Args:
        config, corpora, backend: of the run.
        order: of its samples.
        needs: signals that the objective reads.
        world: this process among all.
    """
    settings = config.reference
    if settings is None or config.objective == "clm":
        return NoReference(), 0.0
    references: list[Reference] = []
    flops = 0.0
    for part in settings.parts:
        if part.store is not None:
            references.append(agree(partial(open_reference_store, part.store, config, corpora, order, needs, world)))
        else:
            engine, forward_flops = frozen_model(config, part, corpora, backend)
            references.append(LiveReference(engine, part.micro_batch_size))
            flops += forward_flops
    if not settings.of:
        return references[0], flops
    return MixedReference(references, [part.weight for part in settings.of], settings.mix), flops


@contextmanager
def open_scorer(config: Config, corpora: Corpora, backend: Backend) -> Iterator[Reference | None]:
    """Yield the model that wrote the run's only store, if its folder is known and here; every rank calls it.

    It is freed at the end.
    """
    parts = config.reference.parts if config.reference is not None else []
    path = None
    if len(parts) == 1 and parts[0].store is not None:
        path = open_store(parts[0].store).manifest.reference.get("path")
    if not gather_objects(path is not None and Path(path).is_dir())[0]:
        yield None
        return
    part = replace(parts[0], path=path, store=None)
    try:
        engine, _ = frozen_model(config, part, corpora, backend)
    except AgreedError as error:
        logger.info("the model that wrote the store cannot be compared with it: %s", error)
        yield None
        return
    try:
        yield LiveReference(engine, part.micro_batch_size)
    finally:
        backend.release(engine)


def frozen_model(config: Config, part: PartSettings, corpora: Corpora, backend: Backend) -> tuple[nn.Module, float]:
    """A reference model as its engine runs it, and its forward FLOPs a token; every rank calls it."""
    path = str(part.path)
    agree(lambda: require_tokenizer(path, "reference", corpora))
    lm = agree(
        lambda: load_pretrained(path, "reference", part.trust_remote_code, dtype=PRECISIONS[config.training.precision])
    )
    check_length(lm.config, "reference", config.data.seq_length)
    module = CausalLM(lm)
    flops = token_flops(module, lm.config, config.data.seq_length).forward
    engine = backend.frozen_engine(module, shard=part.shard)
    _check_answers(config, engine, lm)
    return engine, flops


def _check_answers(config: Config, module: nn.Module, lm: PreTrainedModel) -> None:
    """Ask a model, as its engine runs it, whether its losses are what the step takes them for."""
    check_head(lm)
    if config.data.reset_attention:
        check_packing(module, lm)


def make_rule(config: Config, world: World) -> Rule | None:
    """The rule of selection, None under CLM; the batch can be dealt, and there is what the rule needs.

    Raises:
        UserError: a batch that cannot be dealt, a score that is not there, or one that needs what is not there.
    """
    accumulation_steps(config.training.global_batch_size, config.training.micro_batch_size, world.size)
    if config.objective == "clm":
        return None
    settings = config.selection
    combined = [(f"selection.of[{index}].score", part.score) for index, part in enumerate(settings.of)]
    for setting, name in combined or [("selection.score", settings.score)]:
        _check_score(setting, name, config.reference is not None)
    rule = Rule(settings)
    _check_mix(config.reference, rule)
    return rule


def make_candidates(config: Config, rule: Rule | None, engine: TrainingEngine, min_context: int) -> Candidates | None:
    """What chooses among candidates, by the student's own scores; None where all samples are trained on."""
    if rule is None or config.candidates == 1:
        return None
    samples = config.training.micro_batch_size
    return Candidates(LiveReference(engine.module, samples), rule, samples, config.seed, min_context)


def objective_at(config: Config, plan: Plan, rule: Rule | None, min_context: int, tokens: int) -> Objective:
    """Return the objective of the step that begins after `tokens`; a function of them, so that all ranks agree."""
    ratio = None if rule is None else ratio_at(config.selection, tokens, plan.total_steps * plan.tokens_per_step)
    if rule is None or ratio is None:
        return CausalLanguageModeling()
    return SelectiveLanguageModeling(rule, ratio, config.selection.pool == "step", min_context)


def _check_mix(settings: ReferenceSettings | None, rule: Rule) -> None:
    if settings is not None and settings.of and settings.mix != "mean" and "reference.entropy" in rule.needs:
        raise UserError(
            f"reference.mix is {settings.mix}, which mixes losses, and selection.score needs reference.entropy: use "
            "reference.mix=mean, or one reference."
        )


def _check_score(setting: str, name: str, has_reference: bool) -> None:
    try:
        score = find_score(name)
    except ValueError as error:
        raise UserError(str(error).replace("selection.score", setting, 1)) from error
    unknown = [signal for signal in score.needs if signal not in SIGNALS]
    if unknown:
        raise UserError(
            f"{setting} is '{name}', which needs '{unknown[0]}', a signal that does not exist: "
            f"name one of {', '.join(SIGNALS)} in its @score(needs=(...))."
        )
    if not has_reference and any(signal.startswith("reference.") for signal in score.needs):
        raise UserError(
            f"{setting} is '{name}', which needs a reference model: set reference.path to a Hugging Face folder, "
            "or use a score that needs none (student_loss, student_entropy, random), or objective=clm."
        )
