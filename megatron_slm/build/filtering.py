"""Filtering of documents: corpora and two stores in, a keep-list out. Read `filter_documents` from top to bottom."""

import logging
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.build.corpora import Corpora, open_corpora
from megatron_slm.build.references import document_files, open_matching_store
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus, count_tokens
from megatron_slm.data.keep_list import write_keep_list
from megatron_slm.errors import UserError
from megatron_slm.io.files import publish, refuse_taken
from megatron_slm.io.progress import Meter
from megatron_slm.io.staging import Staging
from megatron_slm.reference.filtering import DocumentExcess, StoredLosses, document_excess, highest, least_share
from megatron_slm.reference.settings import FilterSettings
from megatron_slm.reference.store import Store

logger = logging.getLogger(__name__)


def filter_documents(config: Config, settings: FilterSettings) -> None:
    """Rank the documents of all corpora together, and write a keep-list of the best.

    Args:
        config: the corpora.
        settings: the stores to rank by, the share to keep, and the file to write.

    Raises:
        UserError: the settings, the stores and the corpora do not fit together; existing files are unchanged.
    """
    output = Path(settings.output)
    refuse_taken("filter.output", output)
    staging = Staging(output, "filter.output", "filtering")
    with staging.open():
        corpora = open_corpora(config.data)
        base, reference = _open_stores(settings, corpora)
        # A corpus may occur twice in a blend. Its documents are ranked once.
        distinct = list({tuple(corpus.sha256.values()): corpus for corpus in corpora.train}.values())
        excess = _excess(distinct, _losses(base, distinct), _losses(reference, distinct))
        kept = _choose(distinct, excess, settings.keep)
        origin = {"keep": settings.keep, "base": base.fingerprint(), "reference": reference.fingerprint()}
        staged = staging.folder / output.name
        write_keep_list(staged, distinct, kept, origin)
        refuse_taken("filter.output", output)
        publish(staged, output)
    _log_kept(distinct, excess, kept)
    logger.info("train with: data.keep=%s", output)


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


def _excess(corpora: list[Corpus], bases: list[StoredLosses], references: list[StoredLosses]) -> list[DocumentExcess]:
    """Return the excess loss of the documents of each corpus."""
    excess, done = [], 0
    with Meter(sum(corpus.num_tokens for corpus in corpora), "tokens") as meter:
        for corpus, base, reference in zip(corpora, bases, references, strict=True):
            excess.append(document_excess(corpus, base, reference, meter.after(done)))
            done += corpus.num_tokens
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
