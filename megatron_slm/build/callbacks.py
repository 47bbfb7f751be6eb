"""The callbacks of a run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import yaml

from megatron_slm.backend import Backend, TrainingEngine
from megatron_slm.build.observed import make_observer
from megatron_slm.build.references import open_scorer
from megatron_slm.build.resolve import Resolved
from megatron_slm.config import dump_config
from megatron_slm.data.loader import EvaluationStream, StepLoader
from megatron_slm.data.observed import ObservedFolder
from megatron_slm.dist import World, agree
from megatron_slm.liveness.activity import Activity
from megatron_slm.reference.references import LiveReference, NoReference, Reference
from megatron_slm.run_directory import RunDirectory
from megatron_slm.training.callbacks import Console, JsonLines, Profiler
from megatron_slm.training.checkpoints import cut_back
from megatron_slm.training.cost import ModelFlops, peak_flops
from megatron_slm.training.evaluation import Evaluation, Evaluator
from megatron_slm.training.loggers import TRACKERS, RecordSender, TrackedRun
from megatron_slm.training.metrics import Accounting, Spikes, StepMetrics, Throughput
from megatron_slm.training.objective import SelectiveLanguageModeling
from megatron_slm.training.reference_check import ReferenceCheck, StoreCheck
from megatron_slm.training.tensorboard import ExcessHistogram, TensorBoard, TokenTable, open_event_files
from megatron_slm.training.trainer import Callback
from megatron_slm.types import Batch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKED_TOKENS = 8192
"""Tokens per rank on which a store is checked before the first step."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The built parts of a run that callbacks use."""

    directory: RunDirectory
    loader: StepLoader
    backend: Backend
    engine: TrainingEngine
    reference: Reference
    models: ModelFlops
    world: World
    activity: Activity


def make_callbacks(resolved: Resolved, parts: Parts, own: Sequence[Callback], step: int) -> list[Callback]:
    """Return the callbacks of a run; their order does not affect the records.

    Args:
        resolved: the result of the first phase of the run.
        parts: built in the second phase.
        own: callbacks of the user.
        step: steps already trained; records of later steps are dropped.

    Raises:
        AgreedError: the records cannot be read, or TensorBoard's folder cannot be written.
    """
    config, directory, world = resolved.config, parts.directory, parts.world
    sources = list(resolved.corpora.sources)
    quantiles = config.selection.quantiles if config.reference else ()
    peak = peak_flops(world.device)
    streams = _streams(resolved)
    evaluator = Evaluator(parts.engine.module, streams, config.training.micro_batch_size, world)
    uses_tensorboard = "tensorboard" in config.training.loggers
    events = agree(lambda: _open_records(directory, step, uses_tensorboard) if world.is_main else None)
    spikes = directory.spikes if world.is_main else None
    callbacks: list[Callback] = [
        StepMetrics(sources, config.objective == "slm", quantiles, resolved.min_context),
        *([Spikes(spikes, config.training.spike_sigma)] if config.training.spike_sigma else []),
        Accounting(parts.models),
        Throughput(parts.models, peak and peak * world.size),
        Evaluation(evaluator, parts.activity),
        *([ExcessHistogram(config.training.histogram_interval, events)] if uses_tensorboard else []),
        *_observers(resolved, parts, step),
        *_checks(resolved, parts, streams),
        *own,
    ]
    if config.training.profile_steps is not None:
        callbacks.append(Profiler(directory.profile, *config.training.profile_steps, world))
    if world.is_main:
        callbacks += _writers(resolved, directory, events, sources)
    return callbacks


def _observers(resolved: Resolved, parts: Parts, step: int) -> list[Callback]:
    """Return the callback that records the tokens of `training.observe`, if it is set."""
    if not resolved.observed:
        return []
    folder = ObservedFolder(parts.directory.observed)
    if parts.world.is_main:
        folder.drop_after(step)
    return [make_observer(resolved, parts.reference, parts.engine.module, folder, parts.activity, parts.world)]


def _open_records(directory: RunDirectory, step: int, uses_tensorboard: bool) -> "SummaryWriter | None":
    """Drop the records that a killed run wrote after its checkpoint, and open TensorBoard's files if it is used."""
    for path in (directory.metrics, directory.spikes):
        cut_back(path, step)
    return open_event_files(directory.tensorboard, step) if uses_tensorboard else None


def _streams(resolved: Resolved) -> dict[str, EvaluationStream]:
    eod, data = resolved.corpora.tokenizer.eos_token_id, resolved.config.data
    return {
        name: EvaluationStream(corpus, data.seq_length, eod, data.reset_attention)
        for name, corpus in resolved.corpora.valid.items()
    }


def _checks(resolved: Resolved, parts: Parts, streams: dict[str, EvaluationStream]) -> list[Callback]:
    """Return the check of the reference before the first step, unless `reference.check_windows` is 0."""
    settings, rule, world = resolved.config.reference, resolved.rule, parts.world
    if settings is None or rule is None or not settings.check_windows:
        return []
    samples = resolved.config.training.micro_batch_size
    if isinstance(parts.reference, LiveReference):
        windows = settings.check_windows
        students = Evaluator(parts.engine.module, streams, samples, world, windows)
        references = Evaluator(parts.reference.engine, streams, settings.micro_batch_size, world, windows)
        return [ReferenceCheck(students, references, str(settings.path))]
    if resolved.store_fingerprints:
        return [_store_check(resolved, parts)]
    if world.is_main and not isinstance(parts.reference, NoReference):
        logger.info("the reference is not checked: the check supports one live reference, or a store")
    return []


def _store_check(resolved: Resolved, parts: Parts) -> StoreCheck:
    config, rule = resolved.config, resolved.rule
    assert rule is not None
    return StoreCheck(
        partial(_first_batches, parts.loader, parts.world),
        LiveReference(parts.engine.module, config.training.micro_batch_size),
        parts.reference,
        SelectiveLanguageModeling(rule, config.selection.ratio, False, resolved.min_context, parts.world.data.group),
        partial(open_scorer, config, resolved.references, resolved.corpora, parts.backend),
        config.seed,
        parts.world,
    )


def _first_batches(loader: StepLoader, world: World) -> list[Batch]:
    """Return the first micro-batches of step 1 on this rank: up to `CHECKED_TOKENS` tokens, but at least one batch."""
    batches = loader.read(0)
    count = max(1, CHECKED_TOKENS // batches[0].tokens_BT.numel())
    return [batch.to(world.device) for batch in batches[:count]]


def _writers(
    resolved: Resolved, directory: RunDirectory, events: "SummaryWriter | None", sources: list[str]
) -> list[Callback]:
    """Return the callbacks that only rank 0 has."""
    config, training, configuration = resolved.config, resolved.config.training, dump_config(resolved.config)
    writers: list[Callback] = [Console(), JsonLines(directory.metrics)]
    tracked = TrackedRun(directory.path.resolve().name, directory.path, yaml.safe_load(configuration))
    writers += [RecordSender(name, tracked) for name in TRACKERS if name in training.loggers]
    if events is None:
        return writers
    writers.append(TensorBoard(events, configuration, list(resolved.corpora.valid)))
    if config.objective == "slm":
        interval = training.token_table_interval or training.eval_interval
        writers.append(TokenTable(interval, events, resolved.corpora.tokenizer, sources))
    return writers
