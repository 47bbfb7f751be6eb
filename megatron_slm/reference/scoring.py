"""What is to be scored, in shards: stretches of rows that are computed, written and flushed together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_slm.data.corpus import Corpus, open_tokens
from megatron_slm.data.loader import make_batch
from megatron_slm.data.samples import Samples
from megatron_slm.types import Batch


class ScoringBatch(NamedTuple):
    """A batch, and the row of the file that each of its valid labels belongs to: int64 `[B, T]`."""

    batch: Batch
    row_BT: Tensor


class Shard(NamedTuple):
    """Rows `start` to `stop`, and the batches that fill them, each made on demand."""

    start: int
    stop: int
    batches: Sequence[Callable[[], ScoringBatch]]


class Work(Protocol):
    """One file's worth, the same whatever the number of ranks: batches depend on nothing but the settings."""

    rows: int
    num_shards: int

    def shard(self, number: int) -> Shard: ...


DOCUMENT_CONTEXT = (
    "Each token in the context of its own document: after an end-of-document token that stands before the document, "
    "and all of the document's tokens before it, or, from token {window} on, at least the last {least} of them "
    "(windows of {window} tokens that overlap by half). Positions count from the beginning of the window."
)


class Windows(NamedTuple):
    """Windows over a .bin, int64 `[N]` offsets of labels: where each begins, scores from, and ends.

    is_first  bool `[N]`: it begins with its document
    """

    begin: NDArray[np.int64]
    scored: NDArray[np.int64]
    end: NDArray[np.int64]
    is_first: NDArray[np.bool_]


