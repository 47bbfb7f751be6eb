"""Sums over the tokens of a step, kept on the device, and reduced over the ranks once per step."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.selection.select import quantile_counts, score_quantiles
from megatron_slm.training.objective import Choice
from megatron_slm.types import Batch, TokenSignals

HISTOGRAM_LIMIT, BINS_PER_NAT = 16, 4
"""Excess loss in nats beyond which values fall into the outermost bins, and the number of bins per nat."""


class Histogram(NamedTuple):
    """The histogram of the excess loss over all ranks, from the first bin that is not empty to the last.

    counts          tokens per bin; a bin includes its lower edge. Empty if there is no token
    edges           edges of the bins in nats, one more than bins
    total, squares  sum of the values, and of their squares
    """

    counts: list[int]
    edges: list[float]
    total: float
    squares: float


class ScoredPool(NamedTuple):
    """This rank's part of a pool: its tokens, their signals, and the selection."""

    batch: Batch
    signals: TokenSignals
    choice: Choice


SUMS = (
    *("valid", "competing", "selected", "loss", "selected_loss", "reference_loss", "thresholds", "threshold"),
    "not_finite",
)
BY_SOURCE = ("valid", "selected", "loss", "reference_loss")
"""The sums that are also kept by source."""


class StepStatistics:
    """The sums over a step's tokens on this rank, and their reduction over the ranks.

    Args:
        num_sources: number of entries in the blend.
        world: the place of this process among all ranks.

    Attributes:
        first_pool: the first pool that was added, for callbacks that show tokens; None before it is added.
        sums: the sums over all ranks, each token counted once; those of source s have the names of `BY_SOURCE` with
            `/s`. Empty before `reduce`.
        mean_terms: the mean of each term of the student over all micro-batches and ranks; empty before `reduce`.
    """

    def __init__(self, num_sources: int, world: World) -> None:
        device = world.device
        self._group = world.data.group
        self._replicas = world.replicas
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in SUMS}
        self._by_source_KS = torch.zeros(len(BY_SOURCE), num_sources, dtype=torch.float64, device=device)
        self._excess: list[Tensor] = []
        self._competing: list[Tensor] = []
        self._samples: list[Tensor] = []
        self._not_finite: list[Tensor] = []
        self._nan = torch.zeros((), dtype=torch.int64, device=device)
        self._terms: dict[str, Tensor] = {}
        self._first_counts: Tensor | None = None
        self.first_pool: ScoredPool | None = None
        self.sums: dict[str, float] = {}
        self.mean_terms: dict[str, float] = {}

    @property
    def has_reference(self) -> bool:
        return bool(self._excess)

    @property
    def mean_loss(self) -> float:
        """The mean student loss over all valid tokens of all ranks, in nats; NaN if no token is valid."""
        return self.sums["loss"] / self.sums["valid"] if self.sums["valid"] else math.nan

    @property
    def num_nan(self) -> int:
        """The number of tokens of all ranks whose score is NaN; the same on every rank."""
        return int(self._nan)

    def bad_samples(self) -> list[int]:
        """Return the ordinals of the samples of this rank with an infinite or NaN loss of either model."""
        return torch.cat(self._samples)[torch.cat(self._not_finite)].tolist()

    def add(self, pool: Batch, signals: TokenSignals, choice: Choice) -> None:
        """Add one pool of this rank."""
        self.first_pool = self.first_pool or ScoredPool(pool, signals, choice)
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
            self._excess.append((loss_BT - signals["reference.loss"]).flatten())
            # Quantiles cover only tokens that compete, so that their quantile 1 - ratio is the threshold.
            self._competing.append(choice.competing_BT.flatten())
        self._samples.append(pool.sample_index_B)
        self._not_finite.append(_not_finite(pool, signals, choice))
        self._add("not_finite", self._not_finite[-1])
        by_source = [valid_BT, choice.mask_BT, loss_BT * valid_BT]
        if "reference.loss" in signals:
            by_source.append(signals["reference.loss"] * valid_BT)
        for row, values_BT in enumerate(by_source):
            self._by_source_KS[row].index_add_(0, pool.source_B, values_BT.sum(-1, dtype=torch.float64))

    def add_terms(self, terms: list[dict[str, Tensor]]) -> None:
        """Add the student's own terms, such as the router loss, of some micro-batches of this rank."""
        for of_one in terms:
            for name, term in of_one.items():
                # The number beside the sum, because a mean divides by that of all ranks.
                own = torch.stack([term.double(), torch.ones_like(term, dtype=torch.float64)])
                self._terms[name] = self._terms.get(name, 0.0) + own

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] += values.sum(dtype=torch.float64)

    def reduce(self, *own: float) -> list[float]:
        """Set `sums` and `mean_terms` by one all-reduce; every rank calls it once, after all pools are added.

        Args:
            own: further numbers of this rank to sum.

        Returns:
            The sums of `own` over all ranks.
        """
        own_sums = torch.cat([torch.stack(list(self._sums.values())), self._by_source_KS.flatten()])
        own_terms = torch.cat([own_sums.new_zeros(0), *self._terms.values()])
        parts = [own_sums, own_terms, own_sums.new_tensor(own), self._excess_counts().double()]
        # The sum runs over all ranks, not the data-parallel group alone, so that no rank misses an error or a request.
        # It counts each token once per replica.
        sums, terms, others, counts = all_reduce_sum(torch.cat(parts)).split([len(part) for part in parts])
        sources = range(self._by_source_KS.shape[1])
        names = [*self._sums, *(f"{name}/{source}" for name in BY_SOURCE for source in sources)]
        self.sums = dict(zip(names, (sums / self._replicas).tolist(), strict=True))
        self.mean_terms = dict(zip(self._terms, (terms[::2] / terms[1::2]).tolist(), strict=True))
        self._first_counts = counts.long() // self._replicas
        summed: list[float] = others.tolist()
        return summed

    def _excess_counts(self) -> Tensor:
        """Return the counts with which the search of quantiles begins; none without a reference."""
        if not self.has_reference:
            return self._by_source_KS.new_zeros(0)
        return quantile_counts(torch.cat(self._excess), torch.cat(self._competing))

    def excess_quantiles(self, quantiles: tuple[float, ...]) -> list[float]:
        """Return exact quantiles of the competing tokens' excess loss over all ranks. Needs a reference.

        Two all-reduces: the first round of the search is part of `reduce`.

        Args:
            quantiles: in (0, 1).
        """
        if not quantiles:
            return []
        excess_N, competing_N = torch.cat(self._excess), torch.cat(self._competing)
        found = score_quantiles(excess_N, competing_N, quantiles, self._group, self._first_counts)
        return found.tolist()

    def excess_histogram(self) -> Histogram:
        """Count the competing tokens of all ranks by one all-reduce; every rank calls it. Needs a reference."""
        bins = 2 * HISTOGRAM_LIMIT * BINS_PER_NAT
        excess_N = torch.cat(self._excess)[torch.cat(self._competing)].double()
        bin_N = ((excess_N + HISTOGRAM_LIMIT) * BINS_PER_NAT).floor().clamp(0, bins - 1).long()
        sums = torch.stack([excess_N.sum(), excess_N.square().sum()])
        own = torch.cat([torch.bincount(bin_N, minlength=bins), sums])
        *counts, total, squares = all_reduce_sum(own, self._group).tolist()
        filled = [index for index, count in enumerate(counts) if count]
        first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
        edges = [index / BINS_PER_NAT - HISTOGRAM_LIMIT for index in range(first, last + 1)]
        return Histogram([int(count) for count in counts[first:last]], edges, total, squares)


def _not_finite(pool: Batch, signals: TokenSignals, choice: Choice) -> Tensor:
    """Return the mask of the sequences with an infinite or NaN loss of either model, bool `[B]`."""
    names = {"student.loss", "reference.loss", *(f"student.{column}" for column in choice.weights)}
    losses = [signals[name] for name in sorted(names) if name in signals]
    finite_BT = torch.stack([loss_BT.isfinite() for loss_BT in losses]).all(0)
    return (pool.valid_BT & ~finite_BT).any(-1)
