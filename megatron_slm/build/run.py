"""The files beside the weights that a run keeps in its directory, so that export needs nothing else."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_slm.backend import Backend, TrainingEngine
from megatron_slm.build.callbacks import Parts, make_callbacks
from megatron_slm.build.corpora import Corpora, kept_in_words, make_samples, open_run_corpora
from megatron_slm.build.models import (
    make_backend,
    make_candidates,
    make_learner,
    make_reference,
    make_rule,
    make_student,
    objective_at,
    open_scorer,
    student_config,
)
from megatron_slm.build.plan import learning_rate_at, resolve, schedule_changes
from megatron_slm.build.stores import Order, effective_min_context, store_fingerprints, student_as_reference
from megatron_slm.config import Config, dump_config
from megatron_slm.data.corpus import corpus_tokenizer_path
from megatron_slm.data.loader import StepLoader
from megatron_slm.data.samples import Samples
from megatron_slm.dist import World, agree
from megatron_slm.errors import UserError
from megatron_slm.io.files import whole_folder
from megatron_slm.models.starting_files import copy_model_files, copy_tokenizer_files, starting_folder
from megatron_slm.reference.references import LiveReference, Reference
from megatron_slm.run_folder import RunFolder
from megatron_slm.selection.rule import Rule
from megatron_slm.training.checkpoints import CheckpointStore, refuse_missing_checkpoint, roll_back
from megatron_slm.training.cost import ModelFlops, peak_flops, token_flops
from megatron_slm.training.metrics import Throughput
from megatron_slm.training.objective import SelectiveLanguageModeling
from megatron_slm.training.state import Plan, Requests, RunState
from megatron_slm.training.step import TrainingStep
from megatron_slm.training.store_check import StoreCheck
from megatron_slm.training.trainer import Callback, Trainer, make_callback
from megatron_slm.types import Batch


def keep_starting_files(folder: RunFolder, config: Config, corpora: Corpora, hf_config: PretrainedConfig) -> None:
    """Write RUN_DIR/model and RUN_DIR/tokenizer, unless the run has begun with them; rank 0 calls it.

    Raises:
        UserError: they cannot be written.
    """
    # Those of a start that failed before its first record may be of another model.
    if folder.has_begun and folder.holds_starting_files:
        return
    older = sorted({"rope_theta", "rope_scaling"} & config.model.config.keys())
    if folder.has_begun and config.model.path is not None and older:
        raise UserError(
            f"run_dir is {folder.path}, which holds a run that an earlier version began. Then model.config.{older[0]} "
            "had no effect beside model.path, and now it has: take it out of the configuration and of "
            "RUN_DIR/config.yaml to resume as before, or use another run_dir."
        )
    try:
        write_starting_files(folder.path, config, corpora, hf_config)
    except OSError as error:
        raise UserError(
            f"run_dir is {folder.path}, where the files of the starting model and of the tokenizer cannot be written "
            f"({error}): make room, or use another run_dir."
        ) from error


def write_starting_files(path: Path, config: Config, corpora: Corpora, hf_config: PretrainedConfig) -> None:
    """Write the folders `tokenizer` and `model` of models/starting_files.py.

    Args:
        path: folder to make them in.
        config: of the run.
        corpora: whose tokenizer a student from scratch has.
        hf_config: of the student.

    Raises:
        OSError: they cannot be written.
    """
    source = starting_folder(config.model.path) if config.model.path is not None else None
    with whole_folder(path / "tokenizer", replace=True) as tokenizer:
        copy_tokenizer_files(source or corpus_tokenizer_path(corpora.train[0]), tokenizer)
    with whole_folder(path / "model", replace=True) as model:
        found = copy_model_files(source, hf_config, model, trust_remote_code=config.model.trust_remote_code)
    if source is not None:
        found.log(str(path))


logger = logging.getLogger(__name__)

CHECKED_TOKENS = 8192
"""Tokens per rank on which a store is checked before the first step."""


@dataclass(frozen=True)
class Run:
    """What a command drives: `run.trainer.fit(run.state)`."""

    trainer: Trainer
    state: RunState
    folder: RunFolder
    backend: Backend

    def close(self) -> None:
        """Release the run directory and the models."""
        self.folder.close()
        self.backend.close()


@dataclass(frozen=True)
class Settled:
    """A run whose configuration is checked and resolved, before a model is built or a sample is indexed.

    stored     configuration of the run that this one resumes; None for a new run
    callbacks  of the user's own
    """

    folder: RunFolder
    stored: Config | None
    config: Config
    plan: Plan
    corpora: Corpora
    rule: Rule | None
    callbacks: list[Callback]
    hf_config: PretrainedConfig


def settle_run(
    folder: RunFolder, config: Config, world: World, callbacks: Sequence[Callback], rollback: int | None
) -> Settled:
    """Hold the run directory and check what a user can get wrong; the arguments are those of `build_run`."""
    config = agree(lambda: folder.settle(config))
    stored = agree(folder.stored)
    if rollback is not None:
        agree(lambda: refuse_missing_checkpoint(folder.checkpoints, rollback))
    corpora = agree(lambda: open_run_corpora(config))
    config, plan = agree(lambda: resolve(config, corpora, world))
    rule = agree(lambda: make_rule(config, world))
    if (warning := agree(lambda: student_as_reference(config))) and world.is_main:
        logger.warning(warning)
    own = [*callbacks, *agree(lambda: [make_callback(name) for name in config.callbacks])]
    hf_config = agree(lambda: student_config(config, corpora))
    return Settled(folder, stored, config, plan, corpora, rule, own, hf_config)


def build_run(config: Config, world: World, callbacks: Sequence[Callback] = (), rollback: int | None = None) -> Run:
    """Build everything of a run, resumed from its run directory; every rank calls it.

    Args:
        config: of the run.
        world: this process among all.
        callbacks: of the caller's own, beside those that the configuration names.
        rollback: step of the checkpoint to go on from; what came after it is moved aside.

    Raises:
        UserError: the same on all ranks, for anything that the user can mend.
    """
    folder = RunFolder(config.run_dir, world)
    try:
        return _build(settle_run(folder, config, world, callbacks, rollback), world, rollback)
    except BaseException:
        logger.debug("the run did not start", exc_info=True)  # to its log file, which closes here
        folder.close()
        raise


def _build(settled: Settled, world: World, rollback: int | None) -> Run:
    folder, config, plan, corpora, rule = (
        settled.folder, settled.config, settled.plan, settled.corpora, settled.rule
    )  # fmt: skip
    samples = make_samples(config, corpora, plan, folder.cache, world)
    agree(lambda: folder.begin(config, samples.fingerprint, store_fingerprints(config)))
    agree(lambda: _write_at_start(folder, config, corpora, settled.hf_config) if world.is_main else None)
    loader = _loader(config, plan, samples, world)
    backend = make_backend(config, world)
    student, engine = make_student(config, settled.hf_config, backend, world)
    order = Order(samples.fingerprint, loader.end(0, plan.total_steps))
    needs = rule.needs if rule is not None else ()
    min_context = agree(lambda: effective_min_context(config))
    reference, reference_flops = make_reference(config, corpora, backend, order, needs, world)
    backward = config.selection.backward if config.objective == "slm" else "exact"
    step = TrainingStep(
        engine,
        reference,
        make_learner(backward, student, engine, config.data.seq_length),
        seed=config.seed,
        num_sources=len(corpora.train),
        world=world,
        candidates=make_candidates(config, rule, engine, min_context),
    )
    store = CheckpointStore(folder.checkpoints, world, config.training.keep_checkpoints, dump_config(config))
    state = _restored(settled, RunState(plan, samples.fingerprint), store, engine, rollback, world)
    samples.reach(loader.end(state.next_sample, max(0, plan.total_steps - state.step)))
    models = ModelFlops(token_flops(student, settled.hf_config, config.data.seq_length), reference_flops, backward)
    peak = peak_flops(world.device)
    speed = Throughput(models, peak and peak * world.size)
    check = _store_check(settled, loader, engine, reference, backend, min_context, world)
    parts = Parts(config, corpora, folder, engine, reference, store, models, speed, check, min_context, world)
    rate = partial(learning_rate_at, config, plan)
    objective = partial(objective_at, config, plan, rule, min_context)
    told = make_callbacks(parts, settled.callbacks, state.step)
    trainer = Trainer(loader, step, rate, objective, told, config.training.max_skipped_updates, Requests())
    return Run(trainer, state, folder, backend)


def _restored(
    settled: Settled,
    state: RunState,
    store: CheckpointStore,
    engine: TrainingEngine,
    rollback: int | None,
    world: World,
) -> RunState:
    """Load the newest checkpoint, or that of step `rollback`, into the engine, and return where it stands."""
    torch.manual_seed(settled.config.seed + world.rank)
    if rollback is not None:
        roll_back(settled.folder.path, store, rollback, world)
    progress = store.restore(engine)
    if progress is None:
        return state
    agree(lambda: state.restore(progress))
    if world.is_main:
        logger.info("going on from the checkpoint of step %d", state.step)
        _warn_of_moved_schedules(settled, state.step, world)
    return state


def _store_check(
    settled: Settled,
    loader: StepLoader,
    engine: TrainingEngine,
    reference: Reference,
    backend: Backend,
    min_context: int,
    world: World,
) -> StoreCheck | None:
    """Return the check of a run that reads a store; None where there is none, or `reference.check_windows` is 0."""
    config, rule, settings = settled.config, settled.rule, settled.config.reference
    if rule is None or settings is None or not settings.check_windows or not store_fingerprints(config):
        return None
    return StoreCheck(
        partial(_first_batches, loader, config, world),
        LiveReference(engine.module, config.training.micro_batch_size),
        reference,
        SelectiveLanguageModeling(rule, config.selection.ratio, False, min_context),
        partial(open_scorer, config, settled.corpora, backend),
        config.seed,
    )


def _first_batches(loader: StepLoader, config: Config, world: World) -> list[Batch]:
    """Read this rank's first micro-batches: as many of the first step's as hold `CHECKED_TOKENS`, at least one."""
    batches = loader.read(0)
    count = max(1, CHECKED_TOKENS // batches[0].tokens_BT.numel())
    return [batch.to(world.device) for batch in batches[:count]]


def _warn_of_moved_schedules(settled: Settled, step: int, world: World) -> None:
    """Warn where another `training.train_tokens` than before moves what is a function of the run's length."""
    if settled.stored is None:
        return
    before = resolve(settled.stored, settled.corpora, world)
    changes = schedule_changes(before, (settled.config, settled.plan), step)
    if changes:
        logger.warning(
            "the run has %d steps instead of %d: %s. To keep to the earlier schedule, export the run and start another "
            "one from it.",
            settled.plan.total_steps,
            before[1].total_steps,
            "; ".join(changes),
        )


def _write_at_start(folder: RunFolder, config: Config, corpora: Corpora, hf_config: PretrainedConfig) -> None:
    """Keep what export needs in the run directory, and log what a keep-list leaves."""
    keep_starting_files(folder, config, corpora, hf_config)
    if corpora.kept is not None:
        logger.info("data.keep is %s: %s", config.data.keep, kept_in_words(corpora))


def _loader(config: Config, plan: Plan, samples: Samples, world: World) -> StepLoader:
    """Deals what a step reads: the candidates, where there are any."""
    return StepLoader(
        samples,
        plan.candidates * config.training.micro_batch_size,
        plan.samples_per_step,
        config.data.reset_attention,
        world,
        config.data.skip_samples,
    )
