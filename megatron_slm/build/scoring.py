"""A scoring run: a configuration in, a store out. Read `score_corpora` from top to bottom."""

import dataclasses
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_slm.build.corpora import Corpora, make_samples, open_corpora, open_run_corpora
from megatron_slm.build.models import frozen_model, make_backend
from megatron_slm.build.plan import settle
from megatron_slm.build.references import check_reference
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus, file_sha256
from megatron_slm.data.loader import position_after
from megatron_slm.data.samples import Samples
from megatron_slm.dist import World, agree, gather_objects
from megatron_slm.errors import UserError
from megatron_slm.io.files import refuse_taken
from megatron_slm.io.shards import OPTION as SHARD_OPTION
from megatron_slm.io.shards import ShardPlan, Shards, WorkShard
from megatron_slm.io.staging import Journal, Staging
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.models.pretrained import weights_fingerprint
from megatron_slm.reference.imports import OPTION, open_import
from megatron_slm.reference.scoring import DOCUMENT_CONTEXT, PACKED_CONTEXT, DocumentWork, ModelSource, PackedWork, Work
from megatron_slm.reference.settings import PartSettings, ScoreSettings
from megatron_slm.reference.store import ORDER, FileEntry, Manifest
from megatron_slm.reference.store_parts import finish_part, open_parts, part_of, plan_facts, refuse_small_parts
from megatron_slm.reference.store_writer import NewFile, open_writer, write_store
from megatron_slm.signals import ENCODINGS, column_flags, stored_columns

NamedWork = tuple[str, Corpus | None, Work]
"""The name of a file of a store, the corpus that it scores (None for an order of samples), and its batches."""


def score_corpora(
    config: Config,
    settings: ScoreSettings,
    world: World,
    imports: Sequence[Path] = (),
    shard: WorkShard | None = None,
    activity: Activity | None = None,
) -> None:
    """Write a store, resuming from the shards that are on the disk; every rank calls it.

    Args:
        config: the corpora, and the reference unless log-probabilities are imported.
        settings: the store to write.
        world: this rank.
        imports: files of log-probabilities, one for each corpus of `data.train`; empty to run the reference.
        shard: the part of the store to write; None for the whole store.
        activity: receives the phases of this rank, and the progress of its model.

    Raises:
        AgreedError: an error that the user can correct, the same on every rank.
    """
    parts = open_parts(settings.output)
    activity = activity or Activity()
    activity.enter(Phase.INDEX)
    staging = parts.staging(shard) if shard else Staging(Path(settings.output), "score.output", "scoring")
    with ExitStack() as stack:
        agree(lambda: _open(Path(settings.output), staging, stack) if world.is_main else None)
        packed = settings.kind == "packed"
        corpora = agree(lambda: open_run_corpora(config.data) if packed else open_corpora(config.data))
        config, plan = agree(lambda: settle(config, corpora, world.device.type, reads_document_store=False))
        imported = agree(lambda: _imported_files(corpora, imports, settings) if imports else [])
        cache = staging.folder / "cache"
        order = make_samples(config.data, config.seed, corpora, plan, cache, world) if packed else None
        # Rank 0 alone hashes the weights.
        origin = gather_objects(agree(lambda: _origin(config, imports) if world.is_main else {}))[0]
        manifest = _manifest(config, settings, corpora, origin, order)
        end = position_after(config.data.skip_samples, 0, plan.total_samples)
        deciding = _deciding_settings(config, settings, manifest, corpora, end)
        works = [] if imported else _works(config, settings, corpora, order, end)
        finish = None
        if shard:
            begun = agree(lambda: _begin_part(parts, shard, deciding, manifest, works) if world.is_main else None)
            deciding |= {SHARD_OPTION: str(shard)}
            if gather_objects(world.is_main and parts.is_finished(shard))[0]:
                return
            if begun:
                finish = partial(finish_part, shards=parts, staging=staging, plan=begun)
        journal = Journal(staging, deciding)
        # Opened before the model is loaded, so that unfinished work with other settings is refused at once.
        writer = open_writer(manifest, staging, journal, world)
        activity.enter(Phase.MODEL)
        files = imported or _model_files(config, settings, corpora, works, world, activity)
        activity.enter(Phase.REFERENCE_FORWARD)
        write_store(part_of(files, shard) if shard else files, writer, staging, world, finish)


def _open(output: Path, staging: Staging, stack: ExitStack) -> None:
    refuse_taken("score.output", output)
    stack.enter_context(staging.open())


