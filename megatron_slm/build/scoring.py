"""A scoring run: corpora and a reference in, a store out. Read `score_corpora` from top to bottom."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

from megatron_slm.build.corpora import Corpora, make_samples, open_corpora, open_run_corpora
from megatron_slm.build.models import frozen_model, make_backend
from megatron_slm.build.plan import settle
from megatron_slm.build.references import check_reference
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus, file_sha256, unique_names
from megatron_slm.data.loader import position_after
from megatron_slm.data.samples import Samples
from megatron_slm.dist import World, agree, gather_objects
from megatron_slm.errors import UserError
from megatron_slm.io.paths import refuse_taken
from megatron_slm.io.progress import Meter
from megatron_slm.io.staging import Journal, Staging
from megatron_slm.models.fingerprint import weights_fingerprint
from megatron_slm.reference.attempt import Attempt
from megatron_slm.reference.imports import open_import
from megatron_slm.reference.scoring import (
    DOCUMENT_CONTEXT,
    PACKED_CONTEXT,
    DocumentWork,
    ModelSource,
    PackedWork,
    Source,
    Work,
)
from megatron_slm.reference.settings import PartSettings, ScoreSettings
from megatron_slm.reference.store import ORDER, Manifest
from megatron_slm.signals import ENCODINGS, column_flags, stored_columns

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """One file of the store: its name, the corpus that it speaks of (None: the order), and its values."""

    name: str
    corpus: Corpus | None
    source: Source


def score_corpora(config: Config, settings: ScoreSettings, world: World, imports: Sequence[Path] = ()) -> None:
    """Write the store; every rank calls it. What an earlier attempt finished is not done again.

    Args:
        config: its corpora, and its reference unless log-probabilities are imported.
        settings: what to write.
        world: this process among all.
        imports: files of log-probabilities, one a corpus of `data.train`; none: the reference is run.

    Raises:
        UserError: the same on all ranks, for anything that the user can mend.
    """
    output = Path(settings.output)
    staging = Staging(output, "score.output", "scoring")
    with ExitStack() as stack:
        agree(lambda: _open(staging, stack) if world.is_main else None)
        packed = settings.kind == "packed"
        corpora = agree(lambda: open_run_corpora(config.data) if packed else open_corpora(config.data))
        config, plan = agree(lambda: settle(config, corpora, world.device.type, reads_document_store=False))
        imported = agree(lambda: _imported(corpora, imports, settings) if imports else [])
        cache = staging.folder / "cache"
        order = make_samples(config.data, config.seed, corpora, plan, cache, world) if packed else None
        origin = gather_objects(agree(lambda: _origin(config, imports) if world.is_main else {}))[0]
        manifest = _manifest(config, settings, corpora, origin, order)
        end = position_after(config.data.skip_samples, 0, plan.total_steps * plan.samples_per_step)
        journal = Journal(staging, _deciding_settings(config, settings, manifest, corpora, end))
        attempt = _agree_writing(staging, lambda: _attempt(staging, journal, manifest) if world.is_main else None)
        jobs = imported or _modelled(config, settings, corpora, order, end, world)
        _fill(jobs, attempt, staging, world)
        _read_back(jobs, attempt, staging)
        _agree_writing(staging, lambda: _complete(jobs, attempt, manifest, output) if attempt else None)


def _open(staging: Staging, stack: ExitStack) -> None:
    refuse_taken(staging.setting, staging.output)
    stack.enter_context(staging.open())


def _origin(config: Config, imports: Sequence[Path]) -> dict[str, Any]:
    """Which model's scores these are, as the manifest says it."""
    if imports:
        whole = hashlib.sha256("".join(file_sha256(path) for path in imports).encode()).hexdigest()
        return {"imported": [str(path) for path in imports], "fingerprint": whole, "precision": None}
    path = _model(config).path
    return {
        "path": path,
        "fingerprint": weights_fingerprint(str(path)),
        "precision": config.training.precision,
    }


def _model(config: Config) -> PartSettings:
    """The one model that scores.

    Raises:
        UserError: there is none, or several.
    """
    settings = config.reference
    if settings is None or settings.path is None:
        raise UserError("reference.path is not set: name the model that scores, one at a time.")
    return dataclasses.replace(settings, store=None).parts[0]


