"""The second phase of a run: objects are built from what the first phase resolved. Read `build_run` first."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_slm.backend import Backend, TrainingEngine
from megatron_slm.build.callbacks import Parts, make_callbacks
from megatron_slm.build.corpora import Corpora, describe_kept, make_samples
from megatron_slm.build.models import make_backend, make_learner, make_student
from megatron_slm.build.objective import make_candidates, objective_at
from megatron_slm.build.plan import learning_rate_at
from megatron_slm.build.references import CheckedReference, make_reference
from megatron_slm.build.resolve import Resolved, resolve
from megatron_slm.config import Config, dump_config
from megatron_slm.data.corpus import corpus_tokenizer_path
from megatron_slm.data.loader import StepLoader
from megatron_slm.data.settings import blend
from megatron_slm.data.tokenizer import vocabulary_size
from megatron_slm.dist import World, agree
from megatron_slm.errors import UserError
from megatron_slm.io.files import whole_folder
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.models.starting_files import copy_model_files, copy_tokenizer_files, starting_folder
from megatron_slm.reference.references import Reference, live_modules
from megatron_slm.run_directory import RunDirectory
from megatron_slm.selection.rule import Rule
from megatron_slm.training.checkpoints import CheckpointStore, roll_back, save_checkpoint
from megatron_slm.training.cost import ModelFlops, token_flops
from megatron_slm.training.state import Requests, RunState
from megatron_slm.training.step import TrainingStep
from megatron_slm.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A built run; `run.trainer.fit(run.state)` trains it."""

    trainer: Trainer
    state: RunState
    directory: RunDirectory
    backend: Backend

    def close(self) -> None:
        """Release the run directory and the models."""
        self.directory.close()
        self.backend.close()


@dataclass(frozen=True)
class StepParts:
    """The optimizer step of a run, its student's engine and its reference, and what a token of its models costs."""

    engine: TrainingEngine
    reference: Reference
    step: TrainingStep
    models: ModelFlops


def build_run(
    config: Config,
    world: World,
    callbacks: Sequence[Callback] = (),
    rollback: int | None = None,
    activity: Activity | None = None,
) -> Run:
    """Build a run, and restore its checkpoint if its run directory holds one; every rank calls it.

    Args:
        config: of the run.
        world: this rank.
        callbacks: of the caller, in addition to those named in the configuration.
        rollback: step of the checkpoint to resume from, None for the newest; later checkpoints and records are moved
            to RUN_DIR/rolled-back.
        activity: receives the step and phase of this rank, for its heartbeat.

    Raises:
        UserError: the same on all ranks, for anything that the user can correct.
    """
    directory = RunDirectory(config.run_dir, world)

    def hold_and_resolve() -> Resolved:
        directory.hold()
        return resolve(config, directory, world, rollback)

    try:
        resolved = agree(hold_and_resolve)
        directory.refuse_unshared()
        for warning in resolved.warnings if world.is_main else ():
            logger.warning(warning)
        return _build(resolved, directory, world, callbacks, rollback, activity or Activity())
    except BaseException:
        logger.debug("the run did not start", exc_info=True)  # for its log file, which `close` closes
        directory.close()
        raise


def _build(
    resolved: Resolved,
    directory: RunDirectory,
    world: World,
    callbacks: Sequence[Callback],
    rollback: int | None,
    activity: Activity,
) -> Run:
    config, plan, corpora, rule = resolved.config, resolved.plan, resolved.corpora, resolved.rule
    activity.enter(Phase.INDEX)
    samples = make_samples(config.data, config.seed, corpora, plan, directory.cache, world)
    evaluation = {name: corpus.sha256[".bin"] for name, corpus in corpora.valid.items()}
    lengths = {name: corpus.num_bytes / corpus.num_tokens for name, corpus in corpora.sources.items()}
    agree(lambda: directory.begin(config, samples.fingerprint, resolved.store_fingerprints, evaluation, lengths))
    agree(lambda: keep_starting_files(directory, config, corpora, resolved.student) if world.is_main else None)
    if corpora.kept is not None and world.is_main:
        logger.info("data.keep is %s: %s", config.data.keep, describe_kept(corpora))
    loader = StepLoader(
        samples,
        plan.candidates * config.training.micro_batch_size,
        plan.samples_per_step,
        config.data.reset_attention,
        world,
        config.data.skip_samples,
        vocabulary_size(corpora.tokenizer),
        [corpus.prefix for corpus in corpora.train],
    )
    activity.enter(Phase.MODEL)
    backend = make_backend(config, world)
    built = build_step(
        config, rule, resolved.student, resolved.references, resolved.min_context, backend, world, activity=activity
    )
    engine, reference = built.engine, built.reference
    torch.manual_seed(config.seed + world.rank)
    store = CheckpointStore(
        directory.checkpoints, world, config.training.keep_checkpoints, dump_config(config), activity
    )
    state = RunState(plan, samples.fingerprint)
    _restore(state, store, engine, directory, world, rollback)
    samples.reach(loader.end(state.next_sample, max(0, plan.total_steps - state.step)))
    parts = Parts(directory, loader, backend, engine, reference, built.models, world, activity)
    trainer = Trainer(
        loader,
        built.step,
        partial(learning_rate_at, config.training, plan),
        partial(objective_at, config, plan, rule, resolved.min_context, world),
        make_callbacks(resolved, parts, [*callbacks, *resolved.callbacks], state.step),
        partial(save_checkpoint, store, engine),
        config.training.max_skipped_updates,
        Requests(),
        activity,
    )
    return Run(trainer, state, directory, backend)


