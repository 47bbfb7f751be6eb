"""The selection of tokens: the number that a pool keeps, their mask, and their summed loss.

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
from megatron_slm.selection.threshold import Ranks, first_digit_counts, kth_largest, order_key, score_of_key

Scope = Literal["global", "rank", "sequence"]


@dataclass(frozen=True)
class Selection:
    """The selected tokens of one pool.

    mask          bool, shape of the scores, this rank
    weights       float32, shape of the scores, this rank; 0 or 1 for a hard selection
    threshold     float32, the lowest selected score: 0-dim, or `scores.shape[:-1]` in scope 'sequence'; NaN if no
                  token is valid
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
    """Return the number of tokens that each pool keeps: `floor(ratio * n + 0.5)`, and at least 1 if n is not 0.

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
    """Return the number of tokens that each pool will keep over the group, by one all-reduce before any forward.

    The sum over the pools is the divisor of the summed loss of an optimizer step: N * k% of Rho-1, equation 5.

    Args:
        valid: bool `[..., T]`, this rank's part of each pool.
        ratio: share to keep, in (0, 1].
        scope: the tokens of a pool that are ranked together.
        group: process group; None is the default group if initialised, else this process.

    Returns:
        int64 `[P]`, equal on all ranks.
    """
    # Scope `global` takes k of the summed count; the other scopes sum the k of each rank. Rounding makes these differ.
    own_P2 = torch.stack([torch.stack([part.sum(), own_k(part, ratio, scope)]) for part in valid])
    valid_P, k_P = Ranks(group).sum(own_P2).unbind(-1)
    return plan_k(valid_P, ratio) if scope == "global" else k_P


def own_k(valid: Tensor, ratio: float, scope: Scope) -> Tensor:
    """Return the number of tokens of a pool that this rank keeps in scope `rank` or `sequence`: int64, 0-dim."""
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

    Scores are ranked as float32. Ties go to the lowest position, and -0.0 equals 0.0. NaN ranks below -inf, so a valid
    token without a score is selected last. The same scores give the same mask on any number of ranks. All ranks of the
    group must call this together, including those without a valid token.

    Args:
        scores: float tensor of any shape, this rank; the highest are selected.
        valid: bool, same shape; False (padding, ignored labels) never competes.
        ratio: share to keep, in (0, 1].
        scope: tokens that are ranked together: 'global' the group, 'rank' this rank, 'sequence' the last dimension.
        group: process group; None is the default group if initialised, else this process.
        position: int64, same shape, unique over the group; default: by rank, then by offset.

    Returns:
        The selection of this rank; its counts are sums over the group.

    Raises:
        ValueError: shapes or dtypes are wrong.
        UserError: the ratio is outside (0, 1], or the scope is unknown.
    """
    check_arguments(scores, valid, ratio, scope, position)
    mask, threshold = keep_highest(scores, valid, ratio, scope=scope, group=group, position=position)
    # Summed over the group in every scope, so that all ranks log the same numbers.
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
        among: bool, same shape: only these valid tokens compete, in scopes 'global' and 'rank'. k is still that of all
            valid tokens; if fewer compete, all of them are kept.
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
    first_counts: Tensor | None = None,
) -> Tensor:
    """Return exact quantiles of the valid scores over the group.

    The q-quantile is the lowest of the highest `plan_k(num_valid, 1 - q)` scores, so the quantile `1 - ratio` is the
    threshold.

    Args:
        scores: float tensor of any shape, this rank.
        valid: bool, same shape.
        quantiles: in (0, 1).
        group: process group; None is the default group if initialised, else this process.
        first_counts: the counts that `quantile_counts` returns, summed over the group, if some other all-reduce has
            summed them. This saves two of four all-reduces.

    Returns:
        float32 `[len(quantiles)]`; NaN if no score is valid.
    """
    ranks = Ranks(group)
    num_valid = ranks.sum(valid.sum()) if first_counts is None else first_counts.sum()
    # The search needs k >= 1. Without a valid score, its result is replaced by NaN below.
    k_K = torch.stack([plan_k(num_valid, 1 - q) for q in quantiles]).clamp(min=1)
    found = kth_largest(order_key(scores)[valid], k_K, ranks, first_counts_D=first_counts)
    return score_of_key(found.key).where(num_valid > 0, torch.nan)


