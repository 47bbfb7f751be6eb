"""The model that learns, behind two verbs: score a batch, and backward what was scored.

`exact.py`, `rows.py` and `replay.py` are the ways to do that; the step knows none of them.
"""

from typing import Protocol, TypeVar

from torch import Tensor

from megatron_slm.types import Batch, TokenSignals


class Tape(Protocol):
    """What `backward` needs of `score`: the batch, and what was kept of its forward."""

    @property
    def batch(self) -> Batch: ...


T = TypeVar("T", bound=Tape)


class Student(Protocol[T]):
    """Scores batches, and adds the gradient of what was selected."""

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, T]:
        """Columns of each token (detached), and the tape that `backward` takes.

        Args:
            batch: a micro-batch of this rank.
            want: columns beside the loss: `entropy`.
            keep: what `backward` needs of this forward; otherwise it runs the batch again.
        """

    def backward(self, tape: T, weights_BT: Tensor, scale: float, *, last: bool, share: float = 1.0) -> Tensor | None:
        """Add the gradient of `scale * sum(weights * loss)`; every rank calls it, also with all weights zero.

        Args:
            tape: of the same batch, used once.
            weights_BT: float32; tokens of weight 0 do not count.
            scale: one over the planned count of the optimizer step, times the number of ranks.
            last: of the optimizer step.
            share: one over the micro-batches of the step on this rank. The model's own loss counts by it, because the
                engine averages over ranks and adds up micro-batches.

        Returns:
            The model's own loss of this batch, detached and without its coefficient (models/router.py). None if it has
            none.
        """
