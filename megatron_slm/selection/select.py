"""Whole sequences as what is ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron_slm.selection.threshold import Ranks, kth_largest, order_key, score_of_key


def sequence_scores(scores: Tensor, valid: Tensor) -> Tensor:
    """Mean score of each sequence over its valid tokens (RHO-LOSS, Mindermann et al. 2022, on sequences).

    Added up in one order, whatever other sequences lie beside: the same bits on any number of ranks.

    Args:
        scores: float `[..., T]`.
        valid: bool, same shape.

    Returns:
        float32 `[...]`; NaN for a sequence with a NaN, or without a valid token.
    """
    total = scores.detach().double().masked_fill(~valid, 0.0)
    while total.shape[-1] > 1:
        total = pad(total, (0, total.shape[-1] % 2))
        total = total[..., ::2] + total[..., 1::2]
    return (total.sum(-1) / valid.sum(-1)).float()


def as_tokens(values: Tensor, valid: Tensor) -> Tensor:
    """One value a sequence, `[...]`, repeated for its tokens, `[..., T]`."""
    return values[..., None].expand_as(valid)


Scope = Literal["global", "rank", "sequence"]


@dataclass(frozen=True)
class Selection:
    """What was selected.

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
    """How many tokens pools of these sizes keep: `floor(ratio * n + 0.5)`, at least 1 of a pool that is not empty.

    Args:
        valid_counts: int64, any shape: valid tokens of each pool.
        ratio: share to keep, in (0, 1].

    Returns:
        int64 of the same shape.
    """
    k = (valid_counts.double() * ratio + 0.5).floor().long()
    return torch.maximum(k, (valid_counts > 0).long())


def plan_pools(
    valid: Sequence[Tensor], ratio: float, *, scope: Scope = "global", group: dist.ProcessGroup | None = None
) -> Tensor:
    """How many tokens pools will keep over the group, known from the labels before any forward; one all-reduce.

    Their sum is what the summed loss of an optimizer step is divided by, once.

    Args:
        valid: bool `[..., T]`, this rank's part of each pool.
        ratio: share to keep, in (0, 1].
        scope: ranked together within a pool.
        group: process group; None is the default group if initialised, else this process.

    Returns:
        int64 `[P]`, equal on all ranks.
    """
    own_P2 = torch.stack([torch.stack([part.sum(), own_k(part, ratio, scope)]) for part in valid])
    valid_P, k_P = Ranks(group).sum(own_P2).unbind(-1)
    return plan_k(valid_P, ratio) if scope == "global" else k_P


def own_k(valid: Tensor, ratio: float, scope: Scope) -> Tensor:
    """What this rank keeps of a pool in the scopes that ask no other rank: int64, 0-dim."""
    return plan_k(valid.sum(-1) if scope == "sequence" else valid.sum(), ratio).sum()


def select_tokens(
    scores: Tensor,
    valid: Tensor,
    ratio: float,
    *,
    scope: Scope = "global",
    group: dist.ProcessGroup | None = None,
    position: Tensor | None = None,
) -> Selection:
    """Keep the highest `ratio` of the valid scores, exactly (Rho-1, section 2.2, equation 4).

    Ranked as float32. Ties go to the lowest position; -0.0 equals 0.0; NaN ranks below -inf,
    counts as valid and is kept last. The same scores, split over any number of ranks, give the
    same mask. All ranks of the group must call this together, also those without a valid token.

    Args:
        scores: float tensor of any shape, this rank; higher is kept.
        valid: bool, same shape; False (padding, ignored labels) never competes.
        ratio: share to keep, in (0, 1].
        scope: ranked together: 'global' the group, 'rank' this rank, 'sequence' the last dimension.
        group: process group; None is the default group if initialised, else this process.
        position: int64, same shape, unique over the group; default: rank, then offset.

    Returns:
        Selection of this rank; its counts are sums over the group.

    Raises:
        ValueError: shapes that differ, or a ratio outside (0, 1].
    """
    check_arguments(scores, valid, ratio, scope, position)
    mask, threshold = keep_highest(scores, valid, ratio, scope=scope, group=group, position=position)
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
    """Mask and threshold of `select_tokens`, without its counts.

    Args:
        scores, valid, ratio, scope, group, position: as there.
        among: bool, same shape, not in scope 'sequence': of the valid ones, those that compete; k stays that of all
            valid ones, and where fewer compete all of them are kept.
    """
    keys = order_key(scores)
    if scope == "sequence":
        return _select_sequences(keys, valid, ratio, position)
    ranks = Ranks(group, alone=scope == "rank")
    competing = valid if among is None else valid & among
    num_valid, num_competing = ranks.sum(torch.stack([valid.sum(), competing.sum()])).unbind()
    k = torch.minimum(plan_k(num_valid, ratio), num_competing)
    return _select_pool(keys, competing, k, position, ranks)


