"""The whole rule as `selection:` says it, for any loop: plan from labels, then choose from signals."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.selection.scoring import call_score, find_score
from megatron_slm.selection.select import Selection, check_arguments, keep_highest, plan_pools
from megatron_slm.selection.settings import SelectionSettings
from megatron_slm.selection.units import as_tokens, sequence_scores
from megatron_slm.selection.weighting import perturbed, scale_to_plan, soft_weights


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
