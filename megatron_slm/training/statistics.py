"""Sums over a step, kept on the device and reduced over all ranks when a step is logged."""

import torch
from torch import Tensor

from megatron_slm.dist import all_reduce_sum
from megatron_slm.selection.select import score_quantiles
from megatron_slm.training.objective import Choice
from megatron_slm.types import Batch, TokenSignals


class StepStatistics:
    """What a step's tokens sum up to on this rank.

    Args:
        num_sources: entries of the blend.
        device: of the batches.
    """

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self._sums = {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("valid", "selected", "loss", "selected_loss", "reference_loss", "thresholds", "threshold")
        }
        self._by_source_2S = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
        self._excess: list[tuple[Tensor, Tensor]] = []

    @property
    def has_reference(self) -> bool:
        return bool(self._excess)

    def add(self, pool: Batch, signals: TokenSignals, choice: Choice) -> None:
        """One pool of this rank."""
        valid_BT, loss_BT = pool.valid_BT, signals["student.loss"]
        self._add("valid", valid_BT)
        self._add("selected", choice.mask_BT)
        self._add("loss", loss_BT * valid_BT)
        self._add("selected_loss", loss_BT * choice.mask_BT)
        self._add("thresholds", choice.threshold.isfinite())
        self._add("threshold", choice.threshold.nan_to_num(0.0, 0.0, 0.0))
        if "reference.loss" in signals:
            self._add("reference_loss", signals["reference.loss"] * valid_BT)
            self._excess.append((loss_BT - signals["reference.loss"], valid_BT))
        for row, mask_BT in enumerate((valid_BT, choice.mask_BT)):
            self._by_source_2S[row].index_add_(0, pool.source_B, mask_BT.sum(-1).double())

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] += values.sum(dtype=torch.float64)

    def reduce(self) -> dict[str, float]:
        """The sums over all ranks; every rank calls it."""
        totals = all_reduce_sum(torch.stack(list(self._sums.values()))).tolist()
        return dict(zip(self._sums, totals, strict=True))

    def reduce_by_source(self) -> list[float | None]:
        """Selected share of each source's valid tokens over all ranks; None where it had none."""
        valid_S, selected_S = all_reduce_sum(self._by_source_2S).tolist()
        return [selected / valid if valid else None for valid, selected in zip(valid_S, selected_S, strict=True)]

    def excess_quantiles(self, quantiles: tuple[float, ...]) -> list[float]:
        """Exact quantiles of the step's excess loss over all ranks; empty without a reference."""
        if not self.has_reference or not quantiles:
            return []
        excess_N, valid_N = (torch.cat([part.flatten() for part in parts]) for parts in zip(*self._excess, strict=True))
        return [float(value) for value in score_quantiles(excess_N, valid_N, quantiles)]
