"""Filtering of documents: corpora and two stores in, a keep-list out. Read `filter_documents` from top to bottom."""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_slm.build.corpora import Corpora, open_corpora
from megatron_slm.build.references import document_files, open_matching_store
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus, count_tokens, file_sha256
from megatron_slm.data.keep_list import write_keep_list
from megatron_slm.errors import UserError
from megatron_slm.io.files import publish, refuse_taken
from megatron_slm.io.progress import Meter
from megatron_slm.io.shards import OPTION as SHARD_OPTION
from megatron_slm.io.shards import Shards, WorkShard
from megatron_slm.io.staging import Staging
from megatron_slm.reference.filtering import (
    STRETCH,
    DocumentExcess,
    Measured,
    StoredLosses,
    add_stretches,
    document_excess,
    highest,
    least_share,
    stretch_excess,
    stretches,
)
from megatron_slm.reference.settings import FilterSettings
from megatron_slm.reference.store import Store

logger = logging.getLogger(__name__)

_SETTING, _DOING = "filter.output", "filtering"


def filter_documents(config: Config, settings: FilterSettings, *, merge: bool = False) -> None:
    """Rank the documents of all corpora together, and write a keep-list of the best.

    Args:
        config: the corpora.
        settings: the stores to rank by, the share to keep, and the file to write.
        merge: take the sums over documents from the shards that `filter_shard` has made.

    Raises:
        UserError: the settings, the stores, the corpora and the shards do not fit together; existing files are
            unchanged.
    """
    output = Path(settings.output)
    refuse_taken(_SETTING, output)
    staging = Staging(output, _SETTING, _DOING)
    with staging.open():
        ranking = _open_ranking(config, settings)
        corpora = [one.corpus for one in ranking.measured]
        excess = _merged_excess(ranking, output) if merge else _excess(ranking.measured)
        kept = _choose(corpora, excess, settings.keep)
        base, reference = (store.fingerprint() for store in ranking.stores)
        staged = staging.folder / output.name
        write_keep_list(staged, corpora, kept, {"keep": settings.keep, "base": base, "reference": reference})
        refuse_taken(_SETTING, output)
        publish(staged, output)
    _log_kept(corpora, excess, kept)
    logger.info("train with: data.keep=%s", output)


def filter_shard(config: Config, settings: FilterSettings, shard: WorkShard) -> None:
    """Sum the excess loss over one shard of the tokens, for `filter_documents(merge=True)`.

    Args:
        config: the corpora.
        settings: the stores to rank by, and the keep-list whose shard this is.
        shard: the shard to sum.

    Raises:
        UserError: as `filter_documents`; or there are more shards than stretches, or shards of another command.
    """
    output = Path(settings.output)
    refuse_taken(_SETTING, output)
    shards = Shards(output, _SETTING, _DOING)
    staging = shards.staging(shard)
    with staging.open():
        ranking = _open_ranking(config, settings)
        work = [(one, stretch) for one in ranking.measured for stretch in stretches(one.corpus, STRETCH)]
        if shard.count > len(work):
            reason = f"the tokens are read in only {len(work)} stretches of {STRETCH:,}"
            raise UserError(SHARD_OPTION, str(shard), reason, f"Use {len(work)} shards or fewer")
        plan = shards.begin(shard, ranking.identity())
        if shards.is_finished(shard):
            return
        staging.clear()
        mine = [work[number] for number in shard.of(len(work))]
        with Meter(len(mine), "stretches") as meter:
            parts = []
            for measured, stretch in mine:
                parts.append(stretch_excess(measured, stretch))
                meter.reach(len(parts))
        for name in DocumentExcess._fields:
            np.save(staging.ready / f"{name}.npy", np.concatenate([getattr(part, name) for part in parts]))
        shards.finish(staging, plan, {"sha256": _checksums(staging.ready)})