class DocumentWork:
    """See `Work`: a row is an offset of the corpus's `.bin`.

    Args:
        corpus: an opened corpus.
        eod: id of the end-of-document token.
        window: tokens a window, T.
        batch_tokens: at most so many in a batch.
        shard_tokens: a shard.
    """

    def __init__(self, corpus: Corpus, eod: int, window: int, batch_tokens: int, shard_tokens: int) -> None:
        self._index = open_tokens(corpus).index  # held, for it takes its arrays with it when it goes
        self.rows = corpus.num_tokens
        self.num_shards = -(-self.rows // max(shard_tokens, window))
        self._shard_tokens = max(shard_tokens, window)
        self._tokens = np.memmap(f"{corpus.prefix}.bin", self._index.dtype, "r")
        self._eod = eod
        self._window = window
        self._batch_tokens = batch_tokens

    def shard(self, number: int) -> Shard:
        first = number * self._shard_tokens
        windows = self._windows(first, min(first + self._shard_tokens, self.rows))
        if not len(windows.begin):
            return Shard(first, first, [])
        batches = [partial(self._batch, windows, picked) for picked in self._batches(windows)]
        return Shard(int(windows.scored[0]), int(windows.end[-1]), batches)

    def _windows(self, first: int, last: int) -> Windows:
        """Those that begin to score in this stretch, in the order of what they score."""
        start_D, length_D = self._documents(first, last)
        window, stride = self._window, max(1, self._window // 2)
        count_D = 1 + np.maximum(0, -(-(length_D - window) // stride))
        document_N = np.repeat(np.arange(len(start_D)), count_D)
        turn_N = np.arange(len(document_N)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
        start_N, length_N = start_D[document_N], length_D[document_N]
        scored_N = start_N + np.where(turn_N == 0, 0, window + (turn_N - 1) * stride)
        end_N = start_N + np.minimum(length_N, window + turn_N * stride)
        here_N = (first <= scored_N) & (scored_N < last) & (scored_N < end_N)
        return Windows((start_N + turn_N * stride)[here_N], scored_N[here_N], end_N[here_N], turn_N[here_N] == 0)

    def _documents(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start and length in tokens of the documents that reach into a stretch of the .bin."""
        pointer_D, item_size = self._index.sequence_pointers, self._index.dtype_size
        low = np.searchsorted(pointer_D, first * item_size, "right") - 1
        high = np.searchsorted(pointer_D, last * item_size, "left")
        return pointer_D[low:high] // item_size, self._index.sequence_lengths[low:high].astype(np.int64)

    def _batches(self, windows: Windows) -> list[NDArray[np.int64]]:
        """Windows of about one length together, so that little is padding."""
        length_N = windows.end - windows.begin
        order_N = np.argsort(-length_N, kind="stable")
        batches, start = [], 0
        while start < len(order_N):
            stop = start + max(1, self._batch_tokens // int(length_N[order_N[start]]))
            batches.append(order_N[start:stop])
            start = stop
        return batches

    def _batch(self, windows: Windows, picked: NDArray[np.int64]) -> ScoringBatch:
        begin_B1, scored_B1, end_B1 = (torch.from_numpy(column[picked])[:, None] for column in windows[:3])
        row_BT = begin_B1 + torch.arange(int((end_B1 - begin_B1).max()))
        chosen = zip(windows.begin[picked], windows.end[picked], windows.is_first[picked], strict=True)
        text = [self._text(*window) for window in chosen]
        # Behind a window there is padding, which nothing before it attends to.
        text_BS = torch.nn.utils.rnn.pad_sequence(text, batch_first=True, padding_value=self._eod)
        batch = Batch(
            tokens_BT=text_BS[:, :-1],
            labels_BT=text_BS[:, 1:],
            valid_BT=(row_BT >= scored_B1) & (row_BT < end_B1),
            position_ids_BT=torch.arange(row_BT.shape[1]).expand(row_BT.shape),
            sample_index_B=torch.from_numpy(picked),
            source_B=torch.zeros(len(picked), dtype=torch.long),
            label_offset_BT=row_BT,
            continued_B=torch.from_numpy(np.where(windows.is_first, 0, windows.end - windows.begin)[picked]),
        )
        return ScoringBatch(batch, row_BT)

    def _text(self, begin: np.int64, end: np.int64, is_first: np.bool_) -> torch.Tensor:
        """int64: the token before the window's labels, and these."""
        text = self._tokens[begin - 1 : end] if begin else np.append(self._eod, self._tokens[begin:end])
        text = text.astype(np.int64)
        if is_first:
            text[0] = self._eod
        return torch.from_numpy(text)


PACKED_CONTEXT = (
    "Each token in the sample that it is trained in: {length} tokens of consecutive documents, {attention}; the first "
    "label of a sample is predicted from one token."
)


class PackedWork:
    """See `Work`: a row is `sample * seq_length + position` of the run's order.

    Args:
        samples: of the run.
        num_samples: of the order, from its beginning.
        seq_length: tokens a sample, T.
        micro_batch_size: samples a batch.
        shard_tokens: a shard, in whole batches.
        reset_attention: positions restart at each document.
    """

    def __init__(
        self,
        samples: Samples,
        num_samples: int,
        seq_length: int,
        micro_batch_size: int,
        shard_tokens: int,
        reset_attention: bool,
    ) -> None:
        self.rows = num_samples * seq_length
        self._samples = samples
        self._num_samples = num_samples
        self._seq_length = seq_length
        self._micro_batch_size = micro_batch_size
        self._reset_attention = reset_attention
        self._shard_samples = max(1, shard_tokens // (seq_length * micro_batch_size)) * micro_batch_size
        self.num_shards = -(-num_samples // self._shard_samples)

    def shard(self, number: int) -> Shard:
        first = number * self._shard_samples
        last = min(first + self._shard_samples, self._num_samples)
        starts = range(first, last, self._micro_batch_size)
        batches = [partial(self._batch, start, min(start + self._micro_batch_size, last)) for start in starts]
        return Shard(first * self._seq_length, last * self._seq_length, batches)

    def _batch(self, first: int, last: int) -> ScoringBatch:
        ordinals = list(range(first, last))
        batch = make_batch([self._samples[n] for n in ordinals], ordinals, self._reset_attention)
        return ScoringBatch(batch, batch.token_position_BT)
