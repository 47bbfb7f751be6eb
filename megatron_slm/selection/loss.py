"""From a mask to the number that is differentiated."""

from torch import Tensor

from megatron_slm.selection.select import Selection


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
