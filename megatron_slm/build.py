"""The composition root: from a configuration to the objects of a run. Imported by commands only.

Read `build_run` from top to bottom: each line makes one part from those above it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megatron_slm.backend import Backend, EngineSettings, TrainingEngine
from megatron_slm.config import Config, dump_config
from megatron_slm.data.corpus import Corpus, corpus_tokenizer_path, open_corpus, unique_names
from megatron_slm.data.loader import StepLoader, accumulation_steps
from megatron_slm.data.samples import Samples, build_samples
from megatron_slm.data.settings import blend, train_share
from megatron_slm.data.stream import EvaluationStream
from megatron_slm.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_slm.dist import World, agree
from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import (
    CausalLM,
    build_student,
    initialize_weights,
    load_pretrained,
    model_config,
)
from megatron_slm.models.checks import check_dropout, check_dropout_settings, check_head, check_length, check_packing
from megatron_slm.run_folder import RunFolder
from megatron_slm.selection.scoring import find_score
from megatron_slm.signals.live import LiveReference, NoReference, Reference
from megatron_slm.training.callbacks.callback import Callback, make_callback
from megatron_slm.training.callbacks.checkpoint import Checkpoints
from megatron_slm.training.callbacks.console import Console
from megatron_slm.training.callbacks.evaluation import Evaluation
from megatron_slm.training.callbacks.histogram import ExcessHistogram
from megatron_slm.training.callbacks.jsonl import JsonLines
from megatron_slm.training.callbacks.metrics import StepMetrics
from megatron_slm.training.callbacks.profiler import Profiler
from megatron_slm.training.callbacks.reference_check import ReferenceCheck
from megatron_slm.training.callbacks.spikes import Spikes
from megatron_slm.training.callbacks.tensorboard import TensorBoard, open_event_files
from megatron_slm.training.callbacks.throughput import Throughput
from megatron_slm.training.callbacks.token_table import TokenTable
from megatron_slm.training.checkpoints import CheckpointStore
from megatron_slm.training.evaluate import Evaluator
from megatron_slm.training.flops import peak_flops, token_flops
from megatron_slm.training.objective import CausalLanguageModeling, Objective, SelectiveLanguageModeling
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.requests import Requests
from megatron_slm.training.rollback import refuse_missing_checkpoint, roll_back
from megatron_slm.training.schedule import learning_rate
from megatron_slm.training.state import Plan, RunState
from megatron_slm.training.step import TrainingStep
from megatron_slm.training.trainer import Trainer
from megatron_slm.types import SIGNALS

PRECISIONS: dict[str | None, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Corpora:
    """The training corpora in the order of the blend, the evaluation sets by name, and their one tokenizer."""

    train: list[Corpus]
    valid: dict[str, Corpus]
    fingerprint: str
    tokenizer: Any


@dataclass(frozen=True)
class Run:
    """What a command drives: `run.trainer.fit(run.state)`."""

    trainer: Trainer
    state: RunState
    folder: RunFolder


def build_run(config: Config, world: World, callbacks: Sequence[Callback] = (), rollback: int | None = None) -> Run:
    """Everything of a run, resumed where its folder stands; every rank calls it.

    Args:
        config: of the run.
        world: this process among all.
        callbacks: of the caller's own, beside those that the configuration names.
        rollback: step of the checkpoint to go on from; what came after it is moved aside.

    Raises:
        UserError: the same on all ranks, for anything that the user can mend.
    """
    folder = RunFolder(config.run_dir, world)
    config = agree(lambda: folder.settle(config))
    if rollback is not None:
        agree(lambda: refuse_missing_checkpoint(folder.checkpoints, rollback))
    corpora = agree(lambda: open_corpora(config))
    config, plan = agree(lambda: resolve(config, corpora, world))
    objective = agree(lambda: make_objective(config, world))
    hf_config = agree(lambda: student_config(config, corpora))
    samples = _samples(config, corpora, plan, folder, world)
    agree(lambda: folder.begin(config, samples.fingerprint))
    loader = StepLoader(
        samples,
        config.training.micro_batch_size,
        plan.global_batch_size,
        config.data.reset_attention,
        world,
        config.data.skip_samples,
    )
    backend = make_backend(config, world)
    student, engine = _student(config, hf_config, backend, world)
    reference, reference_flops = _reference(config, corpora, backend)
    step = TrainingStep(engine, reference, objective, seed=config.seed, num_sources=len(corpora.train), world=world)
    state = RunState(plan, samples.fingerprint)
    torch.manual_seed(config.seed + world.rank)
    store = CheckpointStore(folder.checkpoints, world, config.training.keep_checkpoints, dump_config(config))
    if rollback is not None:
        roll_back(folder.path, store, rollback, world)
    if (progress := store.restore(engine)) is not None:
        agree(lambda: state.restore(progress))
    samples.reach(loader.end(state.next_sample, max(0, plan.total_steps - state.step)))
    student_flops = token_flops(student, hf_config, config.data.seq_length).training
    peak = peak_flops(world.device)
    speed = Throughput(student_flops, reference_flops, peak and peak * world.size)
    own = [*callbacks, *agree(lambda: [make_callback(name) for name in config.callbacks])]
    callbacks = _callbacks(config, corpora, folder, engine, reference, speed, store, own, world, state.step)
    rate = partial(_learning_rate, config, plan)
    trainer = Trainer(loader, step, rate, callbacks, config.training.max_skipped_updates, Requests())
    return Run(trainer, state, folder)


def open_corpora(config: Config) -> Corpora:
    """All corpora of the run, which must share a tokenizer."""
    prefixes, _ = blend(config.data.train)
    train = [open_corpus(prefix) for prefix in prefixes]
    valid = {name: open_corpus(prefix) for name, prefix in config.data.valid.items()}
    for corpus in (*train, *valid.values()):
        if corpus.tokenizer_fingerprint != train[0].tokenizer_fingerprint:
            raise UserError(
                f"The corpora {train[0].prefix} and {corpus.prefix} were prepared with different tokenizers: "
                "prepare one of them again with the other's PREFIX.tokenizer."
            )
    tokenizer = load_tokenizer(str(corpus_tokenizer_path(train[0])))
    return Corpora(train, valid, train[0].tokenizer_fingerprint, tokenizer)


def resolve(config: Config, corpora: Corpora, world: World) -> tuple[Config, Plan]:
    """The configuration with its defaults as values, and the plan in steps.

    Raises:
        UserError: a precision that the backend cannot train in.
    """
    training, data = config.training, config.data
    epoch_tokens = train_share(data.split) * sum(corpus.num_tokens for corpus in corpora.train)
    tokens = training.train_tokens or math.ceil((training.train_epochs or 0.0) * epoch_tokens)
    tokens_per_step = training.global_batch_size * data.seq_length
    steps = math.ceil(tokens / tokens_per_step)
    # Whole steps, so that a run of the planned length stays within one cycle of the order.
    data = dataclasses.replace(data, order_tokens=data.order_tokens or steps * tokens_per_step)
    plan = Plan(
        steps,
        training.global_batch_size,
        data.seq_length,
        training.log_interval,
        training.eval_interval,
        training.save_interval,
    )
    precision = training.precision or ("bf16" if world.device.type == "cuda" else "fp32")
    training = dataclasses.replace(training, precision=precision)
    config = dataclasses.replace(config, data=data, training=training)
    _refuse_bf16_alone(config)
    return config, plan


def _refuse_bf16_alone(config: Config) -> None:
    """bf16 trains with float32 weights and gradients beside it, which only a partitioned optimizer keeps."""
    if config.training.precision != "bf16":
        return
    if config.training.backend == "plain":
        raise UserError("training.precision is bf16, which training.backend plain has not: use deepspeed or fp32.")
    if config.deepspeed.get("zero_optimization", {}).get("stage", 3) == 0:
        raise UserError(
            "training.precision is bf16 and deepspeed.zero_optimization.stage 0, where DeepSpeed cannot accumulate "
            "gradients in float32: use stage 1 or more, or training.precision=fp32."
        )


def make_objective(config: Config, world: World) -> Objective:
    """Which tokens count, after checking that the batch can be dealt and that there is what the score needs."""
    accumulation_steps(config.training.global_batch_size, config.training.micro_batch_size, world.size)
    if config.objective == "clm":
        return CausalLanguageModeling()
    settings = config.selection
    try:
        score = find_score(settings.score)
    except ValueError as error:
        raise UserError(str(error)) from error
    unknown = [name for name in score.needs if name not in SIGNALS]
    if unknown:
        raise UserError(
            f"selection.score is '{settings.score}', which needs '{unknown[0]}', a signal that does not exist: "
            f"name one of {', '.join(SIGNALS)} in its @score(needs=(...))."
        )
    if config.reference is None and any(name.startswith("reference.") for name in score.needs):
        raise UserError(
            f"selection.score is '{settings.score}', which needs a reference model: set reference.path to a "
            "Hugging Face folder, or use selection.score=student_loss, selection.score=random, or objective=clm."
        )
    return SelectiveLanguageModeling(score, settings.ratio, settings.scope, settings.pool == "step")


def student_config(config: Config, corpora: Corpora) -> PretrainedConfig:
    """The student's Hugging Face configuration, with the corpora's vocabulary and without dropout under SLM."""
    tokenizer = corpora.tokenizer
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special_ids = {name: getattr(tokenizer, name) for name in names}
    if config.model.path is not None:
        require_tokenizer(config.model.path, "model", corpora.fingerprint)
    hf_config = model_config(config.model, len(tokenizer), special_ids)
    check_length(hf_config, "model", config.data.seq_length)
    if config.objective == "slm":
        check_dropout_settings(hf_config)
    return hf_config


def require_tokenizer(path: str, setting: str, fingerprint: str) -> None:
    """Losses of two models compare token by token only if their tokens are the same."""
    try:
        found = tokenizer_fingerprint(load_tokenizer(path))
    except UserError as error:
        raise UserError(f"{setting}.path is '{path}', which has no tokenizer that can be read: {error}") from error
    if found != fingerprint:
        raise UserError(
            f"{setting}.path is '{path}', whose tokenizer is not that of data.train: "
            "prepare the corpora with this tokenizer, or use a model that has the corpora's."
        )


def _samples(config: Config, corpora: Corpora, plan: Plan, folder: RunFolder, world: World) -> Samples:
    return build_samples(
        config.data,
        corpora.train,
        seed=config.seed,
        order_tokens=config.data.order_tokens or 0,
        total_samples=plan.total_steps * plan.global_batch_size,
        cache=agree(lambda: _cache_folder(config, folder)),
        world=world,
    )


def _cache_folder(config: Config, folder: RunFolder) -> Path:
    path = Path(config.data.cache) if config.data.cache else folder.cache
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache is {path}, which is no folder that can be written: name another.") from error
    return path


def make_backend(config: Config, world: World) -> Backend:
    """Where the run's weights live. DeepSpeed changes torch for the whole process, so it is imported on demand."""
    if config.training.backend == "plain":
        from megatron_slm.backend.plain import PlainBackend

        return PlainBackend(world)
    from megatron_slm.backend.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(world, config.deepspeed, PRECISIONS[config.training.precision])


