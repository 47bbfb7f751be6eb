"""Batches: the micro-batches of an optimizer step for each rank, and the windows of an evaluation set.

The order of samples does not depend on the number of ranks: a rank's share is cut from the step's samples at the end.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from megatron_slm.data.corpus import Corpus, map_tokens, open_documents, open_mask
from megatron_slm.data.samples import Sample, Samples
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.types import Batch


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the micro-steps per optimizer step.

    Raises:
        UserError: training.global_batch_size cannot be dealt evenly.
    """
    micro_step_samples = micro_batch_size * world_size
    if global_batch_size % micro_step_samples:
        raise UserError(
            "training.global_batch_size",
            global_batch_size,
            f"it is not a multiple of training.micro_batch_size ({micro_batch_size}) times {world_size} ranks",
            f"Use a multiple of {micro_step_samples}, or another number of ranks",
        )
    return global_batch_size // micro_step_samples


def runs_beside(skip: Sequence[tuple[int, int]], first: int, count: int) -> list[range]:
    """Return, as ranges, the next `count` ordinals from `first` on that no half-open range of `skip` contains."""
    runs = []
    for start, stop in sorted(skip):
        run = range(first, start)[:count]
        if run:
            runs.append(run)
            count -= len(run)
        first = max(first, stop)
    return [*runs, range(first, first + count)] if count else runs


def position_after(skip: Sequence[tuple[int, int]], position: int, count: int) -> int:
    """Return the position after the next `count` samples from `position` on, not counting those to skip."""
    runs = runs_beside(skip, position, count)
    return runs[-1].stop if runs else position