def _manifest(
    config: Config, settings: ScoreSettings, corpora: Corpora, origin: dict[str, Any], order: Samples | None
) -> Manifest:
    """All that can be said of the store before its values are known."""
    data = config.data
    length = data.seq_length
    attention = "attention kept within each" if data.reset_attention else "attending across them"
    context = (
        DOCUMENT_CONTEXT.format(window=length, least=length - length // 2)
        if order is None
        else PACKED_CONTEXT.format(length=length, attention=attention)
    )
    return Manifest(
        kind=settings.kind,
        columns=stored_columns(settings),
        encoding=settings.encoding,
        max_error=ENCODINGS[settings.encoding].max_error,
        context="As whoever computed them says." if "imported" in origin else context,
        seq_length=length,
        reset_attention=order is not None and data.reset_attention,
        order_fingerprint=order.fingerprint if order else "",
        tokenizer_fingerprint=corpora.identity.fingerprint,
        tokenizer_probe=corpora.identity.probe,
        reference=origin,
        files=[],
    )


def _attempt(staging: Staging, journal: Journal, manifest: Manifest) -> Attempt:
    return Attempt(staging, journal, manifest.columns, manifest.encoding)


def _deciding_settings(
    config: Config, settings: ScoreSettings, manifest: Manifest, corpora: Corpora, end: int
) -> dict[str, Any]:
    """Everything that decides the values, and which of them make a shard."""
    packed = settings.kind == "packed"
    return {
        "score.kind": manifest.kind,
        "score.encoding": manifest.encoding,
        **{f"score.{flag}": getattr(settings, flag) for flag in column_flags()},
        "score.shard_tokens": settings.shard_tokens,
        "data.seq_length": manifest.seq_length,
        "data.train (name, sha256)": [
            [name, *(corpus.sha256[suffix][:16] for suffix in (".bin", ".idx"))] for name, corpus in _named(corpora)
        ],
        "the order of samples": manifest.order_fingerprint[:16],
        "the samples": end if packed else None,
        "reference.micro_batch_size": _model(config).micro_batch_size if packed else None,
        "data.reset_attention": manifest.reset_attention,
        "the reference (sha256)": manifest.reference["fingerprint"][:16],
        "training.precision": manifest.reference["precision"],
    }


def _named(corpora: Corpora) -> list[tuple[str, Corpus]]:
    """Each corpus that is scored, with the name of its file."""
    return list(zip(unique_names([corpus.prefix for corpus in corpora.train]), corpora.train, strict=True))


def _imported(corpora: Corpora, imports: Sequence[Path], settings: ScoreSettings) -> list[Job]:
    if len(imports) != len(corpora.train):
        raise UserError(
            f"--import names {len(imports)} files and data.train {len(corpora.train)} corpora: give one for each, in "
            "their order."
        )
    return [
        Job(name, corpus, open_import(path, corpus, settings.shard_tokens))
        for (name, corpus), path in zip(_named(corpora), imports, strict=True)
    ]


def _modelled(
    config: Config, settings: ScoreSettings, corpora: Corpora, order: Samples | None, end: int, world: World
) -> list[Job]:
    part, length = _model(config), config.data.seq_length
    work: Work
    if order is not None:
        order.reach(end)
        reset = config.data.reset_attention
        work = PackedWork(order, end, length, part.micro_batch_size, settings.shard_tokens, reset)
        works: list[tuple[str, Corpus | None, Work]] = [(ORDER, None, work)]
    else:
        eod, batch = corpora.tokenizer.eos_token_id, part.micro_batch_size * length
        works = [
            (name, corpus, DocumentWork(corpus, eod, length, batch, settings.shard_tokens))
            for name, corpus in _named(corpora)
        ]
    agree(lambda: check_reference(part, corpora, length))
    engine, _ = frozen_model(config, part, make_backend(config, world))
    columns = stored_columns(settings)
    return [Job(name, corpus, ModelSource(engine, work, columns, world)) for name, corpus, work in works]


def _fill(jobs: list[Job], attempt: Attempt | None, staging: Staging, world: World) -> None:
    """Write the shards that are not there yet; every rank calls it."""
    found = {job.name: attempt.finished(job.name) for job in jobs} if attempt else {}
    finished: dict[str, tuple[int, int]] = gather_objects(found)[0]
    total = sum(job.source.rows for job in jobs)
    left = total - sum(rows for _, rows in finished.values())
    if left < total and world.is_main:
        logger.info("going on after %s of %s tokens", f"{total - left:,}", f"{total:,}")
    if world.is_main:
        shards = sum(job.source.num_shards for job in jobs)
        logger.info("scoring %s tokens in %d shards, into %s", f"{left:,}", shards, staging.output)
    done = 0
    with Meter(left, "tokens", shown=world.is_main) as meter:
        for job in jobs:
            for number in range(finished[job.name][0], job.source.num_shards):
                values = job.source.values(number, partial(_tell, meter, done))
                _agree_writing(staging, partial(attempt.write, job.name, values) if attempt else _nothing)
                done += len(values.values_NC)
                meter.reach(done)


def _agree_writing(staging: Staging, work: Callable[[], T]) -> T:
    """What `agree` does, where a full disk is a sentence of all ranks."""

    def write() -> T:
        with staging.writing():
            return work()

    return agree(write)


def _tell(meter: Meter, before: int, done: int) -> None:
    meter.reach(before + done)


def _nothing() -> None:
    """What a rank does that does not write."""


def _read_back(jobs: list[Job], attempt: Attempt | None, staging: Staging) -> None:
    """Check what is on the disk; every rank calls it, and meets the others at every shard, so that none gives up."""
    for job in jobs:
        reading = attempt.read_back(job.name) if attempt else repeat(None)
        for _ in range(job.source.num_shards + 1):
            _agree_writing(staging, partial(next, reading))


def _complete(jobs: list[Job], attempt: Attempt, manifest: Manifest, output: Path) -> None:
    """Make the store be there."""
    files = [
        attempt.entry(job.name, job.corpus.prefix if job.corpus else "", job.corpus.sha256 if job.corpus else {})
        for job in jobs
    ]
    manifest = dataclasses.replace(manifest, files=files)
    attempt.publish(manifest.text(), output)
    for entry in files:
        means = ", ".join(f"{column} {value:.4f}" for column, value in entry.mean.items())
        clipped = f"; {entry.clipped} above what {manifest.encoding} can hold" if entry.clipped else ""
        logger.info("%s/%s: %d tokens, mean %s nats%s", output, entry.name, entry.rows, means, clipped)
    logger.info("train with: reference.store=%s", output)
