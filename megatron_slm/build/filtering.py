"""A filtering: corpora and two stores in, a keep-list out. Read `filter_documents` from top to bottom."""

import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.build.corpora import Corpora, open_corpora
from megatron_slm.build.references import document_files, open_matching_store
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus, count_tokens
from megatron_slm.data.keep_list import write_keep_list
from megatron_slm.errors import UserError
from megatron_slm.io.files import publish
from megatron_slm.io.paths import refuse_taken
from megatron_slm.io.progress import Meter
from megatron_slm.io.staging import Staging
from megatron_slm.reference.filtering import DocumentExcess, StoredLosses, document_excess, highest, least_share
from megatron_slm.reference.settings import FilterSettings
from megatron_slm.reference.store import Store

logger = logging.getLogger(__name__)


def filter_documents(config: Config, settings: FilterSettings) -> None:
    """Rank the documents of all corpora together, and write which are kept.

    Args:
        config: its corpora.
        settings: by which stores, how many, and where to.

    Raises:
        UserError: anything that the user can mend; what exists is as it was.
    """
    output = Path(settings.output)
    refuse_taken("filter.output", output)
    staging = Staging(output, "filter.output", "filtering")
    with staging.open():
        corpora = open_corpora(config.data)
        paths = {"filter.base": settings.base, "filter.reference": settings.reference}
        stores = [_open_store(setting, path, corpora) for setting, path in paths.items()]
        _refuse_same(*stores)
        for store in stores:
            logger.info("%s: %s, scores of %s", store.setting, store.path, store.manifest.scorer)
        distinct = list({tuple(corpus.sha256.values()): corpus for corpus in corpora.train}.values())
        found = _excess(distinct, *(_losses(store, distinct) for store in stores))
        mean_D = np.concatenate([excess.mean_D for excess in found])
        ends = np.cumsum([corpus.num_documents for corpus in distinct])
        kept = np.split(highest(mean_D, settings.keep), ends[:-1])
        _refuse_empty(distinct, kept, mean_D, settings.keep)
        aside = staging.folder / output.name
        base, reference = (store.fingerprint() for store in stores)
        write_keep_list(aside, distinct, kept, {"keep": settings.keep, "base": base, "reference": reference})
        refuse_taken("filter.output", output)
        publish(aside, output)
    _tell(distinct, found, kept)
    logger.info("train with: data.keep=%s", output)


def _open_store(setting: str, path: str, corpora: Corpora) -> Store:
    store = open_matching_store(path, corpora, setting)
    if store.manifest.kind != "document":
        raise UserError(
            f"{setting} is {path}, of kind {store.manifest.kind}, which scores samples and not documents: score the "
            "corpora with score.kind=document."
        )
    return store


def _refuse_same(base: Store, reference: Store) -> None:
    if base.fingerprint() == reference.fingerprint():
        raise UserError(
            f"filter.base is {base.path} and filter.reference is {reference.path}, which hold the same scores, so that "
            "no document exceeds: name the scores of a young model as filter.base, and those of the reference."
        )


def _losses(store: Store, corpora: list[Corpus]) -> list[StoredLosses]:
    column = store.manifest.columns.index("loss")
    return [StoredLosses(file, column) for file in document_files(store, corpora)]


def _excess(corpora: list[Corpus], bases: list[StoredLosses], references: list[StoredLosses]) -> list[DocumentExcess]:
    """Of the documents of each corpus."""
    found, done = [], 0
    with Meter(sum(corpus.num_tokens for corpus in corpora), "tokens") as meter:
        for corpus, base, reference in zip(corpora, bases, references, strict=True):
            found.append(document_excess(corpus, base, reference, partial(_tell_meter, meter, done)))
            done += corpus.num_tokens
    return found


def _tell_meter(meter: Meter, before: int, done: int) -> None:
    meter.reach(before + done)


def _refuse_empty(
    corpora: list[Corpus], kept: list[NDArray[np.bool_]], mean_D: NDArray[np.float64], keep: float
) -> None:
    end = 0
    for corpus, documents in zip(corpora, kept, strict=True):
        start, end = end, end + len(documents)
        if not documents.any():
            least = math.ceil(1e4 * least_share(mean_D, slice(start, end))) / 1e4
            raise UserError(
                f"filter.keep is {keep}, which keeps none of the {len(documents)} documents of {corpus.prefix}: raise "
                f"it to {least:g} or more, or leave this corpus out of data.train."
            )


def _tell(corpora: list[Corpus], found: list[DocumentExcess], kept: list[NDArray[np.bool_]]) -> None:
    for corpus, excess, documents in zip(corpora, found, kept, strict=True):
        tokens = count_tokens(corpus, documents)
        logger.info(
            "%s: kept %s of %s documents, %s of %s tokens; mean excess loss of the kept %s, of the dropped %s",
            corpus.prefix,
            *(f"{number:,}" for number in (documents.sum(), len(documents), tokens, corpus.num_tokens)),
            *(_nats(excess.mean_over(part)) for part in (documents, ~documents)),
        )


def _nats(mean: float) -> str:
    return "undefined" if math.isnan(mean) else f"{mean:.4f} nats a token"