class StepLoader:
    """The micro-batches of one optimizer step for this rank; a thread reads the next step ahead.

    From a position of the order on, not counting samples to skip, micro-step m gets the next b*W samples for
    micro-batch size b and W data-parallel ranks, and rank r the r-th run of b of these. The position is the only state.

    Args:
        samples: the run's order.
        micro_batch_size: samples per rank per micro-step, b.
        global_batch_size: samples per optimizer step.
        reset_attention: restart positions at each document.
        world: the rank and world size of this process.
        skip: half-open ranges of the order to skip.
    """

    def __init__(
        self,
        samples: Samples,
        micro_batch_size: int,
        global_batch_size: int,
        reset_attention: bool,
        world: World,
        skip: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._samples = samples
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._reset_attention = reset_attention
        self._world = world
        self._skip = skip
        accumulation_steps(global_batch_size, micro_batch_size, world.data.size)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def end(self, position: int, steps: int = 1) -> int:
        """Return the position after `steps` steps from `position` on."""
        return position_after(self._skip, position, steps * self._global_batch_size)

    def load(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of the step that begins at `position`, on its device."""
        start, future = self._ahead or (-1, None)
        batches = future.result() if future and start == position else self.read(position)
        following = self.end(position)
        if self.end(following) <= len(self._samples):
            self._ahead = following, self._thread.submit(self.read, following)
        return [batch.to(self._world.device) for batch in batches]

    def read(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of the step that begins at `position`, in host memory."""
        ordinals = list(chain(*runs_beside(self._skip, position, self._global_batch_size)))
        data = self._world.data
        stride = self._micro_batch_size * data.size
        mine = range(data.rank * self._micro_batch_size, len(ordinals), stride)
        return [self._batch(ordinals[first : first + self._micro_batch_size]) for first in mine]

    def _batch(self, ordinals: list[int]) -> Batch:
        return make_batch([self._samples[n] for n in ordinals], ordinals, self._reset_attention)


def make_batch(samples: list[Sample], ordinals: list[int], reset_attention: bool) -> Batch:
    """Return samples as a batch; a label is valid if its token counts toward the loss."""
    text_BS = _stack([sample.text for sample in samples])
    offset_BS = _stack([sample.offset for sample in samples])
    if reset_attention:
        position_BT = _stack([sample.position for sample in samples])[:, :-1]
    else:
        position_BT = torch.arange(text_BS.shape[1] - 1).expand(len(samples), -1)
    return Batch(
        tokens_BT=text_BS[:, :-1],
        labels_BT=text_BS[:, 1:],
        valid_BT=_stack([_valid(sample) for sample in samples])[:, 1:],
        position_ids_BT=position_BT,
        sample_index_B=torch.tensor(ordinals),
        source_B=torch.tensor([sample.source for sample in samples]),
        label_offset_BT=offset_BS[:, 1:],
        continued_B=torch.tensor([sample.continued for sample in samples]),
    )


def _valid(sample: Sample) -> np.ndarray:
    return np.ones(len(sample.text), dtype=bool) if sample.valid is None else sample.valid


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


class EvaluationStream:
    """Windows of `seq_length` tokens over a corpus in the order of its `.bin`; the last one is padded.

    Every token is a label once, except the stream's first. End-of-document tokens are not text, so they are not
    scored, nor are tokens that the mask excludes. Windows do not overlap: a window's first label is predicted from one
    token.

    Args:
        corpus: an opened corpus.
        seq_length: tokens per window, T.
        eod: id of the end-of-document token.
        reset_attention: restart positions at each document.
    """

    def __init__(self, corpus: Corpus, seq_length: int, eod: int, reset_attention: bool) -> None:
        self.num_bytes = corpus.num_bytes
        self._seq_length = seq_length
        self._eod = eod
        self._reset_attention = reset_attention
        self._tokens = map_tokens(corpus)
        self._mask = open_mask(corpus)
        # From the index, because in a chat the end token may also end turns.
        self._document_start = open_documents(corpus).starts()

    def __len__(self) -> int:
        """Return the number of windows; a corpus of one token has one, with nothing to score."""
        return max(1, math.ceil((len(self._tokens) - 1) / self._seq_length))

    def batch(self, windows: list[int]) -> Batch:
        """Return windows as a batch. One beyond the end is all padding, so that all ranks run equally many batches."""
        text_BS, offset_BS = (
            torch.from_numpy(np.stack(rows)) for rows in zip(*map(self._window, windows), strict=True)
        )
        labels_BT, offset_BT = text_BS[:, 1:], offset_BS[:, 1:]
        return Batch(
            tokens_BT=text_BS[:, :-1],
            labels_BT=labels_BT,
            valid_BT=self._counts(offset_BT) & (labels_BT != self._eod),
            position_ids_BT=self._positions(np.array(windows)),
            sample_index_B=torch.tensor(windows),
            source_B=torch.zeros(len(windows), dtype=torch.long),
            label_offset_BT=offset_BT,
            continued_B=self._continued(np.array(windows)),
        )

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        start = window * self._seq_length
        text = np.asarray(self._tokens[start : start + self._seq_length + 1], dtype=np.int64)
        missing = self._seq_length + 1 - len(text)
        offset = np.concatenate([start + np.arange(len(text)), np.full(missing, -1)])
        return np.concatenate([text, np.full(missing, self._eod)]), offset

    def _counts(self, offset_BT: torch.Tensor) -> torch.Tensor:
        """Return False for padding and for tokens that the mask excludes."""
        real_BT = offset_BT >= 0
        return real_BT if self._mask is None else real_BT & torch.from_numpy(self._mask[offset_BT.numpy()]).bool()

    def _continued(self, window_B: np.ndarray) -> torch.Tensor:
        """Return for each window the tokens at its beginning that continue a document from before it, int64 `[B]`."""
        start_B = window_B * self._seq_length
        document_B = np.searchsorted(self._document_start, start_B, side="right") - 1
        end_B = np.append(self._document_start, len(self._tokens))[document_B + 1]
        continued_B = (end_B - start_B).clip(0, self._seq_length + 1)
        return torch.from_numpy(np.where(self._document_start[document_B] < start_B, continued_B, 0))

    def _positions(self, window_B: np.ndarray) -> torch.Tensor:
        start_B1 = window_B[:, None] * self._seq_length
        place_BT = start_B1 + np.arange(self._seq_length)
        if not self._reset_attention:
            return torch.from_numpy(place_BT - start_B1)
        document_BT = np.searchsorted(self._document_start, place_BT, side="right") - 1
        return torch.from_numpy(place_BT - np.maximum(self._document_start[document_BT], start_B1))
