"""Sums over a step, kept on the device and reduced over all ranks when a step is logged."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.dist import all_reduce_sum
from megatron_slm.selection.select import score_quantiles
from megatron_slm.training.objective import Choice
from megatron_slm.types import Batch, TokenSignals

HISTOGRAM_LIMIT, BINS_PER_NAT = 16, 4
"""Excess loss, in nats, beyond which it falls into the outermost bins; and how fine the bins are."""


class Histogram(NamedTuple):
    """Excess loss over all ranks, from the first bin that is not empty to the last; all of it empty without a token.

    counts          tokens a bin, of which each includes its lower edge
    edges           in nats, one more than bins
    total, squares  sum of the values, and of their squares
    """

    counts: list[int]
    edges: list[float]
    total: float
    squares: float


class Pool(NamedTuple):
    """This rank's part of what was ranked together, as the step saw it."""

    batch: Batch
    signals: TokenSignals
    choice: Choice


class StepStatistics:
    """What a step's tokens sum up to on this rank.

    Args:
        num_sources: entries of the blend.
        device: of the batches.

    `first_pool` is kept as it is, for who wants to look at tokens; None before the first.
    """

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self._sums = {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in (
                "valid",
                "competing",
                "selected",
                "loss",
                "selected_loss",
                "reference_loss",
                "thresholds",
                "threshold",
            )
        }
        self._by_source_2S = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
        self._excess: list[tuple[Tensor, Tensor]] = []
        self._nan = torch.zeros((), dtype=torch.int64, device=device)
        self._routers: list[Tensor] = []
        self.first_pool: Pool | None = None

    @property
    def has_reference(self) -> bool:
        return bool(self._excess)

    @property
    def has_router(self) -> bool:
        """Whether the student has a router loss; the same on every rank."""
        return bool(self._routers)

    @property
    def num_nan(self) -> int:
        """Tokens of all ranks whose score is NaN; the same on every rank."""
        return int(self._nan)

    def add(self, pool: Batch, signals: TokenSignals, choice: Choice) -> None:
        """One pool of this rank."""
        self.first_pool = self.first_pool or Pool(pool, signals, choice)
        valid_BT, loss_BT = pool.valid_BT, signals["student.loss"]
        self._nan += choice.num_nan
        self._add("valid", valid_BT)
        self._add("competing", choice.competing_BT)
        self._add("selected", choice.mask_BT)
        self._add("loss", loss_BT * valid_BT)
        self._add("selected_loss", loss_BT * choice.mask_BT)
        self._add("thresholds", choice.threshold.isfinite())
        self._add("threshold", choice.threshold.nan_to_num(0.0, 0.0, 0.0))
        if "reference.loss" in signals:
            self._add("reference_loss", signals["reference.loss"] * valid_BT)
            # Only tokens that compete: their quantile 1 - ratio is the threshold.
            self._excess.append((loss_BT - signals["reference.loss"], choice.competing_BT))
        for row, mask_BT in enumerate((valid_BT, choice.mask_BT)):
            self._by_source_2S[row].index_add_(0, pool.source_B, mask_BT.sum(-1).double())

    def add_router(self, loss: Tensor) -> None:
        """Add the router loss of one micro-batch of this rank."""
        self._routers.append(loss.double())

    def router_loss(self) -> float:
        """Return the mean router loss over all micro-batches and ranks; every rank calls it, if there is one."""
        losses = torch.stack(self._routers)
        total, count = all_reduce_sum(torch.stack([losses.sum(), losses.new_tensor(len(losses))])).tolist()
        return total / count

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] += values.sum(dtype=torch.float64)

    def loss_and_counts(self) -> Tensor:
        """float64 `[3]`: this rank's summed loss, its valid tokens, and those that were kept."""
        return torch.stack([self._sums["loss"], self._sums["valid"], self._sums["selected"]])

    def reduce(self) -> dict[str, float]:
        """The sums over all ranks, those of source s as `valid/s` and `selected/s`; every rank calls it."""
        sources = range(self._by_source_2S.shape[1])
        names = [*self._sums, *(f"{kind}/{source}" for kind in ("valid", "selected") for source in sources)]
        sums = torch.cat([torch.stack(list(self._sums.values())), self._by_source_2S.flatten()])
        return dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))

    def excess_quantiles(self, quantiles: tuple[float, ...], num_competing: int) -> list[float]:
        """Return exact quantiles of the competing tokens' excess loss over all ranks; empty without a reference.

        Args:
            quantiles: in (0, 1).
            num_competing: competing tokens of all ranks.
        """
        if not self.has_reference or not quantiles:
            return []
        excess_N, competing_N = self._all_excess()
        count = torch.tensor(num_competing, device=competing_N.device)
        return score_quantiles(excess_N, competing_N, quantiles, num_valid=count).tolist()

    def excess_histogram(self) -> Histogram:
        """Count the competing tokens of all ranks by one all-reduce; every rank calls it. Needs a reference."""
        bins = 2 * HISTOGRAM_LIMIT * BINS_PER_NAT
        excess_N, competing_N = self._all_excess()
        excess_N = excess_N[competing_N].double()
        bin_N = ((excess_N + HISTOGRAM_LIMIT) * BINS_PER_NAT).floor().clamp(0, bins - 1).long()
        sums = torch.stack([excess_N.sum(), excess_N.square().sum()])
        everywhere = all_reduce_sum(torch.cat([torch.bincount(bin_N, minlength=bins), sums])).tolist()
        *counts, total, squares = everywhere
        filled = [index for index, count in enumerate(counts) if count]
        first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
        edges = [index / BINS_PER_NAT - HISTOGRAM_LIMIT for index in range(first, last + 1)]
        return Histogram([int(count) for count in counts[first:last]], edges, total, squares)

    def _all_excess(self) -> tuple[Tensor, Tensor]:
        """Return the excess loss `[N]` of this rank's tokens in the step, and which of them compete."""
        excess_N, competing_N = (
            torch.cat([part.flatten() for part in parts]) for parts in zip(*self._excess, strict=True)
        )
        return excess_N, competing_N
