"""The model that learns, behind two verbs: score a batch, and backward what was scored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.backend import TrainingEngine
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.selection.loss import weighted_loss
from megatron_slm.types import Batch, TokenSignals


@dataclass(frozen=True)
class Tape:
    """What `backward` needs of `score`: the batch, and the loss with its graph if that was kept."""

    batch: Batch
    loss_BT: Tensor | None


class Student:
    """Scores batches, and adds the gradient of what was selected.

    Args:
        engine: the module (a `CausalLM`) with its optimizer.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine

    def score(self, batch: Batch, want: tuple[str, ...], *, keep_graph: bool) -> tuple[TokenSignals, Tape]:
        """Columns of each token (detached), and the tape that `backward` takes.

        Args:
            batch: a micro-batch of this rank.
            want: columns beside the loss: `entropy`.
            keep_graph: keep the activations for `backward`; otherwise it runs the batch again.
        """
        with torch.set_grad_enabled(keep_graph):
            signals = score_batch(self._engine.module, batch, want)
        tape = Tape(batch, signals["loss"] if keep_graph else None)
        return {name: column.detach() for name, column in signals.items()}, tape

    def backward(self, tape: Tape, weights_BT: Tensor, scale: float, *, last: bool) -> None:
        """Add the gradient of `scale * sum(weights * loss)`; every rank calls it, also with all weights zero.

        Args:
            tape: of the same batch.
            weights_BT: float32; tokens of weight 0 do not count.
            scale: one over the planned count of the optimizer step, times the number of ranks.
            last: of the optimizer step.
        """
        loss_BT = tape.loss_BT
        if loss_BT is None:
            loss_BT = score_batch(self._engine.module, tape.batch)["loss"]
        self._engine.backward(weighted_loss(loss_BT, weights_BT) * scale, last=last)
