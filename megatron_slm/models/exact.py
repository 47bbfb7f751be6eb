"""The exact gradient of the selected loss, through every token. Only the head leaves out what was not selected."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.backend import TrainingEngine
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.selection.loss import weighted_loss
from megatron_slm.types import Batch, TokenSignals


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
