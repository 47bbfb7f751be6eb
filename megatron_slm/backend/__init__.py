"""Backends, which hold a model on many ranks and update it: DeepSpeed, and plain PyTorch for tests and small runs.

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
    """The outcome of an optimizer step: applied or skipped, and the gradient norm over all ranks before clipping."""

    applied: bool
    grad_norm: float


@dataclass(frozen=True)
class EngineSettings:
    """The settings of a run that a training engine needs.

    micro_batch_size  samples per rank per micro-step
    accumulation      micro-steps per optimizer step
    clip_grad         largest gradient norm; 0 for none
    precision         dtype of the weights in the forward pass; gradients are summed in float32
    """

    micro_batch_size: int
    accumulation: int
    clip_grad: float
    precision: torch.dtype


def refuse_other_ranks(checkpoint: Path, stage: int, saved: int, ranks: int) -> None:
    """Raise a UserError if the ranks differ from those that saved a partitioned checkpoint (ZeRO stage 1 and above)."""
    if stage > 0 and saved != ranks:
        reason = (
            f"it was written by {saved} ranks, this run has {ranks}, and ZeRO stage {stage} resumes only on the "
            "number of ranks that wrote it"
        )
        raise UserError("checkpoint", checkpoint, reason, f"Start {saved} ranks")


class TrainingEngine(Protocol):
    """A module with its optimizer. Every rank calls every method the same number of times."""

    module: nn.Module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's `loss`, averaged over the data-parallel ranks.

        Args:
            loss: a scalar with its graph.
            last: True for the last backward of the optimizer step.
        """

    def step(self, learning_rate: float) -> Update:
        """Clip and update once, after the last backward; skip the update if a gradient is not finite."""

    def save(self, folder: Path) -> None:
        """Write the weights and the optimizer state of all ranks to an empty folder.

        Raises:
            OSError, RuntimeError: this rank could not write. Raised after the last collective, so that no rank waits.
        """

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on the same number of ranks.

        Raises:
            UserError: another number of ranks wrote it, or it holds no state.
        """


class Backend(Protocol):
    """Constructs models, and turns them into engines."""

    def construct(self, make: Callable[[], M]) -> M:
        """Return the student that `make` builds, partitioned while it is built if the backend partitions."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
        """Return a context in which these parameters are whole; all ranks keep the values that rank 0 writes."""

    def training_engine(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings
    ) -> TrainingEngine:
        """Return the engine of a module, whose parameters it moves to this rank's device and may partition."""

    def frozen_engine(self, module: nn.Module, *, shard: bool) -> nn.Module:
        """Return the module in eval mode and without gradients, partitioned over all ranks if `shard`."""

    def release(self, engine: nn.Module) -> None:
        """Free a frozen engine, to which the caller holds no other reference."""

    def close(self) -> None:
        """Free everything of the run, so that this process can start another."""

    def stored_weights(self, folder: Path) -> dict[str, StoredWeight]:
        """Return the float32 weights that `TrainingEngine.save` wrote, whole and by name; none is read yet.

        One process calls it, whatever the number of ranks that saved.

        DeepSpeed's checkpoints are pickles, which can run code: only read a run directory that you trust.
        """
