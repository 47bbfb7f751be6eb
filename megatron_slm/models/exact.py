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
    """The batch, and the loss with its graph if that was kept."""

    batch: Batch
    loss_BT: Tensor | None


class ExactStudent:
    """See `Student`.

    Args:
        engine: the module (a `CausalLM`) with its optimizer.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, ExactTape]:
        with torch.set_grad_enabled(keep):
            signals = score_batch(self._engine.module, batch, want)
        tape = ExactTape(batch, signals["loss"] if keep else None)
        return {name: column.detach() for name, column in signals.items()}, tape

    def backward(self, tape: ExactTape, weights_BT: Tensor, scale: float, *, last: bool) -> None:
        loss_BT = tape.loss_BT
        if loss_BT is None:
            loss_BT = score_batch(self._engine.module, tape.batch)["loss"]
        self._engine.backward(weighted_loss(loss_BT, weights_BT) * scale, last=last)
