"""A whole run. Read `build_run` from top to bottom: each line makes one part from those above it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PretrainedConfig

from megatron_slm.composition.callbacks import Parts, make_callbacks
from megatron_slm.composition.corpora import Corpora, kept_in_words, make_samples, open_run_corpora
from megatron_slm.composition.models import make_backend, make_learner, make_reference, make_student, student_config
from megatron_slm.composition.objective import make_candidates, make_rule, objective_at
from megatron_slm.composition.plan import resolve
from megatron_slm.composition.starting_files import keep_starting_files
from megatron_slm.composition.stores import Order, store_fingerprints
from megatron_slm.config import Config, dump_config
from megatron_slm.data.loader import StepLoader
from megatron_slm.data.samples import Samples
from megatron_slm.dist import World, agree
from megatron_slm.run_folder import RunFolder
from megatron_slm.training.callbacks.callback import Callback, make_callback
from megatron_slm.training.callbacks.throughput import Throughput
from megatron_slm.training.checkpoints import CheckpointStore
from megatron_slm.training.flops import ModelFlops, peak_flops, token_flops
from megatron_slm.training.requests import Requests
from megatron_slm.training.rollback import refuse_missing_checkpoint, roll_back
from megatron_slm.training.schedule import learning_rate
from megatron_slm.training.state import Plan, RunState
from megatron_slm.training.step import TrainingStep
from megatron_slm.training.trainer import Trainer

logger = logging.getLogger(__name__)


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
    corpora = agree(lambda: open_run_corpora(config))
    config, plan = agree(lambda: resolve(config, corpora, world))
    rule = agree(lambda: make_rule(config, world))
    own = [*callbacks, *agree(lambda: [make_callback(name) for name in config.callbacks])]
    hf_config = agree(lambda: student_config(config, corpora))
    samples = make_samples(config, corpora, plan, folder.cache, world)
    agree(lambda: folder.begin(config, samples.fingerprint, store_fingerprints(config)))
    agree(lambda: _write_at_start(folder, config, corpora, hf_config) if world.is_main else None)
    loader = _loader(config, plan, samples, world)
    backend = make_backend(config, world)
    student, engine = make_student(config, hf_config, backend, world)
    order = Order(samples.fingerprint, loader.end(0, plan.total_steps))
    needs = rule.needs if rule is not None else ()
    reference, reference_flops = make_reference(config, corpora, backend, order, needs, world)
    backward = config.selection.backward if config.objective == "slm" else "exact"
    step = TrainingStep(
        engine,
        reference,
        make_learner(backward, student, engine, config.data.seq_length),
        seed=config.seed,
        num_sources=len(corpora.train),
        world=world,
        candidates=make_candidates(config, rule, engine),
    )
    state = RunState(plan, samples.fingerprint)
    torch.manual_seed(config.seed + world.rank)
    store = CheckpointStore(folder.checkpoints, world, config.training.keep_checkpoints, dump_config(config))
    if rollback is not None:
        roll_back(folder.path, store, rollback, world)
    if (progress := store.restore(engine)) is not None:
        agree(lambda: state.restore(progress))
        if world.is_main:
            logger.info("going on from the checkpoint of step %d", state.step)
    samples.reach(loader.end(state.next_sample, max(0, plan.total_steps - state.step)))
    models = ModelFlops(token_flops(student, hf_config, config.data.seq_length), reference_flops, backward)
    peak = peak_flops(world.device)
    speed = Throughput(models, peak and peak * world.size)
    parts = Parts(config, corpora, folder, engine, reference, store, models, speed, world)
    rate = partial(_learning_rate, config, plan)
    objective = partial(objective_at, config, plan, rule)
    told = make_callbacks(parts, own, state.step)
    trainer = Trainer(loader, step, rate, objective, told, config.training.max_skipped_updates, Requests())
    return Run(trainer, state, folder)


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
