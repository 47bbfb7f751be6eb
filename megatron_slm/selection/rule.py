"""The complete selection rule: the schedule of the ratio, the selection by one or several scores, and the weights."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.selection.scores import Score, call_score, find_score
from megatron_slm.selection.select import (
    Scope,
    Selection,
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
    """Return the share to keep in the step that begins after `tokens`; None while the run trains on all tokens.

    It depends only on the trained tokens, so that resuming needs no state and all ranks agree. The schedules `linear`
    and `cosine` fall from 1 to `ratio` over `schedule_tokens`, beginning at `start`; `steps` counts from the first
    token of the run. (The Rho-1 branch of open_lm also starts to select after a share of the run.)

    Args:
        settings: `ratio`, `start`, `schedule` and the settings of the schedule.
        tokens: tokens trained on before the step, over all ranks.
        train_tokens: length of the run, of which `start` is a share.
    """
    begin = settings.start * train_tokens
    if tokens < begin:
        return None
    if settings.schedule == "steps":
        reached = [ratio for first, ratio in settings.ratio_steps if first <= tokens]
        return reached[-1] if reached else 1.0
    # From 0 at the start to 1 at the end of the schedule.
    progress = (tokens - begin) / settings.schedule_tokens if settings.schedule_tokens else 1.0
    if progress >= 1:
        return settings.ratio
    remaining = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.ratio + (1 - settings.ratio) * remaining


def perturbed(scores: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Return scores whose highest k are a random draw of k tokens.

    The draw is without replacement and in proportion to exp(score / temperature). The scores are score / temperature
    plus Gumbel noise: the Gumbel-top-k trick (Kool et al. 2019, arXiv 1903.06059, section 2).

    Args:
        scores: float tensor of any shape.
        uniform: numbers in (0, 1), same shape; those of `token_uniform` make the draw the same on any number of ranks.
        temperature: above 0. As it falls, the draw approaches the highest scores; as it rises, a uniform draw.

    Returns:
        float32, same shape.
    """
    # In float64, because vectorised logarithms differ in their last bits. Rounding to float32 removes the difference.
    gumbel = -(-uniform.double().log()).log()
    return (scores.detach().double() / temperature + gumbel).float()