def _begin_part(
    parts: Shards, shard: WorkShard, deciding: dict[str, Any], manifest: Manifest, works: list[NamedWork]
) -> ShardPlan:
    """Record or compare the plan of all parts, before the model is loaded."""
    entries = [
        FileEntry(name, work.rows, *((corpus.prefix, corpus.sha256) if corpus else ())) for name, corpus, work in works
    ]
    counts = [work.num_shards for _, _, work in works]
    refuse_small_parts(sum(counts), shard)
    return parts.begin(shard, deciding, plan_facts(manifest, entries, counts))


def _origin(config: Config, imports: Sequence[Path]) -> dict[str, Any]:
    """Return the origin of the values, for the manifest: the model or the imported files, and their fingerprint."""
    if imports:
        whole = hashlib.sha256("".join(file_sha256(path) for path in imports).encode()).hexdigest()
        return {"imported": [str(path) for path in imports], "fingerprint": whole, "precision": None}
    path = _model(config).path
    return {"path": path, "fingerprint": weights_fingerprint(str(path)), "precision": config.training.precision}


def _model(config: Config) -> PartSettings:
    """Return the settings of the model that scores.

    Raises:
        UserError: `reference.path` is not set, or there are several references.
    """
    settings = config.reference
    if settings is None or settings.path is None:
        reason = "scoring needs one reference model"
        raise UserError("reference.path", None, reason, "Set it, and remove reference.of if it is set")
    return dataclasses.replace(settings, store=None).parts[0]


def _manifest(
    config: Config, settings: ScoreSettings, corpora: Corpora, origin: dict[str, Any], order: Samples | None
) -> Manifest:
    """Return the manifest of the store, without its files."""
    data = config.data
    length = data.seq_length
    attention = "within each document" if data.reset_attention else "across documents"
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
        context="As in the program that computed them." if "imported" in origin else context,
        seq_length=length,
        reset_attention=order is not None and data.reset_attention,
        order_fingerprint=order.fingerprint if order else "",
        tokenizer_fingerprint=corpora.identity.fingerprint,
        tokenizer_probe=corpora.identity.probe,
        reference=origin,
        files=[],
    )


def _deciding_settings(
    config: Config, settings: ScoreSettings, manifest: Manifest, corpora: Corpora, end: int
) -> dict[str, Any]:
    """Return all settings on which the values and the division into shards depend."""
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
    """Return each corpus with the name of its file in the store."""
    return list(corpora.sources.items())


def _imported_files(corpora: Corpora, imports: Sequence[Path], settings: ScoreSettings) -> list[NewFile]:
    if len(imports) != len(corpora.train):
        paths = ", ".join(map(str, imports))
        reason = f"the number of files is {len(imports)}, and data.train has {len(corpora.train)} corpora"
        raise UserError(OPTION, paths, reason, "Give one file for each corpus, in the order of data.train")
    return [
        NewFile(name, corpus, open_import(path, corpus, settings.shard_tokens))
        for (name, corpus), path in zip(_named(corpora), imports, strict=True)
    ]


def _works(
    config: Config, settings: ScoreSettings, corpora: Corpora, order: Samples | None, end: int
) -> list[NamedWork]:
    """Return the name, the corpus and the batches of each file of the store; every rank calls it."""
    part, length = _model(config), config.data.seq_length
    if order is not None:
        order.reach(end)
        reset = config.data.reset_attention
        return [(ORDER, None, PackedWork(order, end, length, part.micro_batch_size, settings.shard_tokens, reset))]
    eod, batch = corpora.tokenizer.eos_token_id, part.micro_batch_size * length
    return [
        (name, corpus, DocumentWork(corpus, eod, length, batch, settings.shard_tokens))
        for name, corpus in _named(corpora)
    ]


def _model_files(
    config: Config,
    settings: ScoreSettings,
    corpora: Corpora,
    works: list[NamedWork],
    world: World,
    activity: Activity,
) -> list[NewFile]:
    """Load the model, and return the files of the store to write; every rank calls it."""
    part = _model(config)
    agree(lambda: check_reference(part, corpora, config.data.seq_length))
    engine, _ = frozen_model(config, part, make_backend(config, world))
    activity.follow(engine)
    columns = stored_columns(settings)
    return [NewFile(name, corpus, ModelSource(engine, work, columns, world)) for name, corpus, work in works]
