"""Deals the samples of an optimizer step to the ranks. The rank's share is taken last, so the order knows no ranks."""

from concurrent.futures import Future, ThreadPoolExecutor

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


class StepLoader:
    """The micro-batches of one optimizer step for this rank, the next step read ahead in a thread.

    With c samples consumed, micro-batch b and W ranks, micro-step m takes the next b*W samples,
    rank r the r-th run of b. Seeking is arithmetic: the state is the number of consumed samples.

    Args:
        samples: the run's order.
        micro_batch_size: samples a rank and micro-step, b.
        global_batch_size: samples an optimizer step.
        reset_attention: positions restart at each document.
        world: this process among all.
    """

    def __init__(
        self, samples: Samples, micro_batch_size: int, global_batch_size: int, reset_attention: bool, world: World
    ) -> None:
        self._samples = samples
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._reset_attention = reset_attention
        self._world = world
        self._accumulation = accumulation_steps(global_batch_size, micro_batch_size, world.size)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def take(self, consumed_samples: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins after so many samples, on its device."""
        start, future = self._ahead or (-1, None)
        batches = future.result() if future and start == consumed_samples else self._read(consumed_samples)
        following = consumed_samples + self._global_batch_size
        if following + self._global_batch_size <= len(self._samples):
            self._ahead = following, self._thread.submit(self._read, following)
        return [batch.to(self._world.device) for batch in batches]

    def _read(self, consumed_samples: int) -> list[Batch]:
        stride = self._micro_batch_size * self._world.size
        mine = consumed_samples + self._world.rank * self._micro_batch_size
        return [self._batch(mine + micro_step * stride) for micro_step in range(self._accumulation)]

    def _batch(self, first: int) -> Batch:
        ordinals = range(first, first + self._micro_batch_size)
        return make_batch([self._samples[n] for n in ordinals], list(ordinals), self._reset_attention)


def make_batch(samples: list[Sample], ordinals: list[int], reset_attention: bool) -> Batch:
    """Samples side by side: every label is valid."""
    text_BS = _stack([sample.text for sample in samples])
    offset_BS = _stack([sample.offset for sample in samples])
    if reset_attention:
        position_BT = _stack([sample.position for sample in samples])[:, :-1]
    else:
        position_BT = torch.arange(text_BS.shape[1] - 1).expand(len(samples), -1)
    return Batch(
        tokens_BT=text_BS[:, :-1],
        labels_BT=text_BS[:, 1:],
        valid_BT=torch.ones_like(text_BS[:, 1:], dtype=torch.bool),
        position_ids_BT=position_BT,
        sample_index_B=torch.tensor(ordinals),
        source_B=torch.tensor([sample.source for sample in samples]),
        label_offset_BT=offset_BS[:, 1:],
    )


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
