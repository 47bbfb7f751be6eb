"""The excess loss of documents: sums over their tokens, read in stretches, so that memory does not grow with tokens."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.corpus import Corpus, open_mask, open_tokens
from megatron_slm.reference.store import ScoreFile

STRETCH = 1 << 22
"""Tokens that are read at a time."""

Number = TypeVar("Number", np.float64, np.int64)


class Losses(NamedTuple):
    """What a store says of one corpus: its file, and which of the file's columns holds the losses."""

    file: ScoreFile
    column: int

    def read(self, first: int, last: int) -> NDArray[np.float64]:
        """Loss of each token from offset `first` to `last`, in nats."""
        return self.file.stretch(first, last)[:, self.column].astype(np.float64)


class DocumentExcess(NamedTuple):
    """Of each document of one corpus, `[D]`: float64 sum of the excess loss of tokens that count, and their number."""

    total_D: NDArray[np.float64]
    count_D: NDArray[np.int64]

    @property
    def mean_D(self) -> NDArray[np.float64]:
        """Nats a token; minus infinity where nothing counts, below every document in which something does."""
        mean_D = np.full(len(self.total_D), -np.inf)
        np.divide(self.total_D, self.count_D, out=mean_D, where=self.count_D > 0)
        return mean_D

    def mean_over(self, documents: NDArray[np.bool_]) -> float:
        """Nats a token over all tokens that count in some of the documents; NaN where there is none."""
        count = self.count_D[documents].sum()
        return float(self.total_D[documents].sum() / count) if count else float("nan")


def document_excess(
    corpus: Corpus, base: Losses, reference: Losses, told: Callable[[int], None], stretch: int = STRETCH
) -> DocumentExcess:
    """Base loss minus reference loss, summed over each document.

    A token counts unless PREFIX.mask says otherwise, or one of the losses is no number.

    Args:
        corpus: whose documents are summed over.
        base, reference: what two stores say of it.
        told: hears how many tokens are done.
        stretch: tokens to read at a time.

    Raises:
        UserError: a store is corrupted.
    """
    index, mask_N = open_tokens(corpus).index, open_mask(corpus)
    found = DocumentExcess(np.zeros(corpus.num_documents), np.zeros(corpus.num_documents, dtype=np.int64))
    for first in range(0, corpus.num_tokens, stretch):
        last = min(first + stretch, corpus.num_tokens)
        excess_N = base.read(first, last) - reference.read(first, last)
        counts_N = np.isfinite(excess_N)
        if mask_N is not None:
            counts_N &= mask_N[first:last] != 0
        low, begin_D = _begins(index.sequence_pointers, index.dtype_size, first, last)
        documents = slice(low, low + len(begin_D))
        found.total_D[documents] += _sums(np.where(counts_N, excess_N, 0.0), begin_D)
        found.count_D[documents] += _sums(counts_N.astype(np.int64), begin_D)
        told(last)
    return found


def _begins(pointer_D: NDArray[np.int64], item_size: int, first: int, last: int) -> tuple[int, NDArray[np.int64]]:
    """The first document that reaches into a stretch of the .bin, and where it and those after it begin in there."""
    low = int(np.searchsorted(pointer_D, first * item_size, "right")) - 1
    high = int(np.searchsorted(pointer_D, last * item_size, "left"))
    return low, np.maximum(pointer_D[low:high] // item_size - first, 0)


def _sums(value_N: NDArray[Number], begin_D: NDArray[np.int64]) -> NDArray[Number]:
    """Sum from each beginning to the next; a document without a token sums to zero."""
    filled_D = np.diff(begin_D, append=len(value_N)) > 0
    sum_D = np.zeros(len(begin_D), dtype=value_N.dtype)
    sum_D[filled_D] = np.add.reduceat(value_N, begin_D[filled_D])
    return sum_D


def highest(mean_D: NDArray[np.float64], keep: float) -> NDArray[np.bool_]:
    """Which documents to keep: exactly floor(keep * D + 0.5) of them, at least 1, ties to the earlier document."""
    count = max(1, int(np.floor(keep * len(mean_D) + 0.5)))
    threshold = np.partition(mean_D, len(mean_D) - count)[len(mean_D) - count]
    kept_D = mean_D > threshold
    kept_D[np.flatnonzero(mean_D == threshold)[: count - kept_D.sum()]] = True
    return kept_D


def least_share(mean_D: NDArray[np.float64], some: slice) -> float:
    """The share of all documents up to the best of some of them: `highest` keeps that one, and with one fewer none."""
    best = some.start + int(mean_D[some].argmax())
    before = np.count_nonzero(mean_D > mean_D[best]) + np.count_nonzero(mean_D[:best] == mean_D[best])
    return float(before + 1) / len(mean_D)