class Ranking(NamedTuple):
    """The documents to rank: the corpora with their losses, and the base and reference stores."""

    measured: list[Measured]
    stores: tuple[Store, Store]

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the sums over documents."""
        return {
            "data.train (sha256)": [list(one.corpus.sha256.values()) for one in self.measured],
            "filter.base (fingerprint)": self.stores[0].fingerprint(),
            "filter.reference (fingerprint)": self.stores[1].fingerprint(),
            "tokens per stretch": STRETCH,
        }


def _open_ranking(config: Config, settings: FilterSettings) -> Ranking:
    corpora = open_corpora(config.data)
    stores = _open_stores(settings, corpora)
    # A corpus may occur twice in a blend. Its documents are ranked once.
    distinct = list({tuple(corpus.sha256.values()): corpus for corpus in corpora.train}.values())
    losses = zip(distinct, *(_losses(store, distinct) for store in stores), strict=True)
    return Ranking([Measured(*one) for one in losses], stores)


def _checksums(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / f"{name}.npy") for name in DocumentExcess._fields}


def _merged_excess(ranking: Ranking, output: Path) -> list[DocumentExcess]:
    """Return the excess loss of the documents of each corpus, from the sums that all shards have made.

    Raises:
        UserError: shards are missing, unfinished, changed or of another command.
    """
    shards = Shards(output, _SETTING, _DOING)
    _, finished = shards.collect(lambda *_: "nothing is finished yet", ranking.identity())
    for shard in finished:
        if _checksums(shard.folder) != shard.report["sha256"]:
            reason = f"its shard {shard.folder} has changed since it was written"
            raise UserError("--merge", output, reason, "Copy it again, or remove that folder and run its shard again")
    columns = [
        [np.load(shard.folder / f"{name}.npy", mmap_mode="r") for shard in finished] for name in DocumentExcess._fields
    ]
    total_N, count_N = (np.concatenate(column) for column in columns)
    excess, place = [], 0
    for measured in ranking.measured:
        pieces = []
        for stretch in stretches(measured.corpus, STRETCH):
            end = place + stretch.documents.stop - stretch.documents.start
            pieces.append((stretch, DocumentExcess(total_N[place:end], count_N[place:end])))
            place = end
        excess.append(add_stretches(measured.corpus, pieces))
    return excess


def _open_stores(settings: FilterSettings, corpora: Corpora) -> tuple[Store, Store]:
    """Open both stores, and check that they are of kind document and differ."""
    base = _open_store("filter.base", settings.base, corpora)
    reference = _open_store("filter.reference", settings.reference, corpora)
    if base.fingerprint() == reference.fingerprint():
        reason = f"it holds the same scores as filter.reference {reference.path}, so every excess loss is 0"
        remedy = "Use the scores of a model that resembles the student before training"
        raise UserError("filter.base", base.path, reason, remedy)
    return base, reference


def _open_store(setting: str, path: str, corpora: Corpora) -> Store:
    store = open_matching_store(path, corpora, setting)
    if store.manifest.kind != "document":
        reason = f"it is of kind {store.manifest.kind}, which holds the tokens of samples instead of documents"
        raise UserError(setting, path, reason, "Score the corpora with score.kind=document")
    logger.info("%s: %s, scores of %s", setting, path, store.manifest.scorer)
    return store


def _losses(store: Store, corpora: list[Corpus]) -> list[StoredLosses]:
    column = store.manifest.columns.index("loss")
    return [StoredLosses(file, column) for file in document_files(store, corpora)]


def _excess(ranked: list[Measured]) -> list[DocumentExcess]:
    """Return the excess loss of the documents of each corpus."""
    excess, done = [], 0
    with Meter(sum(one.corpus.num_tokens for one in ranked), "tokens") as meter:
        for one in ranked:
            excess.append(document_excess(one, meter.after(done), STRETCH))
            done += one.corpus.num_tokens
    return excess


def _choose(corpora: list[Corpus], excess: list[DocumentExcess], keep: float) -> list[NDArray[np.bool_]]:
    """Return which documents of each corpus to keep, bool `[D]`.

    Raises:
        UserError: no document of a corpus would be left.
    """
    mean_D = np.concatenate([part.mean_D for part in excess])
    ends = np.cumsum([corpus.num_documents for corpus in corpora])
    kept = np.split(highest(mean_D, keep), ends[:-1])
    for corpus, document_D, end in zip(corpora, kept, ends, strict=True):
        if not document_D.any():
            # Rounded up, so that the share in the message suffices.
            least = math.ceil(1e4 * least_share(mean_D, slice(int(end) - len(document_D), int(end)))) / 1e4
            reason = f"it keeps none of the {len(document_D)} documents of {corpus.prefix}"
            remedy = f"Use {least:g} or more, or remove this corpus from data.train"
            raise UserError("filter.keep", keep, reason, remedy)
    return kept


def _log_kept(corpora: list[Corpus], excess: list[DocumentExcess], kept: list[NDArray[np.bool_]]) -> None:
    for corpus, part, document_D in zip(corpora, excess, kept, strict=True):
        logger.info(
            "%s: kept %s of %s documents, %s of %s tokens; mean excess loss of the kept %s, of the dropped %s",
            corpus.prefix,
            f"{document_D.sum():,}",
            f"{len(document_D):,}",
            f"{count_tokens(corpus, document_D):,}",
            f"{corpus.num_tokens:,}",
            _nats(part.mean_over(document_D)),
            _nats(part.mean_over(~document_D)),
        )


def _nats(mean: float) -> str:
    return "undefined" if math.isnan(mean) else f"{mean:.4f} nats per token"
