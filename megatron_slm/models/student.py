"""The student model, behind two methods: score a batch, and run the backward of a scored batch.

A forward returns named entries. An entry `[B, T]` is a *column* with one number per token: a loss column, such as
`loss`, which the objective may weigh, or a signal, such as `entropy`. A 0-dim entry is a *term*: a loss of the model's
own, such as the router loss, which is added with a fixed coefficient. The step and the engines pass columns by name, so
a new loss column changes only the model's forward and the objective.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_slm.backend import TrainingEngine
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.selection.select import weighted_loss
from megatron_slm.types import Batch, TokenSignals, TokenWeights


class Tape(Protocol):
    """A scored batch, with the part of its forward that was kept for `backward`."""

    @property
    def batch(self) -> Batch: ...


class Student(Protocol):
    """A model that scores batches, and accumulates the gradient of their selected tokens."""

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, Tape]:
        """Return all columns, detached, and the tape for `backward`.

        Args:
            batch: a micro-batch of this rank.
            want: columns beside `loss`: signals such as `entropy`, and each further loss column that `backward` weighs.
            keep: keep the forward for `backward`; otherwise `backward` runs it again.
        """

    def backward(
        self, tape: Any, weights: TokenWeights, scale: float, *, last: bool, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of `scale` times the sum of `weights * column` over all tokens and loss columns.

        Every rank calls it, even if all of its weights are zero.

        Args:
            tape: the tape that `score` of the same student returned; use it once.
            weights: float32 `[B, T]` by loss column; tokens of weight 0 do not count toward the loss.
            scale: the number of data-parallel ranks divided by the planned count of the optimizer step.
            last: True for the last backward of the optimizer step on this rank.
            share: one divided by the number of micro-batches of the step on this rank. It scales the terms, because the
                engine averages over ranks but adds up micro-batches.

        Returns:
            The model's terms for this batch by name, detached and without their coefficients.
        """


def detached_columns(output: TokenSignals) -> TokenSignals:
    """Return the columns of a forward, detached."""
    return {name: value.detach() for name, value in output.items() if value.ndim > 0}


def weighted_sum(output: TokenSignals, weights: TokenWeights) -> Tensor:
    """Return the sum of `weights * column` over all tokens and loss columns: 0-dim float32, this rank only."""
    return torch.stack([weighted_loss(output[name], weight) for name, weight in weights.items()]).sum()


def selected_tokens(weights: TokenWeights) -> Tensor:
    """Return the mask of the tokens with a weight in any loss column, bool `[B, T]`."""
    return torch.stack(list(weights.values())).ne(0).any(0)


def weighed_columns(weights: TokenWeights) -> tuple[str, ...]:
    """Return the loss columns beside `loss` that these weights need."""
    return tuple(name for name in weights if name != "loss")


@dataclass(frozen=True)
class ExactTape:
    """The batch, and the output of its forward with its graph; None if it was not kept."""

    batch: Batch
    output: TokenSignals | None


class ExactStudent:
    """A student whose backward runs through all tokens; see `Student`.

    Args:
        engine: the module (a `CausalLM`) with its optimizer.
        coefficients: coefficients of the model's own terms, by name, such as `router` (models/router.py).
    """

    def __init__(self, engine: TrainingEngine, coefficients: Mapping[str, float] | None = None) -> None:
        self._engine = engine
        self._coefficients = dict(coefficients or {})

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, ExactTape]:
        with torch.set_grad_enabled(keep):
            output = score_batch(self._engine.module, batch, want)
        return detached_columns(output), ExactTape(batch, output if keep else None)

    def backward(
        self, tape: ExactTape, weights: TokenWeights, scale: float, *, last: bool, share: float = 1.0
    ) -> dict[str, Tensor]:
        output = tape.output
        if output is None:
            output = score_batch(self._engine.module, tape.batch, weighed_columns(weights))
        # Equation 5: `scale` divides by the planned count over all ranks, and undoes the engine's average over ranks. A
        # term is a mean per micro-batch: the engine averages it over ranks, and `share` over micro-batches.
        total = weighted_sum(output, weights) * scale
        for name, coefficient in self._coefficients.items():
            total = total + coefficient * share * output[name]
        self._engine.backward(total, last=last)
        return {name: output[name].detach() for name in self._coefficients}