def _student(
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
    module = CausalLM(lm)
    accumulation = accumulation_steps(training.global_batch_size, training.micro_batch_size, world.size)
    settings = EngineSettings(training.micro_batch_size, accumulation, training.clip_grad, precision)
    engine = backend.training_engine(module, adamw(module, training, world.device), settings)
    _check_answers(config, engine.module, lm)
    return module, engine


def _reference(config: Config, corpora: Corpora, backend: Backend) -> tuple[Reference, float]:
    """Where reference signals come from, and their FLOPs a token."""
    settings = config.reference
    if settings is None or config.objective == "clm":
        return NoReference(), 0.0
    agree(lambda: require_tokenizer(settings.path, "reference", corpora.fingerprint))
    lm = agree(
        lambda: load_pretrained(
            settings.path, "reference", settings.trust_remote_code, dtype=PRECISIONS[config.training.precision]
        )
    )
    check_length(lm.config, "reference", config.data.seq_length)
    module = CausalLM(lm)
    flops = token_flops(module, lm.config, config.data.seq_length).forward
    engine = backend.frozen_engine(module, shard=settings.shard)
    _check_answers(config, engine, lm)
    return LiveReference(engine, settings.micro_batch_size), flops


def _check_answers(config: Config, module: nn.Module, lm: PreTrainedModel) -> None:
    """Ask a model, as its engine runs it, whether its losses are what the step takes them for."""
    check_head(lm)
    if config.data.reset_attention:
        check_packing(module, lm)


def _callbacks(
    config: Config,
    corpora: Corpora,
    folder: RunFolder,
    engine: TrainingEngine,
    reference: Reference,
    speed: Throughput,
    store: CheckpointStore,
    own: Sequence[Callback],
    world: World,
    step: int,
) -> list[Callback]:
    """In the order in which they fill, read and save a step's record; the user's own fill it last."""
    eod, data = corpora.tokenizer.eos_token_id, config.data
    streams = {
        name: EvaluationStream(corpus, data.seq_length, eod, data.reset_attention)
        for name, corpus in corpora.valid.items()
    }
    sources = unique_names([corpus.prefix for corpus in corpora.train])
    evaluator = Evaluator(engine.module, streams, config.training.micro_batch_size, world)
    events = agree(lambda: open_event_files(folder.tensorboard, step) if world.is_main else None)
    sigma = config.training.spike_sigma
    writers: list[Callback] = [Console(), JsonLines(folder.metrics)]
    if events is not None:
        writers.append(TensorBoard(events, dump_config(config), list(streams)))
        if config.objective == "slm":
            interval = config.training.token_table_interval or config.training.eval_interval
            writers.append(TokenTable(interval, events, corpora.tokenizer, sources))
    return [
        *_checks(config, folder, engine, reference, streams, world),
        StepMetrics(sources, config.objective == "slm", config.selection.quantiles),
        *([Spikes(folder.spikes if world.is_main else None, sigma)] if sigma else []),
        speed,
        Evaluation(evaluator),
        ExcessHistogram(config.training.histogram_interval, events),
        *own,
        *(writers if world.is_main else []),
        Checkpoints(store, engine),
    ]


def _checks(
    config: Config,
    folder: RunFolder,
    engine: TrainingEngine,
    reference: Reference,
    streams: dict[str, EvaluationStream],
    world: World,
) -> list[Callback]:
    """What looks at the run without a part in its records."""
    checks: list[Callback] = []
    if config.training.profile_steps is not None:
        checks.append(Profiler(folder.profile, *config.training.profile_steps, world))
    settings = config.reference
    if settings is not None and isinstance(reference, LiveReference) and (limit := settings.check_windows):
        students = Evaluator(engine.module, streams, config.training.micro_batch_size, world, limit)
        references = Evaluator(reference.engine, streams, settings.micro_batch_size, world, limit)
        checks.append(ReferenceCheck(students, references, settings.path))
    return checks


def _learning_rate(config: Config, plan: Plan, tokens: int) -> float:
    training = config.training
    return learning_rate(
        tokens,
        train_tokens=plan.total_steps * plan.tokens_per_step,
        warmup_tokens=training.warmup_tokens,
        lr=training.lr,
        min_lr=training.min_lr,
        schedule=training.schedule,
    )
