"""The language-model head and its cross-entropy, without ever holding the logits.

Suffixes: N tokens, D hidden size, V vocabulary, C the tokens of one chunk.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 27
"""Size of one chunk of logits in float32: 256 tokens at a vocabulary of 128k."""


class TokenLoss(torch.autograd.Function):
    """Cross-entropy of each token, and its entropy on demand, chunk by chunk.

    The backward recomputes the logits of those tokens alone whose upstream gradient is not zero:
    exact for the selected loss, and nothing is paid for a token that was not selected. The weight
    is saved as the parameter that it is: a detached copy would pin a ZeRO-3 parameter in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        with_entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss_N, lse_N = torch.empty(2, len(labels_N), dtype=dtype, device=hidden_ND.device)
        entropy_N = torch.zeros_like(loss_N) if with_entropy else loss_N.new_empty(0)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_ND[part], weight_VD, bias_V, dtype)
            lse_N[part] = logits_CV.logsumexp(-1)
            loss_N[part] = lse_N[part] - logits_CV.gather(-1, labels_N[part, None].clamp(min=0)).squeeze(-1)
            if with_entropy:
                entropy_N[part] = _entropy(logits_CV, lse_N[part])
        loss_N.masked_fill_(labels_N < 0, 0.0)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, lse_N)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy_N)
        return loss_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, labels_N, lse_N = ctx.saved_tensors
        upstream_N = upstream[0].masked_fill(labels_N < 0, 0.0)
        # Zeroed and summed in float32: a weight gradient in bf16 would lose bits with every chunk.
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=lse_N.dtype) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=lse_N.dtype) if bias_V is not None else None
        for rows_C in upstream_N.nonzero().squeeze(-1).split(ctx.chunk):
            hidden_CD = hidden_ND[rows_C]
            grad_logits_CV = _logits(hidden_CD, weight_VD, bias_V, lse_N.dtype)
            grad_logits_CV.sub_(lse_N[rows_C, None]).exp_()
            grad_logits_CV[torch.arange(len(rows_C), device=rows_C.device), labels_N[rows_C]] -= 1
            grad_logits_CV.mul_(upstream_N[rows_C, None])
            if grad_bias_V is not None:
                grad_bias_V += grad_logits_CV.sum(0)
            grad_logits_CV = grad_logits_CV.to(hidden_ND.dtype)
            grad_hidden_ND[rows_C] = grad_logits_CV @ weight_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_logits_CV.T, hidden_CD)
        grads = (grad_hidden_ND, _like(grad_weight_VD, weight_VD), _like(grad_bias_V, bias_V))
        return *grads, None, None, None


def token_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    with_entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token in nats, logits never materialised beyond one chunk.

    Args:
        hidden_ND: the last hidden states, any float dtype.
        weight_VD: the head's weight, same dtype; a ZeRO-3 parameter must be gathered.
        labels_N: int64; negative labels are ignored: loss 0, no gradient.
        bias_V: the head's bias, if it has one.
        with_entropy: also the entropy of each prediction, without gradient.
        chunk: tokens at a time; default: what fits `CHUNK_BYTES`.

    Returns:
        float32 `[N]` losses, whatever the dtype (float64 for float64), and entropies in nats, or empty.
    """
    chunk = chunk or max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    return TokenLoss.apply(hidden_ND, weight_VD, bias_V, labels_N, with_entropy, chunk)


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits_CV = (hidden_CD @ weight_VD.T).to(dtype)
    return logits_CV if bias_V is None else logits_CV + bias_V.to(dtype)


def _entropy(logits_CV: Tensor, lse_C: Tensor) -> Tensor:
    """-sum p log p = lse - E[logit]."""
    probability_CV = (logits_CV - lse_C[:, None]).exp_()
    return lse_C - probability_CV.mul_(logits_CV).sum(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