def build_step(
    config: Config,
    rule: Rule | None,
    hf_config: PretrainedConfig,
    references: Sequence[CheckedReference],
    min_context: int,
    backend: Backend,
    world: World,
    *,
    weights: bool = True,
    activity: Activity | None = None,
    begin: Callable[[str], None] = lambda part: None,
) -> StepParts:
    """Build the models of a run and its optimizer step; every rank calls it.

    Args:
        config: with every default resolved.
        rule: the selection rule; None under CLM.
        hf_config: Hugging Face configuration of the student.
        references: checked; none under CLM.
        min_context: tokens that must precede a token that is selected, as `Resolved.min_context`.
        backend: holds the models.
        world: this rank.
        weights: False to build the student from `hf_config` with random weights, whatever `model.path` is.
        activity: receives the phases of this rank, and the progress of its models.
        begin: called with the name of each part before it is built, for progress.

    Raises:
        UserError: a model cannot be loaded, or does not support the settings of the run.
    """
    begin("student")
    student, engine = make_student(config, hf_config, backend, world, weights=weights)
    begin("reference")
    reference, reference_flops = make_reference(config, references, backend)
    activity = activity or Activity()
    _follow(activity, engine, reference)
    begin("checks")
    backward = config.selection.backward if config.objective == "slm" else "exact"
    step = TrainingStep(
        engine,
        reference,
        make_learner(backward, student, engine, config.data.seq_length),
        seed=config.seed,
        num_sources=len(blend(config.data.train)[0]),
        world=world,
        candidates=make_candidates(config, rule, engine, min_context),
        activity=activity,
    )
    models = ModelFlops(token_flops(student, hf_config, config.data.seq_length), reference_flops, backward)
    return StepParts(engine, reference, step, models)


def _follow(activity: Activity, engine: TrainingEngine, reference: Reference) -> None:
    """Report every forward of the student and of live references as progress, also those of evaluations and checks."""
    for module in (engine.module, *live_modules(reference)):
        activity.follow(module)


def _restore(
    state: RunState,
    store: CheckpointStore,
    engine: TrainingEngine,
    directory: RunDirectory,
    world: World,
    rollback: int | None,
) -> None:
    """Load the newest checkpoint, or that of step `rollback`, into the engine and the state, if there is one."""
    if rollback is not None:
        roll_back(directory.path, store, rollback, world)
    progress = store.restore(engine)
    if progress is not None:
        agree(lambda: state.restore(progress))
        if world.is_main:
            logger.info("resuming from the checkpoint of step %d", state.step)


def keep_starting_files(directory: RunDirectory, config: Config, corpora: Corpora, student: PretrainedConfig) -> None:
    """Write RUN_DIR/model and RUN_DIR/tokenizer for export, unless the run has begun with them; rank 0 calls it.

    Raises:
        UserError: they cannot be written.
    """
    # Files of a start that failed before its first record may belong to another model.
    if directory.has_begun and directory.holds_starting_files:
        return
    older = sorted({"rope_theta", "rope_scaling"} & config.model.config.keys())
    if directory.has_begun and config.model.path is not None and older:
        raise UserError(
            "run_dir",
            directory.path,
            f"its run began with an earlier version, which ignored model.config.{older[0]} beside model.path, and this "
            "version applies it",
            "Remove it from the configuration and from RUN_DIR/config.yaml to resume as before, or use another run_dir",
        )
    try:
        write_starting_files(directory.path, config, corpora, student)
    except OSError as error:
        reason = f"the files of the starting model and of the tokenizer cannot be written there ({error})"
        raise UserError("run_dir", directory.path, reason, "Free disk space, or use another run_dir") from error


def write_starting_files(path: Path, config: Config, corpora: Corpora, student: PretrainedConfig) -> None:
    """Write the folders `tokenizer` and `model`, which export reads (models/starting_files.py), to `path`.

    A student from scratch has the tokenizer of the corpora.

    Raises:
        OSError: they cannot be written.
    """
    source = starting_folder(config.model.path) if config.model.path is not None else None
    with whole_folder(path / "tokenizer", replace=True) as tokenizer:
        copy_tokenizer_files(source or corpus_tokenizer_path(corpora.train[0]), tokenizer)
    with whole_folder(path / "model", replace=True) as model:
        found = copy_model_files(source, student, model, trust_remote_code=config.model.trust_remote_code)
    if source is not None:
        found.log(str(path))
