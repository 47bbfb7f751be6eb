"""The callbacks of a run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_slm.backend import TrainingEngine
from megatron_slm.build.corpora import Corpora
from megatron_slm.config import Config, dump_config
from megatron_slm.data.corpus import unique_names
from megatron_slm.data.loader import EvaluationStream
from megatron_slm.dist import World, agree
from megatron_slm.reference.references import LiveReference, NoReference, Reference
from megatron_slm.run_directory import RunDirectory
from megatron_slm.training.callbacks import Console, JsonLines, Profiler
from megatron_slm.training.checkpoints import cut_back
from megatron_slm.training.cost import ModelFlops
from megatron_slm.training.evaluation import Evaluation, Evaluator
from megatron_slm.training.metrics import Accounting, Spikes, StepMetrics, Throughput
from megatron_slm.training.reference_check import ReferenceCheck
from megatron_slm.training.tensorboard import ExcessHistogram, TensorBoard, TokenTable, open_event_files
from megatron_slm.training.trainer import Callback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What callbacks are made of: the parts of the run, and who writes where."""

    config: Config
    corpora: Corpora
    directory: RunDirectory
    engine: TrainingEngine
    reference: Reference
    models: ModelFlops
    speed: Throughput
    store_check: Callback | None
    min_context: int
    world: World


def make_callbacks(parts: Parts, own: Sequence[Callback], step: int) -> list[Callback]:
    """Return the callbacks of a run; their order makes no difference to the records.

    Args:
        parts: of the run.
        own: callbacks of the user's.
        step: from which the run goes on.

    Raises:
        AgreedError: the records are garbled, or TensorBoard's folder cannot be written.
    """
    config, directory, world = parts.config, parts.directory, parts.world
    selective, sigma = config.objective == "slm", config.training.spike_sigma
    sources = unique_names([corpus.prefix for corpus in parts.corpora.train])
    streams = _streams(parts)
    events = agree(lambda: _open_records(directory, step) if world.is_main else None)
    return [
        *_checks(parts, streams),
        StepMetrics(sources, selective, config.selection.quantiles if config.reference else (), parts.min_context),
        *([Spikes(directory.spikes if world.is_main else None, sigma)] if sigma else []),
        Accounting(parts.models),
        parts.speed,
        Evaluation(_evaluator(parts, streams)),
        ExcessHistogram(config.training.histogram_interval, events),
        *own,
        *([] if events is None else _writers(parts, events, sources)),
    ]


def _open_records(directory: RunDirectory, step: int) -> "SummaryWriter":
    """What a killed run recorded after its checkpoint goes, before any callback adds to it."""
    for path in (directory.metrics, directory.spikes):
        cut_back(path, step)
    return open_event_files(directory.tensorboard, step)


def _streams(parts: Parts) -> dict[str, EvaluationStream]:
    eod, data = parts.corpora.tokenizer.eos_token_id, parts.config.data
    return {
        name: EvaluationStream(corpus, data.seq_length, eod, data.reset_attention)
        for name, corpus in parts.corpora.valid.items()
    }


def _evaluator(parts: Parts, streams: dict[str, EvaluationStream], windows: int | None = None) -> Evaluator:
    return Evaluator(parts.engine.module, streams, parts.config.training.micro_batch_size, parts.world, windows)


def _checks(parts: Parts, streams: dict[str, EvaluationStream]) -> list[Callback]:
    """What looks at the run without a part in its records."""
    checks: list[Callback] = []
    training, settings, reference = parts.config.training, parts.config.reference, parts.reference
    if training.profile_steps is not None:
        checks.append(Profiler(parts.directory.profile, *training.profile_steps, parts.world))
    if settings is not None and isinstance(reference, LiveReference) and (windows := settings.check_windows):
        references = Evaluator(reference.engine, streams, settings.micro_batch_size, parts.world, windows)
        checks.append(ReferenceCheck(_evaluator(parts, streams, windows), references, str(settings.path)))
    elif parts.store_check is not None:
        checks.append(parts.store_check)
    elif not isinstance(reference, LiveReference | NoReference) and parts.world.is_main:
        logger.info("no reference check: only one live reference can be asked about the evaluation sets")
    return checks


def _writers(parts: Parts, events: "SummaryWriter", sources: list[str]) -> list[Callback]:
    """What rank 0 alone does."""
    config, training = parts.config, parts.config.training
    writers: list[Callback] = [Console(), JsonLines(parts.directory.metrics)]
    writers.append(TensorBoard(events, dump_config(config), list(parts.corpora.valid)))
    if config.objective == "slm":
        interval = training.token_table_interval or training.eval_interval
        writers.append(TokenTable(interval, events, parts.corpora.tokenizer, sources))
    return writers
