"""Several references as one: live models and stores together."""

from typing import Literal

import torch
from torch import Tensor

from megatron_slm.signals.live import Reference
from megatron_slm.types import Batch, TokenSignals

Mix = Literal["mean", "minimum", "log_mixture"]


class MixedReference:
    """One column out of those of several references.

    mean          weighted mean of the losses: the geometric mean of the probabilities (entropies: their mean)
    minimum       the loss of whichever reference knows the token best
    log_mixture   -log of the weighted mean of the probabilities

    Args:
        parts: the references.
        weights: of each, above 0; only their proportions count.
        mix: how.
    """

    def __init__(self, parts: list[Reference], weights: list[float], mix: Mix) -> None:
        self.parts = parts
        self._weights = torch.tensor(weights) / sum(weights)
        self._mix = mix

    def take(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        taken = [part.take(batches, want) for part in self.parts]
        return [
            {name: self._mixed(torch.stack([columns[name] for columns in found])) for name in found[0]}
            for found in zip(*taken, strict=True)
        ]

    def _mixed(self, column_PBT: Tensor) -> Tensor:
        weight_P11 = self._weights.to(column_PBT.device)[:, None, None]
        if self._mix == "minimum":
            return column_PBT.amin(0)
        if self._mix == "log_mixture":
            return -(weight_P11.log() - column_PBT).logsumexp(0)
        return (weight_P11 * column_PBT).sum(0)
