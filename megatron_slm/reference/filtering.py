"""The excess loss of documents, and the choice of the documents to keep."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.corpus import Corpus, open_documents, open_mask
from megatron_slm.reference.store import ScoreFile

STRETCH = 1 << 22
"""Tokens to read at a time, so that memory does not grow with the corpus."""

Number = TypeVar("Number", np.float64, np.int64)


class StoredLosses(NamedTuple):
    """The losses of one corpus in a store: a file, and the index of its loss column."""

    file: ScoreFile
    column: int

    def read(self, first: int, last: int) -> NDArray[np.float64]:
        """Return the losses of the tokens at offsets `first` to `last - 1`, float64 in nats."""
        return self.file.stretch(first, last)[:, self.column].astype(np.float64)


class DocumentExcess(NamedTuple):
    """The excess loss (base minus reference) of the D documents of one corpus; see `stretch_excess`.

    total_D  float64 `[D]`: sum over the document's tokens that count toward the loss, in nats
    count_D  int64 `[D]`: number of these tokens
    """

    total_D: NDArray[np.float64]
    count_D: NDArray[np.int64]

    @property
    def mean_D(self) -> NDArray[np.float64]:
        """Return nats per token; -inf for a document without a token that counts, so that it ranks last."""
        mean_D = np.full(len(self.total_D), -np.inf)
        np.divide(self.total_D, self.count_D, out=mean_D, where=self.count_D > 0)
        return mean_D

    def mean_over(self, document_D: NDArray[np.bool_]) -> float:
        """Return nats per token over all tokens of the selected documents; NaN if none of these tokens counts."""
        count = self.count_D[document_D].sum()
        return float(self.total_D[document_D].sum() / count) if count else float("nan")


class Stretch(NamedTuple):
    """The tokens of a corpus at offsets `first` to `last - 1`, and the slice of the documents that they belong to."""

    first: int
    last: int
    documents: slice


class Measured(NamedTuple):
    """One corpus whose documents are ranked, and its losses in two stores."""

    corpus: Corpus
    base: StoredLosses
    reference: StoredLosses


def stretches(corpus: Corpus, size: int = STRETCH) -> list[Stretch]:
    """Divide the tokens of a corpus into stretches of `size` tokens, the last of which may be shorter."""
    documents = open_documents(corpus)
    bounds = [*range(0, corpus.num_tokens, size), corpus.num_tokens]
    return [Stretch(first, last, documents.between(first, last)) for first, last in pairwise(bounds)]


def stretch_excess(measured: Measured, stretch: Stretch) -> DocumentExcess:
    """Sum base loss minus reference loss over the part of each document that lies in a stretch.

    A token counts unless PREFIX.mask excludes it or one of its losses is not finite.

    Raises:
        UserError: a store is damaged.
    """
    first, last, here = stretch
    excess_N = measured.base.read(first, last) - measured.reference.read(first, last)
    counts_N = np.isfinite(excess_N)
    if (mask_N := open_mask(measured.corpus)) is not None:
        counts_N &= mask_N[first:last] != 0
    begin_D = np.maximum(open_documents(measured.corpus).starts(here) - first, 0)
    return DocumentExcess(_sums(np.where(counts_N, excess_N, 0.0), begin_D), _sums(counts_N.astype(np.int64), begin_D))


def add_stretches(corpus: Corpus, parts: Iterable[tuple[Stretch, DocumentExcess]]) -> DocumentExcess:
    """Return the excess loss of all documents of a corpus from that of all its stretches, in order."""
    whole = DocumentExcess(np.zeros(corpus.num_documents), np.zeros(corpus.num_documents, dtype=np.int64))
    for stretch, part in parts:
        whole.total_D[stretch.documents] += part.total_D
        whole.count_D[stretch.documents] += part.count_D
    return whole


def document_excess(measured: Measured, report: Callable[[int], None], size: int = STRETCH) -> DocumentExcess:
    """Sum base loss minus reference loss over each document; see `stretch_excess`.

    Args:
        measured: the corpus whose documents are ranked, and its losses.
        report: called with the number of finished tokens.
        size: number of tokens to read at a time.

    Raises:
        UserError: a store is damaged.
    """

    def parts() -> Iterator[tuple[Stretch, DocumentExcess]]:
        for stretch in stretches(measured.corpus, size):
            yield stretch, stretch_excess(measured, stretch)
            report(stretch.last)

    return add_stretches(measured.corpus, parts())


def _sums(value_N: NDArray[Number], begin_D: NDArray[np.int64]) -> NDArray[Number]:
    """Return the sum of each document, from its beginning to the next; without tokens it is 0."""
    # For a document without tokens, reduceat would return one value instead of 0.
    filled_D = np.diff(begin_D, append=len(value_N)) > 0
    sum_D = np.zeros(len(begin_D), dtype=value_N.dtype)
    sum_D[filled_D] = np.add.reduceat(value_N, begin_D[filled_D])
    return sum_D


def highest(mean_D: NDArray[np.float64], keep: float) -> NDArray[np.bool_]:
    """Select the documents of highest mean: exactly floor(keep * D + 0.5), at least 1; earlier ones win ties."""
    count = max(1, int(np.floor(keep * len(mean_D) + 0.5)))
    threshold = np.partition(mean_D, len(mean_D) - count)[len(mean_D) - count]
    kept_D: NDArray[np.bool_] = mean_D > threshold
    kept_D[np.flatnonzero(mean_D == threshold)[: count - kept_D.sum()]] = True
    return kept_D


def least_share(mean_D: NDArray[np.float64], some: slice) -> float:
    """Return the smallest share at which `highest` keeps at least one document of the slice `some`."""
    best = some.start + int(mean_D[some].argmax())
    before = np.count_nonzero(mean_D > mean_D[best]) + np.count_nonzero(mean_D[:best] == mean_D[best])
    return float(before + 1) / len(mean_D)