def quantile_counts(scores: Tensor, valid: Tensor) -> Tensor:
    """Return what the first round of `score_quantiles` counts on this rank, int64 `[2**11]`.

    Args:
        scores: float tensor of any shape, this rank.
        valid: bool, same shape.
    """
    return first_digit_counts(order_key(scores)[valid])


def _keep_over_ranks(
    keys: Tensor, competing: Tensor, k: Tensor, position: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Return the mask of the k highest keys over all ranks, and the threshold; at least k keys compete."""
    found = kth_largest(keys[competing], k.clamp(min=1)[None], ranks)
    # [0], because `kth_largest` searches several k at once, and there is one here.
    threshold_key, num_wanted, num_equal = found.key[0], found.num_wanted[0], found.num_equal[0]
    mask = competing & (keys >= threshold_key)
    if num_wanted < num_equal:
        # Only some of the tokens at the threshold fit into k: those with the lowest positions. The counts are equal on
        # all ranks, so all of them take this branch and join its collectives.
        tied = competing & (keys == threshold_key)
        places = _default_position(keys, ranks) if position is None else position
        mask[tied] = _lowest(places[tied], num_wanted, ranks)
    return mask, score_of_key(threshold_key).where(k > 0, torch.nan)


def _lowest(position_N: Tensor, k: Tensor, ranks: Ranks) -> Tensor:
    """Return the mask of the k lowest positions over all ranks, by the radix selection that finds the threshold."""
    # The lowest position must have the highest key, and keys must not be negative.
    ends = torch.stack([position_N, -position_N]) if len(position_N) else position_N.new_full((2, 1), -(1 << 62))
    highest, negated_lowest = ranks.max(ends.amax(-1)).tolist()
    keys_N = highest - position_N
    found = kth_largest(keys_N, k[None], ranks, bits=max(1, (highest + negated_lowest).bit_length()))
    return torch.ge(keys_N, found.key)


def _default_position(keys: Tensor, ranks: Ranks) -> Tensor:
    stride = ranks.max(torch.tensor(keys.numel(), device=keys.device))
    return ranks.rank * stride + torch.arange(keys.numel(), device=keys.device).view(keys.shape)


def _keep_per_sequence(keys: Tensor, valid: Tensor, ratio: float, position: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mask and the threshold of each sequence (the last dimension) on its own, without communication."""
    k = plan_k(valid.sum(-1, keepdim=True), ratio)
    # -1 ranks below every valid key: the lowest is 0, the key of NaN.
    keys = keys.masked_fill(~valid, -1)
    places = torch.arange(keys.shape[-1], device=keys.device).expand_as(keys)
    # Sort by position first: the stable sort by key then leaves ties in this order.
    by_position = places if position is None else position.argsort(dim=-1)
    ordered = keys.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
    order = by_position.gather(-1, ordered)
    mask = torch.zeros_like(valid).scatter(-1, order, places < k)
    # A sum of at most one key, because indexing would fail for a sequence of length 0.
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
    # Add in pairs, in float64. The order in which `sum` adds depends on the shape of the batch, and so on the number of
    # ranks; this order gives the same bits on any number.
    total = scores.detach().double().masked_fill(~valid, 0.0)
    while total.shape[-1] > 1:
        total = pad(total, (0, total.shape[-1] % 2))
        total = total[..., ::2] + total[..., 1::2]
    return (total.sum(-1) / valid.sum(-1)).float()


def check_arguments(scores: Tensor, valid: Tensor, ratio: float, scope: str, position: Tensor | None) -> None:
    """Check the arguments of `select_tokens`.

    Raises:
        ValueError: shapes or dtypes are wrong.
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
    """Return the summed loss of this rank's selected tokens (Rho-1, equation 5, before its division).

    Divide it once, by the number planned over all ranks and micro-batches of the optimizer step. A mean per rank would
    give too much weight to ranks with few selected tokens.

    Args:
        loss: float32, in the shape of the scores; may require a gradient.
        selection: the result of `select_tokens` for these scores.

    Returns:
        0-dim float32, this rank only.
    """
    return weighted_loss(loss, selection.weights)


def weighted_loss(loss: Tensor, weights: Tensor) -> Tensor:
    """Return `sum(weights * loss)`, 0-dim float32, without the losses of weight 0, which may be infinite."""
    # masked_fill, because 0 * inf is NaN in the loss and in its gradient.
    return (loss.masked_fill(weights == 0, 0.0) * weights).sum()
