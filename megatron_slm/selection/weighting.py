"""How much a token counts: 0 or 1, drawn, or by how far it lies above the threshold; scaled to the plan."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.selection.select import Scope, Selection, own_k, plan_k
from megatron_slm.selection.threshold import Ranks


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
