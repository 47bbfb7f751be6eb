"""How a model is held and stepped on many ranks. `deepspeed.py` is the real one, `plain.py` the plain PyTorch twin.

Nothing outside this package imports deepspeed.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron_slm.backend.stored import StoredWeight
from megatron_slm.errors import UserError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Update:
    """What became of an optimizer step: applied or skipped, and the gradient norm before clipping, over all ranks."""

    applied: bool
    grad_norm: float


@dataclass(frozen=True)
class EngineSettings:
    """What a training engine needs to know of the run.

    micro_batch_size, accumulation  samples a rank a micro-step, micro-steps an optimizer step
    clip_grad                       largest gradient norm; 0 for none
    precision                       of the weights in the forward pass; gradients are summed in float32
    """

    micro_batch_size: int
    accumulation: int
    clip_grad: float
    precision: torch.dtype


def refuse_other_ranks(checkpoint: Path, stage: int, saved: int, ranks: int) -> None:
    """Refuse to resume a partitioned checkpoint on another number of ranks.

    Raises:
        UserError: the numbers differ, and the stage of ZeRO partitions the optimizer.
    """
    if stage > 0 and saved != ranks:
        raise UserError(
            f"The checkpoint {checkpoint} was written by {saved} ranks, but this run has {ranks}. ZeRO stage {stage} "
            f"resumes on the same number only: start {saved} ranks."
        )


class TrainingEngine(Protocol):
    """A module with its optimizer. Every rank calls every verb the same number of times."""

    module: nn.Module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's `loss`, to be averaged over the data-parallel ranks; `last` of the step."""

    def step(self, learning_rate: float) -> Update:
        """Clip and update once, after the last backward; an update with a non-finite gradient is skipped."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state of all ranks to an empty folder.

        Raises:
            OSError, RuntimeError: this rank could not write; only after the last collective, so that no rank waits.
        """

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on as many ranks."""


class Backend(Protocol):
    """Where weights live: how models are made, and become engines."""

    def construct(self, make: Callable[[], M]) -> M:
        """The student as `make` builds it, partitioned as it is built where the backend partitions."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
        """Whole parameters inside; what rank 0 writes to them is what all ranks hold afterwards."""

    def training_engine(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings
    ) -> TrainingEngine: ...

    def frozen_engine(self, module: nn.Module, *, shard: bool) -> nn.Module:
        """The module in eval mode and without gradients; split over all ranks if `shard`."""

    def release(self, engine: nn.Module) -> None:
        """Let a frozen engine be freed, which the caller holds no longer."""

    def close(self) -> None:
        """Let everything of the run be freed, so that this process can start another run."""

    def stored_weights(self, folder: Path) -> dict[str, StoredWeight]:
        """Return the whole float32 weights in what `TrainingEngine.save` wrote, in one process; none is read yet."""
