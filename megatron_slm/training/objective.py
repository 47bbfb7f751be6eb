"""Which tokens of a pool count, and how many that will be: all of them (CLM), or the selected ones (SLM).

A *pool* is what is ranked together: one micro-batch of each rank, or the whole optimizer step.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_slm.dist import all_reduce_sum
from megatron_slm.errors import AgreedError
from megatron_slm.selection.rule import Rule
from megatron_slm.types import Batch, TokenSignals


class Choice(NamedTuple):
    """What was selected from one pool.

    mask_BT       bool, this rank: the selected tokens
    weights_BT    float32, this rank
    threshold     float32; NaN if there is none
    competing_BT  bool, this rank: the tokens that could be selected
    num_nan       int64, all ranks: competing tokens whose score is NaN
    """

    mask_BT: Tensor
    weights_BT: Tensor
    threshold: Tensor
    competing_BT: Tensor
    num_nan: Tensor | int = 0


class Objective(Protocol):
    """Of one optimizer step.

    needs             signals that `choose` reads
    selects           some tokens may be left out; the reference is run, for `choose` or for the records
    pools_whole_step  a pool is the whole optimizer step
    """

    needs: tuple[str, ...]
    selects: bool
    pools_whole_step: bool

    def plan(self, pools: list[Batch]) -> Tensor:
        """int64 `[P]`: what the weights of each pool will sum to over all ranks; known before any forward."""

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        """This rank's part of one pool; every rank calls it.

        Raises:
            AgreedError: a score returned something else than a score for each token.
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
    """Every valid token counts."""

    needs: tuple[str, ...] = ()
    selects = False
    pools_whole_step = False

    def plan(self, pools: list[Batch]) -> Tensor:
        return all_reduce_sum(torch.stack([pool.valid_BT.sum() for pool in pools]))

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        no_threshold = torch.tensor(torch.nan, device=pool.valid_BT.device)
        return Choice(pool.valid_BT, pool.valid_BT.float(), no_threshold, competing_BT=pool.valid_BT)


class SelectiveLanguageModeling:
    """The tokens that a rule keeps count (Rho-1, section 2.2, for the rule of highest excess loss).

    Args:
        rule: what is kept, by which score.
        ratio: share of the competing tokens that is selected.
        pools_whole_step: rank the whole optimizer step together instead of each micro-step.
        min_context: see `competing_tokens`.
    """

    selects = True

    def __init__(self, rule: Rule, ratio: float, pools_whole_step: bool, min_context: int = 0) -> None:
        self.needs = rule.needs
        self.pools_whole_step = pools_whole_step
        self._rule = rule
        self._ratio = ratio
        self._min_context = min_context

    def plan(self, pools: list[Batch]) -> Tensor:
        return self._rule.plan([competing_tokens(pool, self._min_context) for pool in pools], self._ratio)

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        competing_BT = competing_tokens(pool, self._min_context)
        try:
            selection = self._rule.choose(signals, competing_BT, self._ratio, position=pool.token_position_BT)
        except ValueError as error:  # a score of the user's, on every rank
            raise AgreedError(str(error)) from error
        return Choice(selection.mask, selection.weights, selection.threshold, competing_BT, selection.num_nan)
