"""The model that learns, behind two verbs: score a batch, and backward what was scored.

`exact.py`, `rows.py` and `replay.py` are the ways to do that; the step knows none of them.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_slm.backend import TrainingEngine
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.selection.select import weighted_loss
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
            want: columns beside the loss, such as `entropy`.
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


@dataclass(frozen=True)
class ExactTape:
    """The batch; if they were kept, the loss with its graph, and the model's own loss with its graph if it has one."""

    batch: Batch
    loss_BT: Tensor | None
    router: Tensor | None = None


class ExactStudent:
    """See `Student`.

    Args:
        engine: the module (a `CausalLM`) with its optimizer.
        router_coefficient: of the model's router loss, if it has one.
    """

    def __init__(self, engine: TrainingEngine, router_coefficient: float = 0.0) -> None:
        self._engine = engine
        self._router_coefficient = router_coefficient

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, ExactTape]:
        with torch.set_grad_enabled(keep):
            signals = score_batch(self._engine.module, batch, want)
        router = signals.pop("router", None)
        tape = ExactTape(batch, signals["loss"] if keep else None, router)
        return {name: column.detach() for name, column in signals.items()}, tape

    def backward(
        self, tape: ExactTape, weights_BT: Tensor, scale: float, *, last: bool, share: float = 1.0
    ) -> Tensor | None:
        loss_BT, router = tape.loss_BT, tape.router
        if loss_BT is None:
            signals = score_batch(self._engine.module, tape.batch)
            loss_BT, router = signals["loss"], signals.get("router")
        objective = weighted_loss(loss_BT, weights_BT) * scale
        if router is not None:
            objective = objective + self._router_coefficient * share * router
        self._engine.backward(objective, last=last)
        return None if router is None else router.detach()
