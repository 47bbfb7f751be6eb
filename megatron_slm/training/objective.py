"""The training objective: the tokens of a pool that count toward the loss, and their planned number.

A *pool* is a set of tokens that are ranked together: one micro-batch of each rank, or the whole optimizer step. Under
causal language modeling (CLM) all valid tokens count toward the loss; under selective language modeling (SLM) the
selected ones do.
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
    selects           True if it may leave tokens out; the reference then runs, if only for the records
    pools_whole_step  True if a pool is the whole optimizer step, False if it is one micro-batch of each rank
    """

    needs: tuple[str, ...]
    selects: bool
    pools_whole_step: bool

    def plan(self, pools: list[Batch]) -> Tensor:
        """Return the planned sum of each pool's weights over all ranks, int64 `[P]`; called before any forward."""

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        """Return this rank's part of the selection from one pool; every rank calls it.

        Raises:
            AgreedError: the score function did not return one score per token.
        """


def competing_tokens(batch: Batch, min_context: int) -> Tensor:
    """Return the valid tokens that may be selected, bool `[B, T]`.

    In a store of kind `document`, the reference scored each token with the whole document before it. If a sample begins
    in the middle of a document, the student lacks that context. Its loss is higher for this reason alone, so the
    excess loss does not measure what there is to learn.

    Args:
        batch: a micro-batch or a pool of this rank.
        min_context: `selection.min_context`; 0 excludes no valid token.
    """
    # Only valid tokens compete. The excess loss of an ignored label is 0, which would rank above all negative ones.
    return batch.valid_BT & ~batch.lacks_context_BT(min_context)


class CausalLanguageModeling:
    """The objective under which every valid token counts toward the loss (Rho-1, equation 2).

    Args:
        group: process group of the ranks that hold different tokens; None for all ranks.
    """

    needs: tuple[str, ...] = ()
    selects = False
    pools_whole_step = False

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def plan(self, pools: list[Batch]) -> Tensor:
        # N of equation 2, over all ranks: a mean of means would give too much weight to ranks with few valid tokens.
        return all_reduce_sum(torch.stack([pool.valid_BT.sum() for pool in pools]), self._group)

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        no_threshold = torch.tensor(torch.nan, device=pool.valid_BT.device)
        return Choice(pool.valid_BT, {"loss": pool.valid_BT.float()}, no_threshold, competing_BT=pool.valid_BT)


class SelectiveLanguageModeling:
    """The objective under which only selected tokens count toward the loss (Rho-1, section 2.2, equations 3 to 5).

    Args:
        rule: scores the tokens and selects by the scores.
        ratio: share of the competing tokens to select: the paper's k%.
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
        # N * k% of equation 5. N counts only competing tokens: a token without context counts neither in N nor in the
        # selection.
        competing = [competing_tokens(pool, self._min_context) for pool in pools]
        return self._rule.plan(competing, self._ratio, group=self._group)

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        competing_BT = competing_tokens(pool, self._min_context)
        # Ties go to the earlier sample in the order of the run, so the selection is the same on any number of ranks.
        position_BT = pool.token_position_BT
        # L_delta of equation 3, or another score, then I_k% of equation 4. All ranks run the same score function, so an
        # error in it occurs on all of them.
        selection = agreed(
            lambda: self._rule.choose(signals, competing_BT, self._ratio, group=self._group, position=position_BT)
        )
        weights = {"loss": selection.weights}
        return Choice(selection.mask, weights, selection.threshold, competing_BT, selection.num_nan)
