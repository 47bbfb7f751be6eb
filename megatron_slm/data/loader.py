"""Batches: the micro-batches of an optimizer step for each rank, and the windows of an evaluation set.

The samples of a step are chosen before they are divided among the ranks, so their order does not depend on the number
of ranks.
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
        UserError: training.global_batch_size does not divide evenly among the ranks.
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
    """Return the next `count` ordinals from `first` on as ranges, without those in the half-open ranges of `skip`."""
    runs = []
    for start, stop in sorted(skip):
        # A slice of a range takes at most `count` ordinals; it is empty if `first` is past `start`.
        run = range(first, start)[:count]
        if run:
            runs.append(run)
            count -= len(run)
        # Ranges may overlap, so an earlier one may end later.
        first = max(first, stop)
    return [*runs, range(first, first + count)] if count else runs


def position_after(skip: Sequence[tuple[int, int]], position: int, count: int) -> int:
    """Return the position after the next `count` samples from `position` on, without those in `skip`."""
    runs = runs_beside(skip, position, count)
    return runs[-1].stop if runs else position


class StepLoader:
    """A loader of this rank's micro-batches, one optimizer step at a time; a thread reads the next step ahead.

    With micro-batch size b and W data-parallel ranks, each micro-step takes the next b * W samples of the order that
    are not skipped, and rank r takes samples r * b to r * b + b - 1 of these. The position in the order is the only
    state that a resume needs.

    Args:
        samples: the samples of the run, in its order.
        micro_batch_size: samples per rank per micro-step, b.
        global_batch_size: samples per optimizer step, over all ranks.
        reset_attention: restart positions at each document.
        world: the rank and world size of this process.
        skip: half-open ranges of the order to skip.
        vocabulary: number of ids of the tokenizer, to refuse damaged corpora; None not to check.
        prefixes: of the corpora of the blend, for the error of a damaged one.

    Raises:
        UserError: see `accumulation_steps`; `load` and `read` raise one for ids outside the vocabulary.
    """

    def __init__(
        self,
        samples: Samples,
        micro_batch_size: int,
        global_batch_size: int,
        reset_attention: bool,
        world: World,
        skip: Sequence[tuple[int, int]] = (),
        vocabulary: int | None = None,
        prefixes: Sequence[str] = (),
    ) -> None:
        self._samples = samples
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._reset_attention = reset_attention
        self._world = world
        self._skip = skip
        self._vocabulary = vocabulary
        self._prefixes = prefixes
        accumulation_steps(global_batch_size, micro_batch_size, world.data.size)  # raises an error for bad sizes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def end(self, position: int, steps: int = 1) -> int:
        """Return the position after `steps` steps from `position` on."""
        return position_after(self._skip, position, steps * self._global_batch_size)

    def load(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of the step that begins at `position`, on its device."""
        start, future = self._ahead or (-1, None)
        # Nothing was read ahead for the first step, or if the caller jumps to another position.
        batches = future.result() if future and start == position else self.read(position)
        following = self.end(position)
        # Only whole steps of cycles that are already built: building a cycle needs all ranks.
        if self.end(following) <= len(self._samples):
            self._ahead = following, self._thread.submit(self.read, following)
        return [batch.to(self._world.device) for batch in batches]

    def read(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of the step that begins at `position`, in host memory."""
        ordinals = list(chain(*runs_beside(self._skip, position, self._global_batch_size)))
        data = self._world.data
        stride = self._micro_batch_size * data.size
        # Each stride of ordinals is a micro-step, in which the ranks take consecutive micro-batches.
        mine = range(data.rank * self._micro_batch_size, len(ordinals), stride)
        return [self._batch(ordinals[first : first + self._micro_batch_size]) for first in mine]

    def _batch(self, ordinals: list[int]) -> Batch:
        samples = [self._samples[n] for n in ordinals]
        for sample in samples:
            self._refuse_damaged(sample)
        return make_batch(samples, ordinals, self._reset_attention)

    def _refuse_damaged(self, sample: Sample) -> None:
        """Raise an error for ids that no embedding has: on a GPU, they would end in an assertion without a name."""
        if self._vocabulary is None:
            return
        outside = (sample.text < 0) | (sample.text >= self._vocabulary)
        if outside.any():
            first = int(outside.argmax())
            raise UserError(
                "data.train",
                self._prefixes[sample.source],
                f"token {sample.offset[first]} of its .bin is {sample.text[first]}, and its tokenizer has "
                f"{self._vocabulary} ids, so the file is damaged",
                "Check it with megatron-slm prepare --verify, and prepare it again",
            )


def make_batch(samples: list[Sample], ordinals: list[int], reset_attention: bool) -> Batch:
    """Return samples as a batch of B; a label is valid if its token counts toward the loss.

    Args:
        samples: samples of T + 1 tokens.
        ordinals: the number of each sample in the run's order.
        reset_attention: restart positions at each document.
    """
    text_BS = _stack([sample.text for sample in samples])
    offset_BS = _stack([sample.offset for sample in samples])
    valid_BS = _stack([np.ones(len(s.text), dtype=bool) if s.valid is None else s.valid for s in samples])
    if reset_attention:
        position_BT = _stack([sample.position for sample in samples])[:, :-1]
    else:
        position_BT = torch.arange(text_BS.shape[1] - 1).expand(len(samples), -1)
    return Batch(
        tokens_BT=text_BS[:, :-1],
        labels_BT=text_BS[:, 1:],
        valid_BT=valid_BS[:, 1:],
        position_ids_BT=position_BT,
        sample_index_B=torch.tensor(ordinals),
        source_B=torch.tensor([sample.source for sample in samples]),
        label_offset_BT=offset_BS[:, 1:],
        continued_B=torch.tensor([sample.continued for sample in samples]),
    )


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


class EvaluationStream:
    """Windows of `seq_length` tokens over a corpus in the order of its `.bin`; the last one is padded.

    Every token is a label once, except the stream's first. End-of-document tokens are not text, so they are not
    scored; nor are tokens that the mask excludes. Windows do not overlap, so the first label of a window is predicted
    from one token.

    Args:
        corpus: an opened corpus.
        seq_length: labels per window, T.
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
        # Read from the index, because in a chat the end-of-document token may also end turns.
        self._document_start = open_documents(corpus).starts()

    def __len__(self) -> int:
        """Return the number of windows; a corpus of one token has one, with nothing to score."""
        return max(1, math.ceil((len(self._tokens) - 1) / self._seq_length))

    def batch(self, windows: list[int]) -> Batch:
        """Return windows as a batch. One beyond the end is all padding, so that all ranks run equally many batches."""
        start_B = np.array(windows) * self._seq_length
        # Consecutive windows share a token: the last label of one is the first input of the next.
        offset_BS = start_B[:, None] + np.arange(self._seq_length + 1)
        is_real_BS = offset_BS < len(self._tokens)
        offset_BS[~is_real_BS] = -1  # padding
        text_BS = np.where(is_real_BS, self._tokens[offset_BS].astype(np.int64), self._eod)
        counts_BS = is_real_BS & (text_BS != self._eod)
        if self._mask is not None:
            counts_BS &= self._mask[offset_BS] != 0
        return Batch(
            tokens_BT=torch.from_numpy(text_BS[:, :-1]),
            labels_BT=torch.from_numpy(text_BS[:, 1:]),
            valid_BT=torch.from_numpy(counts_BS[:, 1:]),
            position_ids_BT=self._positions(start_B),
            sample_index_B=torch.tensor(windows),
            source_B=torch.zeros(len(windows), dtype=torch.long),
            label_offset_BT=torch.from_numpy(offset_BS[:, 1:]),
            continued_B=self._continued(start_B),
        )

    def _continued(self, start_B: np.ndarray) -> Tensor:
        """Return how many tokens at the start of each window continue an earlier document, int64 `[B]`."""
        document_B = np.searchsorted(self._document_start, start_B, side="right") - 1
        end_B = np.append(self._document_start, len(self._tokens))[document_B + 1]
        # A window beyond the end of the stream begins after the last document.
        continued_B = (end_B - start_B).clip(0, self._seq_length + 1)
        return torch.from_numpy(np.where(self._document_start[document_B] < start_B, continued_B, 0))

    def _positions(self, start_B: np.ndarray) -> Tensor:
        """Return the position of each token in its window or, if attention is reset, in its part of a document."""
        place_BT = start_B[:, None] + np.arange(self._seq_length)
        origin_BT = start_B[:, None]
        if self._reset_attention:
            document_BT = np.searchsorted(self._document_start, place_BT, side="right") - 1
            # A document that began in an earlier window counts from the beginning of this one.
            origin_BT = np.maximum(self._document_start[document_BT], origin_BT)
        return torch.from_numpy(place_BT - origin_BT)
