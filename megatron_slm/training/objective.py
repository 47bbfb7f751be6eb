"""The training objective: which tokens of a pool count toward the loss, and how many that will be.

A *pool* is what is ranked together: one micro-batch of each rank, or the whole optimizer step. Under causal language
modeling (CLM) all valid tokens count; under selective language modeling (SLM) the selected ones do.
"""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.dist import all_reduce_sum
from megatron_slm.errors import agreed
from megatron_slm.selection.rule import Rule
from megatron_slm.types import Batch, TokenSignals, TokenWeights


class Choice(NamedTuple):
    """The selection from one pool.

    mask_BT       bool, this rank: the selected tokens
    weights       float32 `[B, T]` by loss column, this rank: `loss`, and any other column that the objective weighs
    threshold     float32; NaN if there is none
    competing_BT  bool, this rank: the tokens that could be selected
    num_nan       int64, all ranks: competing tokens whose score is NaN
    """

    mask_BT: Tensor
    weights: TokenWeights
    threshold: Tensor
    competing_BT: Tensor
    num_nan: Tensor | int = 0


class Objective(Protocol):
    """The objective of one optimizer step.

    needs             signals that `choose` reads, and `student.NAME` for each loss column NAME that it weighs
    selects           whether some tokens may be left out; then the reference runs, for `choose` or for the records
    pools_whole_step  whether a pool is the whole optimizer step
    """

    needs: tuple[str, ...]
    selects: bool
    pools_whole_step: bool

    def plan(self, pools: list[Batch]) -> Tensor:
        """Return what the weights of each pool will sum to over all ranks, before any forward: int64 `[P]`."""

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        """Return this rank's part of the selection from one pool; every rank calls it.

        Raises:
            AgreedError: a score returned something other than a score for each token.
        """


def competing_tokens(batch: Batch, min_context: int) -> Tensor:
    """Return the valid tokens that may be selected, bool `[B, T]`.

    A store of kind `document` holds the reference's loss of each token after its whole document. Where a sample begins
    in the middle of a document, the student has not seen what came before. Its loss is higher for that reason alone,
    and the excess says nothing about whether the token can be learned.

    Args:
        batch: a micro-batch or a pool of this rank.
        min_context: `selection.min_context`; 0 leaves out nothing.
    """
    return batch.valid_BT & ~batch.lacks_context_BT(min_context)


class CausalLanguageModeling:
    """The objective under which every valid token counts.

    Args:
        group: process group of the ranks that hold different tokens; None for all ranks.
    """

    needs: tuple[str, ...] = ()
    selects = False
    pools_whole_step = False

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def plan(self, pools: list[Batch]) -> Tensor:
        # All N tokens of the CLM loss (Rho-1, equation 2), over all ranks.
        return all_reduce_sum(torch.stack([pool.valid_BT.sum() for pool in pools]), self._group)

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        no_threshold = torch.tensor(torch.nan, device=pool.valid_BT.device)
        return Choice(pool.valid_BT, {"loss": pool.valid_BT.float()}, no_threshold, competing_BT=pool.valid_BT)


class SelectiveLanguageModeling:
    """The objective under which the tokens that a rule keeps count (Rho-1, section 2.2, equations 3 to 5).

    Args:
        rule: which tokens are kept, by which score.
        ratio: share of the competing tokens that is selected: the paper's k %.
        pools_whole_step: rank the whole optimizer step together instead of each micro-step.
        min_context: see `competing_tokens`.
        group: process group of the ranks that hold different tokens; None for all ranks.
    """

    selects = True

    def __init__(
        self,
        rule: Rule,
        ratio: float,
        pools_whole_step: bool,
        min_context: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.needs = rule.needs
        self.pools_whole_step = pools_whole_step
        self._rule = rule
        self._ratio = ratio
        self._min_context = min_context
        self._group = group

    def plan(self, pools: list[Batch]) -> Tensor:
        # k counts the tokens that compete: those without context count toward neither side of the ratio.
        competing = [competing_tokens(pool, self._min_context) for pool in pools]
        return self._rule.plan(competing, self._ratio, group=self._group)

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        competing_BT = competing_tokens(pool, self._min_context)
        # Ties go to the earlier sample of the run's order, so the selection is the same on any number of ranks.
        position_BT = pool.token_position_BT
        # A faulty score raises on every rank alike, because all ranks run the same function.
        selection = agreed(
            lambda: self._rule.choose(signals, competing_BT, self._ratio, group=self._group, position=position_BT)
        )
        weights = {"loss": selection.weights}
        return Choice(selection.mask, weights, selection.threshold, competing_BT, selection.num_nan)
