"""Deals the samples of an optimizer step to the ranks. The rank's share is taken last, so the order knows no ranks."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from megatron_slm.data.samples import Sample, Samples
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.types import Batch


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-steps an optimizer step.

    Raises:
        UserError: the global batch cannot be dealt evenly.
    """
    at_once = micro_batch_size * world_size
    if global_batch_size % at_once:
        raise UserError(
            f"training.global_batch_size is {global_batch_size}, not a multiple of training.micro_batch_size "
            f"({micro_batch_size}) times {world_size} ranks: use a multiple of {at_once}, or another number of ranks."
        )
    return global_batch_size // at_once


def runs_beside(skip: Sequence[tuple[int, int]], first: int, count: int) -> list[range]:
    """The next `count` ordinals from `first` on that are in none of the half-open ranges of `skip`, as runs."""
    runs = []
    for start, stop in sorted(skip):
        run = range(first, start)[:count]
        if run:
            runs.append(run)
            count -= len(run)
        first = max(first, stop)
    return [*runs, range(first, first + count)] if count else runs


def position_after(skip: Sequence[tuple[int, int]], position: int, count: int) -> int:
    """The position in the order behind the next `count` samples from this one on, without those to skip."""
    runs = runs_beside(skip, position, count)
    return runs[-1].stop if runs else position


class StepLoader:
    """The micro-batches of one optimizer step for this rank, the next step read ahead in a thread.

    Of the samples from a position of the order on, without those to skip, micro-step m takes the next b*W for
    micro-batch b and W ranks, and rank r the r-th run of b. Seeking is arithmetic: the state is the position.

    Args:
        samples: the run's order.
        micro_batch_size: samples a rank and micro-step, b.
        global_batch_size: samples an optimizer step.
        reset_attention: positions restart at each document.
        world: this process among all.
        skip: half-open ranges of the order that are left out.
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
        accumulation_steps(global_batch_size, micro_batch_size, world.size)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def end(self, position: int, steps: int = 1) -> int:
        """The position after so many steps from this one on."""
        return position_after(self._skip, position, steps * self._global_batch_size)

    def take(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins at this position of the order, on its device."""
        start, future = self._ahead or (-1, None)
        batches = future.result() if future and start == position else self.read(position)
        following = self.end(position)
        if self.end(following) <= len(self._samples):
            self._ahead = following, self._thread.submit(self.read, following)
        return [batch.to(self._world.device) for batch in batches]

    def read(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of the step that begins at this position, in host memory."""
        ordinals = list(chain(*runs_beside(self._skip, position, self._global_batch_size)))
        stride = self._micro_batch_size * self._world.size
        mine = range(self._world.rank * self._micro_batch_size, len(ordinals), stride)
        return [self._batch(ordinals[first : first + self._micro_batch_size]) for first in mine]

    def _batch(self, ordinals: list[int]) -> Batch:
        return make_batch([self._samples[n] for n in ordinals], ordinals, self._reset_attention)


def make_batch(samples: list[Sample], ordinals: list[int], reset_attention: bool) -> Batch:
    """Samples side by side: a label is valid where its token counts."""
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
