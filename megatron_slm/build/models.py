"""The models of a run: configured, loaded, checked, and given to the backend that holds their weights."""

import dataclasses
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megatron_slm.backend import Backend, EngineSettings, TrainingEngine
from megatron_slm.build.corpora import Corpora, require_tokenizer
from megatron_slm.config import Config
from megatron_slm.data.loader import accumulation_steps
from megatron_slm.data.tokenizer import vocabulary_size
from megatron_slm.dist import World, agree
from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import CausalLM, build_student, initialize_weights
from megatron_slm.models.checks import check_dropout, check_dropout_settings, check_head, check_length, check_packing
from megatron_slm.models.configuration import model_config
from megatron_slm.models.pretrained import load_pretrained, refuse_untied_files
from megatron_slm.models.router import check_own_losses, find_router_loss
from megatron_slm.models.settings import ModelSettings
from megatron_slm.models.sparse_backward.attention import open_attention, packed_attention, require_registered
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
from megatron_slm.reference.settings import PartSettings
from megatron_slm.training.cost import token_flops
from megatron_slm.training.optimizer import adamw

PRECISIONS: dict[str | None, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def student_config(config: Config, corpora: Corpora) -> PretrainedConfig:
    """Return the student's Hugging Face configuration, with the vocabulary of the corpora.

    Raises:
        UserError: its tokenizer differs from that of the corpora, its positions are too few, or it has dropout in a
            selective run.
    """
    tokenizer = corpora.tokenizer
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if config.model.path is not None:
        require_tokenizer(config.model.path, "model", corpora)
    hf_config = model_config(config.model, vocabulary_size(tokenizer), special_ids)
    check_student_settings(config, hf_config)
    return hf_config


def check_student_settings(config: Config, hf_config: PretrainedConfig) -> None:
    """Raise a UserError if a student has too few positions for the samples, or dropout in a selective run."""
    check_length(hf_config, "model", config.data.seq_length)
    if config.objective == "slm":
        check_dropout_settings(hf_config)


def refuse_unregistered_attention(config: Config) -> None:
    """Raise an error for an attention kernel that the sparse backward does not support.

    If no kernel is named, Hugging Face chooses one when the model is loaded, and it is checked then.
    """
    kernel = config.model.attn_implementation
    if config.objective == "slm" and config.selection.backward != "exact" and kernel is not None:
        require_registered(kernel, "the student")


def checked_student(config: Config, corpora: Corpora) -> PretrainedConfig:
    """Return `student_config`, after checking that weights which it ties do not differ in the model's files.

    Raises:
        UserError: as `student_config`, or tied weights differ in the files.
    """
    student = student_config(config, corpora)
    if config.model.path is not None:
        refuse_untied_files(student, config.model.path, config.model.trust_remote_code)
    return student


def make_backend(config: Config, world: World) -> Backend:
    """Build the backend that holds the weights of the run.

    DeepSpeed changes torch for the whole process, so it is imported only here.
    """
    if config.training.backend == "plain":
        from megatron_slm.backend.plain import PlainBackend

        return PlainBackend(world)
    from megatron_slm.backend.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(world, config.deepspeed, PRECISIONS[config.training.precision])


def make_student(
    config: Config, hf_config: PretrainedConfig, backend: Backend, world: World, *, weights: bool = True
) -> tuple[CausalLM, TrainingEngine]:
    """Build the student and its training engine; every rank calls it.

    Args:
        config: of the run.
        hf_config: the student's.
        backend: holds the student.
        world: this rank.
        weights: False to build a student with a `model.path` from `hf_config` alone, with random weights.

    Raises:
        UserError: the student has dropout in a selective run, or its losses are not those that training expects.
    """
    training = config.training
    lm = starting_model(config, hf_config, backend, world, weights=weights)
    if config.objective == "slm":
        check_dropout(lm)
    lm.config.use_cache = False
    if training.activation_checkpointing == "full":
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    module = CausalLM(lm, router=find_router_loss(lm))
    accumulation = accumulation_steps(training.global_batch_size, training.micro_batch_size, world.data.size)
    settings = EngineSettings(
        training.micro_batch_size, accumulation, training.clip_grad, PRECISIONS[training.precision]
    )
    engine = backend.training_engine(module, adamw(module, training, world.device), settings)
    _check_losses(engine.module, lm, config.data.reset_attention)
    check_own_losses(lm, module.router)
    return module, engine


def starting_model(
    config: Config, hf_config: PretrainedConfig, backend: Backend, world: World, *, weights: bool = True
) -> PreTrainedModel:
    """Return the student with the weights that a run starts from; every rank calls it.

    Args: as for `make_student`.

    Raises:
        AgreedError: the model cannot be loaded or built.
    """
    if config.model.path is None or not weights:
        return _from_configuration(config, config.model, hf_config, backend, world.device)
    # Read whole into host memory, then partitioned one parameter at a time. Reading under ZeRO-3 needs as much memory
    # in total, and more on rank 0 (tools/bench_load_memory.py).
    precision = PRECISIONS[config.training.precision]
    return agree(lambda: build_student(config.model, hf_config, precision, world.device))


def make_learner(backward: str, module: CausalLM, engine: TrainingEngine, seq_length: int) -> Student:
    """Build the student with the methods that a step calls, `score` and `backward`; every rank calls it.

    Args:
        backward: `selection.backward`; `exact` for a run without selection.
        module, engine: as `make_student` returns them.
        seq_length: tokens per sample.

    Raises:
        UserError: the model does not support this backward.
    """
    if backward == "exact":
        return ExactStudent(engine, {"router": module.router.coefficient} if module.router else {})
    if module.router is not None:
        reason = "the student has a router loss (output_router_logits), which needs the backward of all tokens"
        remedy = "Set selection.backward=exact, or model.config.output_router_logits=false"
        raise UserError("selection.backward", backward, reason, remedy)
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


def _from_configuration(
    config: Config, settings: ModelSettings, hf_config: PretrainedConfig, backend: Backend | None, device: torch.device
) -> PreTrainedModel:
    """Return a model with random weights, partitioned while it is built if there is a backend that partitions."""
    settings = dataclasses.replace(settings, path=None, config={"model_type": hf_config.model_type} | settings.config)
    precision = PRECISIONS[config.training.precision]
    if backend is None:
        lm = build_student(settings, hf_config, precision, device)
        initialize_weights(lm, config.seed, lambda _: nullcontext())
        return lm
    lm = backend.construct(lambda: build_student(settings, hf_config, precision, device))
    initialize_weights(lm, config.seed, backend.gathered)
    return lm


def frozen_model(
    config: Config, part: PartSettings, backend: Backend, unloaded: PretrainedConfig | None = None
) -> tuple[nn.Module, float]:
    """Load a reference model and return its engine and its forward FLOPs per token; every rank calls it.

    Args:
        config: of the run.
        part: settings of this reference.
        backend: holds the model.
        unloaded: build the model from this configuration with random weights, instead of loading it.

    Raises:
        AgreedError: the model cannot be loaded.
        UserError: it cannot score the samples of this run.
    """
    precision = PRECISIONS[config.training.precision]
    if unloaded is not None:
        settings = ModelSettings(part.path, trust_remote_code=part.trust_remote_code)
        # A replicated reference must not be partitioned while it is built, because nothing would gather its weights.
        partitioned_by = backend if part.shard else None
        lm = _from_configuration(config, settings, unloaded, partitioned_by, torch.device("cpu"))
    else:
        lm = agree(lambda: load_pretrained(str(part.path), "reference", part.trust_remote_code, dtype=precision))
    check_length(lm.config, "reference", config.data.seq_length)
    module = CausalLM(lm)
    flops = token_flops(module, lm.config, config.data.seq_length).forward
    engine = backend.frozen_engine(module, shard=part.shard)
    _check_losses(engine, lm, config.data.reset_attention)
    return engine, flops


def _check_losses(module: nn.Module, lm: PreTrainedModel, reset_attention: bool) -> None:
    """Raise a UserError if a model, as its engine runs it, does not compute the losses that training expects."""
    check_head(lm)
    if reset_attention:
        check_packing(module, lm)
