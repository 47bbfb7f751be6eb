"""The selection of tokens: how many a pool keeps, which these are, and their summed loss.

Tokens are ranked within a scope: all ranks of a group together, each rank alone, or each sequence alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron_slm.errors import UserError
from megatron_slm.selection.threshold import Ranks, kth_largest, order_key, score_of_key

Scope = Literal["global", "rank", "sequence"]


@dataclass(frozen=True)
class Selection:
    """The selected tokens of one pool.

    mask          bool, shape of the scores, this rank
    weights       float32, shape of the scores, this rank; 0 or 1 for a hard selection
    threshold     float32, the lowest selected score: 0-dim, or `scores.shape[:-1]` for scope
                  'sequence'; NaN where nothing is valid
    num_selected, num_valid, num_nan
                  int64, 0-dim, sums over the group in every scope
    """

    mask: Tensor
    weights: Tensor
    threshold: Tensor
    num_selected: Tensor
    num_valid: Tensor
    num_nan: Tensor


def plan_k(valid_counts: Tensor, ratio: float) -> Tensor:
    """Return how many tokens pools of these sizes keep: `floor(ratio * n + 0.5)`, at least 1 unless the pool is empty.

    Args:
        valid_counts: int64, any shape: valid tokens of each pool.
        ratio: share to keep, in (0, 1].

    Returns:
        int64 of the same shape.
    """
    # In float64, which holds every count of tokens exactly.
    k = (valid_counts.double() * ratio + 0.5).floor().long()
    # At least 1, so that a small pool is not left out of the loss.
    return torch.maximum(k, (valid_counts > 0).long())


def plan_pools(
    valid: Sequence[Tensor], ratio: float, *, scope: Scope = "global", group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return how many tokens pools will keep over the group; one all-reduce, before any forward.

    Their sum is the one divisor of the summed loss of an optimizer step: N * k% of Rho-1, equation 5.

    Args:
        valid: bool `[..., T]`, this rank's part of each pool.
        ratio: share to keep, in (0, 1].
        scope: tokens that are ranked together within a pool.
        group: process group; None is the default group if initialised, else this process.

    Returns:
        int64 `[P]`, equal on all ranks.
    """
    # Both counts in one all-reduce: k of the sum is not the sum of the ranks' k.
    own_P2 = torch.stack([torch.stack([part.sum(), own_k(part, ratio, scope)]) for part in valid])
    valid_P, k_P = Ranks(group).sum(own_P2).unbind(-1)
    return plan_k(valid_P, ratio) if scope == "global" else k_P


def own_k(valid: Tensor, ratio: float, scope: Scope) -> Tensor:
    """Return how many tokens this rank keeps of a pool in the scopes `rank` and `sequence`: int64, 0-dim."""
    counts = valid.sum(-1) if scope == "sequence" else valid.sum()
    return plan_k(counts, ratio).sum()


def select_tokens(
    scores: Tensor,
    valid: Tensor,
    ratio: float,
    *,
    scope: Scope = "global",
    group: dist.ProcessGroup | None = None,
    position: Tensor | None = None,
) -> Selection:
    """Select the highest `ratio` of the valid scores, exactly (Rho-1, section 2.2, equation 4).

    Scores are ranked as float32. Ties go to the lowest position; -0.0 equals 0.0; NaN ranks below -inf, counts as valid
    and is selected last. The same scores, split over any number of ranks, give the same mask. All ranks of the group
    must call this together, also those without a valid token.

    Args:
        scores: float tensor of any shape, this rank; higher is kept.
        valid: bool, same shape; False (padding, ignored labels) never competes.
        ratio: share to keep, in (0, 1].
        scope: tokens that are ranked together: 'global' the group, 'rank' this rank, 'sequence' the last dimension.
        group: process group; None is the default group if initialised, else this process.
        position: int64, same shape, unique over the group; default: rank, then offset.

    Returns:
        The selection of this rank; its counts are sums over the group.

    Raises:
        ValueError: shapes differ, or the ratio is outside (0, 1].
    """
    check_arguments(scores, valid, ratio, scope, position)
    mask, threshold = keep_highest(scores, valid, ratio, scope=scope, group=group, position=position)
    # Summed in every scope, so that logs show the same numbers on all ranks.
    counts = torch.stack([mask.sum(), valid.sum(), (valid & scores.isnan()).sum()])
    num_selected, num_valid, num_nan = Ranks(group).sum(counts).unbind()
    return Selection(mask, mask.float(), threshold, num_selected, num_valid, num_nan)


