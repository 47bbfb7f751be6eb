"""Whole sequences as what is ranked."""

from torch import Tensor
from torch.nn.functional import pad


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
