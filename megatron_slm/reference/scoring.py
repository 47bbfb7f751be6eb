"""Scoring with a model: the batches that score a file of a store, shard by shard, and the values that it computes.

A shard is a range of rows that are computed, written and flushed together. The batches of a shard depend only on
settings, not on the number of ranks, so any number of ranks writes the same bytes.

Suffixes: D documents, N windows, B sequences of a batch, T labels of a sequence, S its tokens (T + 1), R rows of a
shard, C columns.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_slm.data.corpus import Corpus, map_tokens, open_documents
from megatron_slm.data.loader import make_batch
from megatron_slm.data.samples import Samples
from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.types import Batch


class ScoringBatch(NamedTuple):
    """A batch, and the row of the file for each of its valid labels, int64 `[B, T]`."""

    batch: Batch
    row_BT: Tensor


class Shard(NamedTuple):
    """The rows `start` to `stop - 1` of a file, and functions that make the batches that fill them."""

    start: int
    stop: int
    batches: Sequence[Callable[[], ScoringBatch]]


class Work(Protocol):
    """The batches that score one file.

    rows        number of rows of the file
    num_shards  number of shards of the file
    """

    rows: int
    num_shards: int

    def shard(self, number: int) -> Shard:
        """Return a shard; the shards together cover every row once, in order."""


DOCUMENT_CONTEXT = (
    "Each token in the context of its own document: an end-of-document token and all tokens of the document before it; "
    "from token {window} on, at least the last {least} of them (windows of {window} tokens that overlap by half). "
    "Positions count from the beginning of the window."
)


class Windows(NamedTuple):
    """Windows over a `.bin`, as offsets of labels in it, int64 `[N]`.

    begin     the first label
    scored    the first label that is scored; those before it are context
    end       the label after the last
    is_first  bool `[N]`: True if the window begins with its document
    """

    begin: NDArray[np.int64]
    scored: NDArray[np.int64]
    end: NDArray[np.int64]
    is_first: NDArray[np.bool_]


class DocumentWork:
    """The batches of a store of kind `document`; see `Work`. A row is an offset of the corpus's `.bin`.

    Args:
        corpus: an opened corpus.
        eod: id of the end-of-document token.
        window: labels per window, T.
        batch_tokens: largest number of labels per batch, padding included.
        shard_tokens: rows per shard, at least one window.
    """

    def __init__(self, corpus: Corpus, eod: int, window: int, batch_tokens: int, shard_tokens: int) -> None:
        self._layout = open_documents(corpus)
        self.rows = corpus.num_tokens
        self._shard_tokens = max(shard_tokens, window)
        self.num_shards = -(-self.rows // self._shard_tokens)
        self._tokens = map_tokens(corpus)
        self._eod = eod
        self._window = window
        self._batch_tokens = batch_tokens

    def shard(self, number: int) -> Shard:
        first = number * self._shard_tokens
        windows = self._windows(first, min(first + self._shard_tokens, self.rows))
        if not len(windows.begin):
            return Shard(first, first, [])
        batches = [partial(self._batch, windows, picked_B) for picked_B in self._batches(windows)]
        return Shard(int(windows.scored[0]), int(windows.end[-1]), batches)

    def _windows(self, first: int, last: int) -> Windows:
        """Return the windows whose first scored label is at offset `first` to `last - 1`, in order."""
        start_D, length_D = self._documents(first, last)
        window, stride = self._window, max(1, self._window // 2)
        count_D = 1 + np.maximum(0, -(-(length_D - window) // stride))
        document_N = np.repeat(np.arange(len(start_D)), count_D)
        turn_N = np.arange(len(document_N)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
        start_N, length_N = start_D[document_N], length_D[document_N]
        # The first window of a document scores all of its labels; each later one the `stride` labels that it adds.
        scored_N = start_N + np.where(turn_N == 0, 0, window + (turn_N - 1) * stride)
        end_N = start_N + np.minimum(length_N, window + turn_N * stride)
        here_N = (first <= scored_N) & (scored_N < last) & (scored_N < end_N)
        return Windows((start_N + turn_N * stride)[here_N], scored_N[here_N], end_N[here_N], turn_N[here_N] == 0)

    def _documents(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the start and length, in tokens, of the documents that overlap offsets `first` to `last - 1`."""
        here = self._layout.between(first, last)
        return self._layout.starts(here), self._layout.length_D[here].astype(np.int64)

    def _batches(self, windows: Windows) -> list[NDArray[np.int64]]:
        """Divide windows into batches of similar lengths, to keep padding low."""
        length_N = windows.end - windows.begin
        order_N = np.argsort(-length_N, kind="stable")
        batches, start = [], 0
        while start < len(order_N):
            stop = start + max(1, self._batch_tokens // int(length_N[order_N[start]]))
            batches.append(order_N[start:stop])
            start = stop
        return batches

    def _batch(self, windows: Windows, picked_B: NDArray[np.int64]) -> ScoringBatch:
        begin_B1, scored_B1, end_B1 = (torch.from_numpy(column[picked_B])[:, None] for column in windows[:3])
        row_BT = begin_B1 + torch.arange(int((end_B1 - begin_B1).max()))
        picked = zip(windows.begin[picked_B], windows.end[picked_B], windows.is_first[picked_B], strict=True)
        text = [self._text(*window) for window in picked]
        # Padding comes after the text, so causal attention keeps it from affecting the text.
        text_BS = torch.nn.utils.rnn.pad_sequence(text, batch_first=True, padding_value=self._eod)
        batch = Batch(
            tokens_BT=text_BS[:, :-1],
            labels_BT=text_BS[:, 1:],
            valid_BT=(row_BT >= scored_B1) & (row_BT < end_B1),
            position_ids_BT=torch.arange(row_BT.shape[1]).expand(row_BT.shape),
            sample_index_B=torch.from_numpy(picked_B),
            source_B=torch.zeros(len(picked_B), dtype=torch.long),
            label_offset_BT=row_BT,
            continued_B=torch.from_numpy(np.where(windows.is_first, 0, windows.end - windows.begin)[picked_B]),
        )
        return ScoringBatch(batch, row_BT)

    def _text(self, begin: np.int64, end: np.int64, is_first: np.bool_) -> Tensor:
        """Return the token before the window's labels, then the labels, int64 `[S]`."""
        text = self._tokens[begin - 1 : end] if begin else np.append(self._eod, self._tokens[begin:end])
        text = text.astype(np.int64)
        if is_first:
            # An adopted corpus may end its documents with another token, or with none.
            text[0] = self._eod
        return torch.from_numpy(text)


PACKED_CONTEXT = (
    "Each token in the sample in which it is trained: {length} tokens of consecutive documents, with attention "
    "{attention}. The first label of a sample is predicted from one token."
)


class PackedWork:
    """The batches of a store of kind `packed`; see `Work`. A row is `sample * seq_length + position` of the order.

    Args:
        samples: the run's order of samples.
        num_samples: samples to score, from the beginning of the order.
        seq_length: labels per sample, T.
        micro_batch_size: samples per batch.
        shard_tokens: rows per shard, rounded down to whole batches.
        reset_attention: restart positions at each document.
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


class Values(NamedTuple):
    """Values of consecutive rows from row `start` on, float32 `[rows, columns]`, in nats."""

    start: int
    values_NC: NDArray[np.float32]


class Source(Protocol):
    """A source of the values of one file.

    rows        number of rows of the file
    num_shards  number of shards of the file
    """

    rows: int
    num_shards: int

    def values(self, number: int, report: Callable[[int], None]) -> Values:
        """Return the values of a shard, the same on every rank. Every rank calls it, for the shards in order.

        Args:
            number: number of the shard.
            report: called with the number of finished rows of the shard.

        Raises:
            UserError: the values cannot be read.
        """


class SourcePart:
    """The shards `first` to `last - 1` of a source; see `Source`. Its number of rows is an estimate, for progress."""

    def __init__(self, whole: Source, first: int, last: int) -> None:
        self.num_shards = last - first
        self.rows = whole.rows * last // whole.num_shards - whole.rows * first // whole.num_shards
        self._whole, self._first = whole, first

    def values(self, number: int, report: Callable[[int], None]) -> Values:
        return self._whole.values(self._first + number, report)


class ModelSource:
    """A model that computes the values. Of W data-parallel ranks, rank i mod W scores batch i of a shard.

    Args:
        module: a `CausalLM` as its engine runs it, replicated or sharded.
        work: the batches that score the file.
        columns: the columns of a row, `loss` first.
        world: the rank and world size of this process.
    """

    def __init__(self, module: nn.Module, work: Work, columns: list[str], world: World) -> None:
        self.rows, self.num_shards = work.rows, work.num_shards
        self._module = module
        self._work = work
        self._columns = columns
        self._world = world

    @torch.no_grad()
    def values(self, number: int, report: Callable[[int], None]) -> Values:
        shard = self._work.shard(number)
        size, data = shard.stop - shard.start, self._world.data
        # An extra row collects the values to drop: dropping them by a mask would synchronize with the device.
        value_RC = torch.zeros(size + 1, len(self._columns), device=self._world.device)
        for first in range(0, len(shard.batches), data.size):
            self._run(shard, first + data.rank, value_RC)
            report(min(size, size * (first + data.size) // len(shard.batches)))
        # One rank holds the value of a row and all others zero, so the sum is exact.
        return Values(shard.start, all_reduce_sum(value_RC[:size], data.group).cpu().numpy())

    def _run(self, shard: Shard, index: int, value_RC: Tensor) -> None:
        """Score a batch of this rank. Past the last batch, rerun the last: a sharded model needs all ranks."""
        batch, row_BT = shard.batches[min(index, len(shard.batches) - 1)]()
        batch, row_BT = batch.to(self._world.device), row_BT.to(self._world.device)
        signals = score_batch(self._module, batch, tuple(self._columns[1:]))
        kept_BT = batch.valid_BT & (index < len(shard.batches))
        row_N = (row_BT - shard.start).masked_fill(~kept_BT, len(value_RC) - 1).flatten()
        value_RC[row_N] = torch.stack([signals[name].flatten() for name in self._columns], -1).float()