def keep_highest(
    scores: Tensor,
    valid: Tensor,
    ratio: float,
    *,
    among: Tensor | None = None,
    scope: Scope = "global",
    group: dist.ProcessGroup | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mask and the threshold of `select_tokens`, without its counts.

    Args:
        scores, valid, ratio, scope, group, position: as in `select_tokens`.
        among: bool, same shape, not in scope 'sequence': the valid tokens that compete. k stays that of all valid
            tokens; if fewer compete, all of them are kept.
    """
    keys = order_key(scores)
    if scope == "sequence":
        return _keep_per_sequence(keys, valid, ratio, position)
    ranks = Ranks(group, alone=scope == "rank")
    competing = valid if among is None else valid & among
    num_valid, num_competing = ranks.sum(torch.stack([valid.sum(), competing.sum()])).unbind()
    # The divisor was planned from all valid tokens, so k must not shrink with the tokens that compete.
    k = torch.minimum(plan_k(num_valid, ratio), num_competing)
    return _keep_over_ranks(keys, competing, k, position, ranks)


def score_quantiles(
    scores: Tensor,
    valid: Tensor,
    quantiles: tuple[float, ...],
    group: dist.ProcessGroup | None = None,
    num_valid: Tensor | None = None,
) -> Tensor:
    """Return exact quantiles of the valid scores over the group.

    The q-quantile is the lowest of the highest `plan_k(num_valid, 1 - q)` scores, so the quantile `1 - ratio` is the
    threshold.

    Args:
        scores: float tensor of any shape, this rank.
        valid: bool, same shape.
        quantiles: in (0, 1).
        group: process group; None is the default group if initialised, else this process.
        num_valid: number of valid scores of the group, if it is known: this saves an all-reduce.

    Returns:
        float32 `[len(quantiles)]`; NaN if nothing is valid.
    """
    ranks = Ranks(group)
    num_valid = ranks.sum(valid.sum()) if num_valid is None else num_valid
    # The search needs k of at least 1; without a valid score, the result is replaced below.
    k_K = torch.stack([plan_k(num_valid, 1 - q) for q in quantiles]).clamp(min=1)
    found = kth_largest(order_key(scores)[valid], k_K, ranks)
    return score_of_key(found.key).where(num_valid > 0, torch.nan)


def _keep_over_ranks(
    keys: Tensor, competing: Tensor, k: Tensor, position: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Keep the k highest keys over all ranks; k is at most the number of competing keys."""
    found = kth_largest(keys[competing], k.clamp(min=1)[None], ranks)
    # [0], because only one k is searched.
    threshold_key, num_wanted, num_equal = found.key[0], found.num_wanted[0], found.num_equal[0]
    mask = competing & (keys >= threshold_key)
    if num_wanted < num_equal:
        # Not all tokens at the threshold fit into k: the lowest positions win. All ranks take this branch together.
        tied = competing & (keys == threshold_key)
        places = _default_position(keys, ranks) if position is None else position
        mask[tied] = _lowest(places[tied], num_wanted, ranks)
    return mask, score_of_key(threshold_key).where(k > 0, torch.nan)


def _lowest(position_N: Tensor, k: Tensor, ranks: Ranks) -> Tensor:
    """Return the mask of the k lowest positions over all ranks, by the same radix selection as for scores."""
    # Keys must not be negative, and the lowest position must have the highest key.
    ends = torch.stack([position_N, -position_N]) if len(position_N) else position_N.new_full((2, 1), -(1 << 62))
    highest, negated_lowest = ranks.max(ends.amax(-1)).tolist()
    keys_N = highest - position_N
    found = kth_largest(keys_N, k[None], ranks, bits=max(1, (highest + negated_lowest).bit_length()))
    return torch.ge(keys_N, found.key)


def _default_position(keys: Tensor, ranks: Ranks) -> Tensor:
    stride = ranks.max(torch.tensor(keys.numel(), device=keys.device))
    return ranks.rank * stride + torch.arange(keys.numel(), device=keys.device).view(keys.shape)


def _keep_per_sequence(keys: Tensor, valid: Tensor, ratio: float, position: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keep the highest keys of each last dimension on its own, without communication."""
    k = plan_k(valid.sum(-1, keepdim=True), ratio)
    # Below the key of NaN, which is 0.
    keys = keys.masked_fill(~valid, -1)
    if position is not None:
        # Sorted by position first: the stable sort by key then leaves ties in this order.
        by_position = position.argsort(dim=-1)
        ordered = keys.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
        order = by_position.gather(-1, ordered)
    else:
        order = keys.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(keys.shape[-1], device=keys.device).expand_as(keys)
    mask = torch.zeros_like(valid).scatter(-1, order, places < k)
    # The sum has one key, or none: indexing would fail for a sequence of length 0.
    lowest = keys.gather(-1, order).masked_fill(places != k - 1, 0).sum(-1)
    return mask, score_of_key(lowest)


def sequence_scores(scores: Tensor, valid: Tensor) -> Tensor:
    """Return the mean score of each sequence over its valid tokens (RHO-LOSS, Mindermann et al. 2022, on sequences).

    Args:
        scores: float `[..., T]`.
        valid: bool, same shape.

    Returns:
        float32 `[...]`; NaN for a sequence with a NaN, or without a valid token.
    """
    # In pairs and in float64: `sum` may add in another order if the batch has another shape. This order gives the same
    # bits on any number of ranks.
    total = scores.detach().double().masked_fill(~valid, 0.0)
    while total.shape[-1] > 1:
        total = pad(total, (0, total.shape[-1] % 2))
        total = total[..., ::2] + total[..., 1::2]
    return (total.sum(-1) / valid.sum(-1)).float()


def as_tokens(values: Tensor, valid: Tensor) -> Tensor:
    """Return one value per sequence, `[...]`, repeated for its tokens, `[..., T]`."""
    return values[..., None].expand_as(valid)


def check_arguments(scores: Tensor, valid: Tensor, ratio: float, scope: str, position: Tensor | None) -> None:
    """Check the arguments of `select_tokens`.

    Raises:
        ValueError: shapes or types are wrong.
        UserError: the ratio is outside (0, 1], or the scope is unknown.
    """
    if scores.shape != valid.shape or (position is not None and position.shape != scores.shape):
        raise ValueError(f"scores {tuple(scores.shape)}, valid and position must have one shape.")
    if valid.dtype != torch.bool or not scores.is_floating_point():
        raise ValueError("valid must be bool and scores a float tensor.")
    if not 0 < ratio <= 1:
        raise UserError("ratio", ratio, "it is the share of tokens to keep", "Use a number above 0 and at most 1")
    if scope not in ("global", "rank", "sequence"):
        raise UserError("scope", scope, "there is no such scope", "Use global, rank or sequence")


def selected_loss(loss: Tensor, selection: Selection) -> Tensor:
    """Return the summed loss of the selected tokens of this rank (Rho-1, equation 5, before its division).

    Divide once, by the number planned over all ranks and micro-batches of the optimizer step. A mean here would give
    too much weight to ranks with few selected tokens.

    Args:
        loss: float32, same shape as the scores that were selected from; may require a gradient.
        selection: what `select_tokens` returned for them.

    Returns:
        0-dim float32, this rank only.
    """
    return weighted_loss(loss, selection.weights)


def weighted_loss(loss: Tensor, weights: Tensor) -> Tensor:
    """Return `sum(weights * loss)`, 0-dim float32; an infinite loss of weight 0 leaves no NaN in it."""
    # masked_fill, because 0 * inf is NaN, in the loss and in its gradient.
    return (loss.masked_fill(weights == 0, 0.0) * weights).sum()
