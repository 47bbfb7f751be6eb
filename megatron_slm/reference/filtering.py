"""The excess loss of documents, summed over their tokens in stretches, and the choice of documents to keep."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.corpus import Corpus, open_documents, open_mask
from megatron_slm.reference.store import ScoreFile

STRETCH = 1 << 22
"""Tokens that are read at a time, so that memory does not grow with the corpus."""

Number = TypeVar("Number", np.float64, np.int64)


class StoredLosses(NamedTuple):
    """The losses of one corpus in a store: a file, and the column of the losses in it."""

    file: ScoreFile
    column: int

    def read(self, first: int, last: int) -> NDArray[np.float64]:
        """Return the loss of each token from offset `first` to `last`, in nats."""
        return self.file.stretch(first, last)[:, self.column].astype(np.float64)


class DocumentExcess(NamedTuple):
    """The excess loss of the documents of one corpus, over the tokens that count toward it.

    total_D  float64 `[D]`: sum over the document's tokens, in nats
    count_D  int64 `[D]`: number of these tokens
    """

    total_D: NDArray[np.float64]
    count_D: NDArray[np.int64]

    @property
    def mean_D(self) -> NDArray[np.float64]:
        """Nats per token; -inf for a document without a token that counts, so that it ranks below all others."""
        mean_D = np.full(len(self.total_D), -np.inf)
        np.divide(self.total_D, self.count_D, out=mean_D, where=self.count_D > 0)
        return mean_D

    def mean_over(self, document_D: NDArray[np.bool_]) -> float:
        """Return nats per token over all tokens of some documents; NaN if none of their tokens counts."""
        count = self.count_D[document_D].sum()
        return float(self.total_D[document_D].sum() / count) if count else float("nan")


def document_excess(
    corpus: Corpus,
    base: StoredLosses,
    reference: StoredLosses,
    report: Callable[[int], None],
    stretch: int = STRETCH,
) -> DocumentExcess:
    """Sum base loss minus reference loss over each document.

    A token counts unless PREFIX.mask excludes it or one of its losses is not finite.

    Args:
        corpus: the corpus whose documents are ranked.
        base, reference: its losses in two stores.
        report: called with the number of tokens that are done.
        stretch: tokens to read at a time.

    Raises:
        UserError: a store is corrupted.
    """
    documents, mask_N = open_documents(corpus), open_mask(corpus)
    excess = DocumentExcess(np.zeros(corpus.num_documents), np.zeros(corpus.num_documents, dtype=np.int64))
    for first in range(0, corpus.num_tokens, stretch):
        last = min(first + stretch, corpus.num_tokens)
        excess_N = base.read(first, last) - reference.read(first, last)
        counts_N = np.isfinite(excess_N)
        if mask_N is not None:
            counts_N &= mask_N[first:last] != 0
        here = documents.between(first, last)
        begin_D = np.maximum(documents.starts(here) - first, 0)
        excess.total_D[here] += _sums(np.where(counts_N, excess_N, 0.0), begin_D)
        excess.count_D[here] += _sums(counts_N.astype(np.int64), begin_D)
        report(last)
    return excess


def _sums(value_N: NDArray[Number], begin_D: NDArray[np.int64]) -> NDArray[Number]:
    """Return the sum from each beginning to the next; a document without a token sums to zero."""
    # reduceat returns a value, not zero, where two beginnings are equal.
    filled_D = np.diff(begin_D, append=len(value_N)) > 0
    sum_D = np.zeros(len(begin_D), dtype=value_N.dtype)
    sum_D[filled_D] = np.add.reduceat(value_N, begin_D[filled_D])
    return sum_D


def highest(mean_D: NDArray[np.float64], keep: float) -> NDArray[np.bool_]:
    """Select the documents of highest mean: exactly floor(keep * D + 0.5), at least 1; ties go to the earlier one."""
    count = max(1, int(np.floor(keep * len(mean_D) + 0.5)))
    threshold = np.partition(mean_D, len(mean_D) - count)[len(mean_D) - count]
    kept_D: NDArray[np.bool_] = mean_D > threshold
    kept_D[np.flatnonzero(mean_D == threshold)[: count - kept_D.sum()]] = True
    return kept_D


def least_share(mean_D: NDArray[np.float64], some: slice) -> float:
    """Return the smallest share at which `highest` keeps one of some documents."""
    best = some.start + int(mean_D[some].argmax())
    before = np.count_nonzero(mean_D > mean_D[best]) + np.count_nonzero(mean_D[:best] == mean_D[best])
    return float(before + 1) / len(mean_D)
