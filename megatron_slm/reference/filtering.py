"""The excess loss of documents, and the choice of the documents to keep."""

from collections.abc import Callable
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
    """The excess loss (base minus reference) of the D documents of one corpus; see `document_excess`.

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
        report: called with the number of finished tokens.
        stretch: number of tokens to read at a time.

    Raises:
        UserError: a store is damaged.
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
