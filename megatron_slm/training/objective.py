"""Which tokens of a pool count, and how many that will be: all of them (CLM), or the selected ones (SLM).

A *pool* is what is ranked together: one micro-batch of each rank, or the whole optimizer step.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_slm.dist import all_reduce_sum
from megatron_slm.selection.scoring import Score
from megatron_slm.selection.select import Scope, plan_k, select_tokens
from megatron_slm.types import Batch, TokenSignals


class Choice(NamedTuple):
    """mask_BT bool and weights_BT float32 of this rank's tokens; threshold float32, NaN if there is none."""

    mask_BT: Tensor
    weights_BT: Tensor
    threshold: Tensor


class Objective(Protocol):
    """needs: signals that `choose` reads. pools_whole_step: a pool is the whole optimizer step."""

    needs: tuple[str, ...]
    pools_whole_step: bool

    def plan(self, pools: list[Batch]) -> Tensor:
        """int64 `[P]`: tokens of each pool that will count, over all ranks; known before any forward."""

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        """This rank's part of one pool; every rank calls it."""


class CausalLanguageModeling:
    """Every valid token counts."""

    needs: tuple[str, ...] = ()
    pools_whole_step = False

    def plan(self, pools: list[Batch]) -> Tensor:
        return all_reduce_sum(torch.stack([pool.valid_BT.sum() for pool in pools]))

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        return Choice(pool.valid_BT, pool.valid_BT.float(), torch.tensor(torch.nan, device=pool.valid_BT.device))


class SelectiveLanguageModeling:
    """The tokens of highest score count (Rho-1, section 2.2).

    Args:
        score: what tokens are ranked by.
        ratio: share of the valid tokens that is kept.
        scope: ranked together within a pool: all ranks, each rank, each sequence.
        pools_whole_step: rank the whole optimizer step together instead of each micro-step.
    """

    def __init__(self, score: Score, ratio: float, scope: Scope, pools_whole_step: bool) -> None:
        self.needs = score.needs
        self.pools_whole_step = pools_whole_step
        self._score = score
        self._ratio = ratio
        self._scope = scope

    def plan(self, pools: list[Batch]) -> Tensor:
        own_P2 = torch.stack([torch.stack([pool.valid_BT.sum(), self._own_k(pool)]) for pool in pools])
        valid_P, k_P = all_reduce_sum(own_P2).unbind(-1)
        return plan_k(valid_P, self._ratio) if self._scope == "global" else k_P

    def _own_k(self, pool: Batch) -> Tensor:
        """What this rank keeps on its own, in the scopes that do not ask the others."""
        valid_counts = pool.valid_BT.sum(-1) if self._scope == "sequence" else pool.valid_BT.sum()
        return plan_k(valid_counts, self._ratio).sum()

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        selection = select_tokens(
            self._score(signals), pool.valid_BT, self._ratio, scope=self._scope, position=pool.token_position_BT
        )
        return Choice(selection.mask, selection.weights, selection.threshold)