def soft_weights(scores: Tensor, valid: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """Return `sigmoid((score - threshold) / temperature)` of the valid tokens: reweighting instead of selection.

    The authors of Rho-1 suggest reweighting as an extension (NeurIPS version, appendix C).

    Args:
        scores: float tensor of any shape.
        valid: bool, same shape.
        threshold: float32 that broadcasts to the scores. NaN, which occurs if tokens with score NaN were selected,
            lies below all scores.
        temperature: above 0. As it falls, the weights approach a hard selection.

    Returns:
        float64 of the same shape, not yet scaled to the plan; 0 for NaN scores.
    """
    values = scores.detach().float().double()
    lowest = threshold.double().masked_fill(threshold.isnan(), -torch.inf)
    # The difference of two equal infinities would be NaN.
    distance = (values - lowest).masked_fill(values == lowest, 0.0)
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
    """Return a selection whose weights sum to the planned k over the group, so that every rule has the same divisor.

    If all weights are 0, they stay 0. It makes one small all-reduce, so all ranks of the group must call it together.

    Args:
        mask: bool, the selected tokens of this rank.
        weights: 0 or more, same shape.
        threshold: threshold of the selection.
        valid: bool, same shape.
        ratio: the planned share, in (0, 1].
        nan: bool, same shape: tokens whose score is NaN, for the count.
        scope: scope of the plan.
        group: process group; None is the default group if initialised, else this process.
    """
    total = weights.sum(dtype=torch.float64)
    counts = [mask.sum(), valid.sum(), (valid & nan).sum(), own_k(valid, ratio, scope), total]
    # One all-reduce for all of them: float64 holds the counts exactly.
    sums = Ranks(group).sum(torch.stack([count.double() for count in counts]))
    num_selected, num_valid, num_nan, k = sums[:4].long().unbind()
    # As in `plan_pools`: k of the group's tokens, or the sum of the k of its ranks or sequences.
    planned = plan_k(num_valid, ratio) if scope == "global" else k
    # Exactly 1 for a hard selection of as many tokens as planned.
    factor = (planned / sums[4]).where(sums[4] > 0, 0.0)
    return Selection(mask, (weights * factor).float(), threshold, num_selected, num_valid, num_nan)


class Competition(NamedTuple):
    """This rank's part of the tokens that compete for selection.

    valid     bool `[..., T]`
    position  int64, same shape, for ties; None for order by rank, then by offset
    group     process group; None is the default group if initialised, else this process
    uniform   the tokens' random numbers for a stochastic selection; None otherwise
    """

    valid: Tensor
    position: Tensor | None
    group: dist.ProcessGroup | None
    uniform: Tensor | None


class ScoreSelection(NamedTuple):
    """The selection by one score; all but the threshold have the shape of the tokens.

    mask       the selected tokens
    threshold  the lowest selected value of `ranked`
    ranked     the scores by which tokens were ranked, with noise if the selection is stochastic
    competing  the tokens that could be selected
    nan        tokens whose score is NaN
    """

    mask: Tensor
    threshold: Tensor
    ranked: Tensor
    competing: Tensor
    nan: Tensor


class RankedBy(NamedTuple):
    """A score of the rule, the setting that names it, and the share that it keeps (None: the rule's)."""

    score: Score
    setting: str
    ratio: float | None

    def scores(self, signals: dict[str, Tensor], valid: Tensor) -> Tensor:
        return call_score(self.score, signals, valid, self.setting)


class Rule:
    """A selection rule: scores, their combination, the unit and the weighting.

    Args:
        settings: the group `selection`. The training loop applies `pool`, `schedule` and `start` (see `ratio_at`).

    Attributes:
        needs: names of the signals that `choose` reads.

    Raises:
        UserError: a score does not exist.
    """

    def __init__(self, settings: SelectionSettings) -> None:
        self.settings = settings
        self._ranked_by: list[RankedBy] = []
        for index, part in enumerate(settings.of):
            setting = f"selection.of[{index}].score"
            self._ranked_by.append(RankedBy(find_score(part.score, setting), setting, part.ratio))
        if not settings.of:
            self._ranked_by.append(RankedBy(find_score(settings.score), "selection.score", None))
        needs = [name for ranked_by in self._ranked_by for name in ranked_by.score.needs]
        if settings.weighting == "stochastic":
            needs.append("uniform")
        # Each once, in order.
        self.needs = tuple(dict.fromkeys(needs))

    def plan(
        self, valid: Sequence[Tensor], ratio: float | None = None, *, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return the planned sum of each pool's weights over the group, int64 `[P]`, by one all-reduce.

        Divide the summed loss of an optimizer step once, by the total over its pools.

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
        """Select from one pool; every rank of the group must call it, including ranks without a valid token.

        Args:
            signals: columns by name, float `[..., T]`, this rank: those in `needs`.
            valid: bool, same shape; False never competes.
            ratio: share to keep; default: that of the settings. Combined scores have ratios of their own.
            group: process group; None is the default group if initialised, else this process.
            position: int64, same shape, unique over the group, for ties; default: by rank, then by offset.

        Returns:
            The selection of this rank. Its weights sum to the planned k over the group, or are all 0 if nothing is
            selected. Its threshold includes the noise of a stochastic selection, and is NaN for combined scores
            (unions and intersections: Rho-1, NeurIPS version, section 3.4).

        Raises:
            UserError: a score function did not return one score per token.
        """
        settings = self.settings
        ratio = settings.ratio if ratio is None else ratio
        uniform = signals["uniform"] if settings.weighting == "stochastic" else None
        competition = Competition(valid, position, group, uniform)
        parts = []
        for ranked_by in self._ranked_by:
            # L_delta of equation 3, or another score.
            scores = ranked_by.scores(signals, valid)
            own_ratio = ratio if ranked_by.ratio is None else ranked_by.ratio
            parts.append(self._select(scores, own_ratio, competition))
        mask, threshold = parts[0].mask, parts[0].threshold
        if settings.combine is not None:
            masks = torch.stack([part.mask for part in parts])
            mask = masks.any(0) if settings.combine == "union" else masks.all(0)
            # Several scores have no common threshold.
            threshold = torch.full_like(threshold, torch.nan)
        # Soft weights need one threshold, so settings refuse to combine them.
        weights = self._soft(parts[0]) if settings.weighting == "soft" else mask
        nan = torch.stack([part.nan for part in parts]).any(0)
        return scale_to_plan(mask, weights, threshold, valid, ratio, nan=nan, scope=settings.scope, group=group)

    def rank_sequences(self, signals: dict[str, Tensor], valid: Tensor) -> Tensor:
        """Return the mean score of each sequence over its valid tokens: float32 `[...]`; NaN if it has none.

        Args:
            signals: columns by name, float `[..., T]`: those in `needs`.
            valid: bool, same shape.

        Raises:
            UserError: the score function did not return one score per token.
        """
        return sequence_scores(self._ranked_by[0].scores(signals, valid), valid)

    def _select(self, scores: Tensor, ratio: float, competition: Competition) -> ScoreSelection:
        settings, valid = self.settings, competition.valid
        check_arguments(scores, valid, ratio, settings.scope, competition.position)
        if settings.unit == "sequence":
            return self._select_sequences(scores, ratio, competition)
        competing = valid
        if settings.unit == "both":
            # Sequences are not drawn: they would reuse the random numbers of their first tokens, which are drawn below.
            undrawn = competition._replace(uniform=None)
            competing = self._select_sequences(scores, settings.sequence_ratio or 1.0, undrawn).mask
        ranked = self._drawn(scores, competition.uniform)
        mask, threshold = keep_highest(
            ranked,
            valid,
            ratio,
            among=competing,
            scope=settings.scope,
            group=competition.group,
            position=competition.position,
        )
        return ScoreSelection(mask, threshold, ranked, competing, scores.isnan())

    def _select_sequences(self, scores: Tensor, ratio: float, competition: Competition) -> ScoreSelection:
        """Select whole sequences. A stochastic selection uses the random number of each sequence's first token."""
        valid = competition.valid
        first_position = None if competition.position is None else competition.position[..., 0]
        first_uniform = None if competition.uniform is None else competition.uniform[..., 0]
        ranked = self._drawn(sequence_scores(scores, valid), first_uniform)
        kept, threshold = keep_highest(
            ranked,
            valid.any(-1),
            ratio,
            scope=self.settings.scope,
            group=competition.group,
            position=first_position,
        )
        # A selected sequence keeps all of its valid tokens, and no other token.
        mask = valid & kept[..., None]
        return ScoreSelection(mask, threshold, ranked[..., None].expand_as(valid), valid, scores.isnan())

    def _drawn(self, scores: Tensor, uniform: Tensor | None) -> Tensor:
        return scores if uniform is None else perturbed(scores, uniform, self.settings.temperature)

    def _soft(self, part: ScoreSelection) -> Tensor:
        # Scope `sequence` has a threshold per sequence, which must broadcast over its tokens.
        by_sequence = self.settings.scope == "sequence"
        threshold = part.threshold[..., None] if by_sequence else part.threshold
        return soft_weights(part.ranked, part.competing, threshold, self.settings.temperature)
