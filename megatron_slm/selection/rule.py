"""The ratio as a function of the tokens that were trained on, so that resuming needs no state and all ranks agree."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.selection.scores import call_score, find_score
from megatron_slm.selection.select import (
    Scope,
    Selection,
    as_tokens,
    check_arguments,
    keep_highest,
    own_k,
    plan_k,
    plan_pools,
    sequence_scores,
)
from megatron_slm.selection.settings import SelectionSettings
from megatron_slm.selection.threshold import Ranks


def ratio_at(settings: SelectionSettings, tokens: int, train_tokens: int) -> float | None:
    """Share to keep in the step that begins after `tokens`; None while all tokens count and no score is needed.

    Starting to select after a share of the run is the switch of open_lm's Rho-1 branch; linear and
    cosine then lead from 1 to `ratio` over `schedule_tokens`; steps counts from the first token of the run.

    Args:
        settings: `schedule` and what belongs to it, `ratio`, `start`.
        tokens: trained on before the step, over all ranks.
        train_tokens: length of the run, of which `start` is a share.
    """
    begin = settings.start * train_tokens
    if tokens < begin:
        return None
    if settings.schedule == "steps":
        reached = [ratio for first, ratio in settings.ratio_steps if first <= tokens]
        return reached[-1] if reached else 1.0
    progress = (tokens - begin) / settings.schedule_tokens if settings.schedule_tokens else 1.0
    if progress >= 1:
        return settings.ratio
    remaining = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.ratio + (1 - settings.ratio) * remaining


def perturbed(scores: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Scores whose highest k are a draw of k without replacement, in proportion to exp(score / temperature).

    Score / temperature plus Gumbel noise: the Gumbel-top-k trick (Kool et al. 2019, arXiv 1903.06059, section 2).

    Args:
        scores: float tensor of any shape.
        uniform: numbers in (0, 1), same shape; a token's own (`token_uniform`) make the draw the same on any number of
            ranks.
        temperature: above 0; low ones come near to the highest scores, high ones to a uniform draw.

    Returns:
        float32, same shape.
    """
    # In float64, so that vectorised logarithms, which differ in their last bits, give the same float32.
    gumbel = -(-uniform.double().log()).log()
    return (scores.detach().double() / temperature + gumbel).float()