def score_quantiles(
    scores: Tensor,
    valid: Tensor,
    quantiles: tuple[float, ...],
    group: dist.ProcessGroup | None = None,
    num_valid: Tensor | None = None,
) -> Tensor:
    """Exact quantiles of the valid scores over the group: float32 `[len(quantiles)]`, NaN where nothing is valid.

    The q-quantile is the lowest of the highest `plan_k(num_valid, 1 - q)` scores, so the
    quantile `1 - ratio` is the threshold. Who knows `num_valid`, the valid scores of the group, saves an all-reduce.
    """
    ranks = Ranks(group)
    num_valid = ranks.sum(valid.sum()) if num_valid is None else num_valid
    k_K = torch.stack([plan_k(num_valid, 1 - q) for q in quantiles]).clamp(min=1)
    kth_K, _, _ = kth_largest(order_key(scores)[valid], k_K, ranks)
    return score_of_key(kth_K).where(num_valid > 0, torch.nan)


def _select_pool(
    keys: Tensor, valid: Tensor, k: Tensor, position: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The k highest; at most as many as are valid."""
    kth, wanted, equal = (value[0] for value in kth_largest(keys[valid], k.clamp(min=1)[None], ranks))
    mask = valid & (keys >= kth)
    if wanted < equal:
        tied = valid & (keys == kth)
        places = _default_position(keys, ranks) if position is None else position
        mask[tied] = _lowest(places[tied], wanted, ranks)
    return mask, score_of_key(kth).where(k > 0, torch.nan)


def _lowest(position_N: Tensor, k: Tensor, ranks: Ranks) -> Tensor:
    """Mask of the k lowest positions over all ranks: the score's radix selection, on positions."""
    ends = torch.stack([position_N, -position_N]) if len(position_N) else position_N.new_full((2, 1), -(1 << 62))
    highest, negated_lowest = ranks.max(ends.amax(-1)).tolist()
    keys_N = highest - position_N
    kth, _, _ = kth_largest(keys_N, k[None], ranks, bits=max(1, (highest + negated_lowest).bit_length()))
    return keys_N >= kth


def _default_position(keys: Tensor, ranks: Ranks) -> Tensor:
    stride = ranks.max(torch.tensor(keys.numel(), device=keys.device))
    return ranks.rank * stride + torch.arange(keys.numel(), device=keys.device).view(keys.shape)


def _select_sequences(keys: Tensor, valid: Tensor, ratio: float, position: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each last dimension on its own: no rank needs another."""
    k = plan_k(valid.sum(-1, keepdim=True), ratio)
    keys = keys.masked_fill(~valid, -1)
    if position is not None:
        by_position = position.argsort(dim=-1)
        ordered = keys.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
        order = by_position.gather(-1, ordered)
    else:
        order = keys.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(keys.shape[-1], device=keys.device).expand_as(keys)
    mask = torch.zeros_like(valid).scatter(-1, order, places < k)
    # A sum over one key, or over none: a sequence without a position has no entry to pick.
    lowest = keys.gather(-1, order).masked_fill(places != k - 1, 0).sum(-1)
    return mask, score_of_key(lowest)


def check_arguments(scores: Tensor, valid: Tensor, ratio: float, scope: str, position: Tensor | None) -> None:
    """What `select_tokens` refuses.

    Raises:
        ValueError: shapes that differ, a ratio outside (0, 1], or an unknown scope.
    """
    if scores.shape != valid.shape or (position is not None and position.shape != scores.shape):
        raise ValueError(f"scores {tuple(scores.shape)}, valid and position must have one shape.")
    if valid.dtype != torch.bool or not scores.is_floating_point():
        raise ValueError("valid must be bool and scores a float tensor.")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio}: give the share of tokens to keep, above 0 and at most 1.")
    if scope not in ("global", "rank", "sequence"):
        raise ValueError(f"scope is '{scope}': use global, rank or sequence.")


def selected_loss(loss: Tensor, selection: Selection) -> Tensor:
    """Summed loss of the selected tokens of this rank (Rho-1, equation 5, before its division).

    Divide once, by the number planned over all ranks and micro-batches of the optimizer step: a
    mean here would weigh ranks with few selected tokens too much.

    Args:
        loss: float32, same shape as the scores that were selected from; may require a gradient.
        selection: what `select_tokens` returned for them.

    Returns:
        0-dim float32, this rank only.
    """
    return weighted_loss(loss, selection.weights)


def weighted_loss(loss: Tensor, weights: Tensor) -> Tensor:
    """`sum(weights * loss)`, where weight 0 drops the loss: an unselected infinity leaves no NaN behind."""
    return (loss.masked_fill(weights == 0, 0.0) * weights).sum()