def soft_weights(scores: Tensor, valid: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """`sigmoid((score - threshold) / temperature)` of the valid tokens: reweighting instead of selection.

    The authors of Rho-1 name it as an extension (NeurIPS version, appendix C).

    Args:
        scores: float tensor of any shape.
        valid: bool, same shape.
        threshold: float32 that broadcasts to it; NaN, where tokens without a score are kept too, lies below all scores.
        temperature: above 0; low ones come near to a hard selection.

    Returns:
        float64 of the same shape, not yet scaled; 0 for NaN scores.
    """
    values = scores.detach().float().double()
    cut = threshold.double().masked_fill(threshold.isnan(), -torch.inf)
    distance = (values - cut).masked_fill(values == cut, 0.0)
    return torch.sigmoid(distance / temperature).masked_fill(~valid | values.isnan(), 0.0)


def scale_to_plan(
    mask: Tensor,
    weights: Tensor,
    threshold: Tensor,
    valid: Tensor,
    ratio: float,
    *,
    nan: Tensor,
    scope: Scope = "global",
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """A selection whose weights sum to the planned k over the group: then the step's one divisor holds for any rule.

    All of them are 0 where nothing has a weight. One small all-reduce; all ranks of the group must call this together.

    Args:
        mask: bool, what is kept, this rank.
        weights: 0 or more, same shape.
        threshold: of the selection.
        valid: bool, same shape.
        ratio: the planned share, in (0, 1].
        nan: bool, same shape: tokens whose score is NaN, to be counted.
        scope: of the plan.
        group: process group; None is the default group if initialised, else this process.
    """
    total = weights.sum(dtype=torch.float64)
    counts = [mask.sum(), valid.sum(), (valid & nan).sum(), own_k(valid, ratio, scope), total]
    sums = Ranks(group).sum(torch.stack([count.double() for count in counts]))
    num_selected, num_valid, num_nan, k = sums[:4].long().unbind()
    planned = plan_k(num_valid, ratio) if scope == "global" else k
    # Exactly 1 where as many are kept as were planned.
    factor = (planned / sums[4]).where(sums[4] > 0, 0.0)
    return Selection(mask, (weights * factor).float(), threshold, num_selected, num_valid, num_nan)


class Pool(NamedTuple):
    """This rank's part of what is ranked together. uniform: the tokens' random numbers, if the choice is drawn."""

    valid: Tensor
    position: Tensor | None
    group: dist.ProcessGroup | None
    uniform: Tensor | None


class Kept(NamedTuple):
    """What one score keeps; in the shape of the tokens, but for the threshold.

    mask       what is kept
    threshold  the lowest that is kept, of what was ranked
    ranked     what was ranked
    competing  among what
    nan        tokens without a score
    """

    mask: Tensor
    threshold: Tensor
    ranked: Tensor
    competing: Tensor
    nan: Tensor


class Rule:
    """Score, combination, unit and weighting together.

    Args:
        settings: of `selection:`; `pool`, `schedule` and `start` are the loop's own business (`ratio_at`).

    `needs` are the signals that `choose` reads.

    Raises:
        ValueError: a sentence, if there is no such score.
    """

    def __init__(self, settings: SelectionSettings) -> None:
        self.settings = settings
        parts: list[tuple[str, float | None]] = [(part.score, part.ratio) for part in settings.of]
        self._scores = [(find_score(name), own) for name, own in parts or [(settings.score, None)]]
        needs = [name for score, _ in self._scores for name in score.needs]
        drawn = ["uniform"] if settings.weighting == "stochastic" else []
        self.needs = tuple(dict.fromkeys(needs + drawn))

    def plan(
        self, valid: Sequence[Tensor], ratio: float | None = None, *, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """int64 `[P]`: what the weights of each pool will sum to over the group; one all-reduce.

        Divide the summed loss of an optimizer step once, by the sum of this over its pools.

        Args:
            valid: bool `[..., T]`, this rank's part of each pool.
            ratio: share to keep; default: that of the settings.
            group: process group; None is the default group if initialised, else this process.
        """
        ratio = self.settings.ratio if ratio is None else ratio
        return plan_pools(valid, ratio, scope=self.settings.scope, group=group)

    def choose(
        self,
        signals: dict[str, Tensor],
        valid: Tensor,
        ratio: float | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        position: Tensor | None = None,
    ) -> Selection:
        """Select from one pool; every rank of the group calls it together, also without a valid token.

        The weights sum to the planned k over the group, or are all 0 where nothing is kept; `mask` is what was
        really kept; the threshold is of what was ranked (drawn: with the noise), and NaN for combined scores (unions
        and intersections: Rho-1, NeurIPS version, section 3.4).

        Args:
            signals: columns by name, float `[..., T]`, this rank: those in `needs`.
            valid: bool, same shape; False never competes.
            ratio: share to keep; default: that of the settings. Combined scores keep by ratios of their own.
            group: process group; None is the default group if initialised, else this process.
            position: int64, same shape, unique over the group, for ties; default: rank, then offset.

        Raises:
            ValueError: a score returned something else than a score for each token.
        """
        settings = self.settings
        ratio = settings.ratio if ratio is None else ratio
        uniform = signals["uniform"] if settings.weighting == "stochastic" else None
        pool = Pool(valid, position, group, uniform)
        kept = [
            self._keep(call_score(score, signals, valid), ratio if own is None else own, pool)
            for score, own in self._scores
        ]
        mask, threshold = kept[0].mask, kept[0].threshold
        if settings.combine is not None:
            masks = torch.stack([part.mask for part in kept])
            mask = masks.any(0) if settings.combine == "union" else masks.all(0)
            threshold = torch.full_like(threshold, torch.nan)
        weights = self._soft(kept[0]) if settings.weighting == "soft" else mask
        nan = torch.stack([part.nan for part in kept]).any(0)
        return scale_to_plan(mask, weights, threshold, valid, ratio, nan=nan, scope=settings.scope, group=group)

    def rank_sequences(self, signals: dict[str, Tensor], valid: Tensor) -> Tensor:
        """Mean score of each sequence over its valid tokens, float32 `[...]`; NaN where that is not defined.

        Args:
            signals: columns by name, float `[..., T]`: those in `needs`.
            valid: bool, same shape.

        Raises:
            ValueError: a score returned something else than a score for each token.
        """
        return sequence_scores(call_score(self._scores[0][0], signals, valid), valid)

    def _keep(self, scores: Tensor, ratio: float, pool: Pool) -> Kept:
        settings = self.settings
        check_arguments(scores, pool.valid, ratio, settings.scope, pool.position)
        if settings.unit == "sequence":
            return self._keep_sequences(scores, ratio, pool)
        competing = pool.valid
        if settings.unit == "both":
            # Not drawn: a sequence has no random number that is not one of its tokens' too.
            competing = self._keep_sequences(scores, settings.sequence_ratio or 1.0, pool._replace(uniform=None)).mask
        ranked = self._drawn(scores, pool.uniform)
        mask, threshold = keep_highest(
            ranked,
            pool.valid,
            ratio,
            among=competing,
            scope=settings.scope,
            group=pool.group,
            position=pool.position,
        )
        return Kept(mask, threshold, ranked, competing, scores.isnan())

    def _keep_sequences(self, scores: Tensor, ratio: float, pool: Pool) -> Kept:
        """Whole sequences; drawn, each by the random number of its first token."""
        valid, first = pool.valid, None if pool.position is None else pool.position[..., 0]
        ranked = self._drawn(sequence_scores(scores, valid), None if pool.uniform is None else pool.uniform[..., 0])
        kept, threshold = keep_highest(
            ranked, valid.any(-1), ratio, scope=self.settings.scope, group=pool.group, position=first
        )
        mask = valid & as_tokens(kept, valid)
        return Kept(mask, threshold, as_tokens(ranked, valid), valid, scores.isnan())

    def _drawn(self, scores: Tensor, uniform: Tensor | None) -> Tensor:
        return scores if uniform is None else perturbed(scores, uniform, self.settings.temperature)

    def _soft(self, kept: Kept) -> Tensor:
        by_sequence = self.settings.scope == "sequence"
        threshold = kept.threshold[..., None] if by_sequence else kept.threshold
        return soft_weights(kept.ranked, kept.competing, threshold, self.settings.temperature)
