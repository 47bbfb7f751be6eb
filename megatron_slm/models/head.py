"""The language-model head and its cross-entropy, without ever holding the logits.

Suffixes: N tokens, R those that count, D hidden size, V vocabulary, C one chunk: of tokens in the
forward, of the vocabulary in the backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.signals import COLUMNS

CHUNK_BYTES = 1 << 27
"""Size of one chunk of logits in float32: 256 tokens at a vocabulary of 128k."""


class TokenLoss(torch.autograd.Function):
    """Cross-entropy of each token, and further columns on demand, chunk by chunk.

    The backward is run for those tokens alone whose upstream gradient is not zero: exact for the
    selected loss, and nothing is paid for a token that was not selected. It recomputes their logits,
    unless all logits fit in one chunk and were kept. The weight is saved as the parameter that it
    is: a detached copy would pin a ZeRO-3 parameter in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        want: tuple[str, ...],
        chunk: int,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss_N, lse_N = torch.empty(2, len(labels_N), dtype=dtype, device=hidden_ND.device)
        others = [torch.zeros_like(loss_N) for _ in want]
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_ND[part], weight_VD, bias_V, dtype)
            label_C1 = labels_N[part, None].clamp(min=0)
            label_logit_C1 = logits_CV.gather(-1, label_C1)
            logprobs_CV = logits_CV.log_softmax(-1)
            loss_N[part] = COLUMNS["loss"].compute(logprobs_CV, label_C1)
            lse_N[part] = label_logit_C1.squeeze(-1) + loss_N[part]
            for name, column_N in zip(want, others, strict=True):
                column_N[part] = COLUMNS[name].compute(logprobs_CV, label_C1)
        loss_N.masked_fill_(labels_N < 0, 0.0)
        kept_NV = logprobs_CV if 0 < len(labels_N) <= chunk else None
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, lse_N, kept_NV)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(*others)
        return loss_N, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, labels_N, lse_N, kept_NV = ctx.saved_tensors
        upstream_N = upstream[0].masked_fill(labels_N < 0, 0.0)
        rows_R = upstream_N.nonzero().squeeze(-1)
        hidden_RD, labels_R1, upstream_R1 = hidden_ND[rows_R], labels_N[rows_R, None], upstream_N[rows_R, None]
        # Chunks of the vocabulary, now that the normaliser is known: each chunk finishes its rows of the weight
        # gradient in one product, where chunks of tokens would need a float32 sum as large as the weight.
        grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=lse_N.dtype)
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.empty_like(bias_V) if bias_V is not None else None
        vocabulary = len(weight_VD)
        width = max(1, ctx.chunk * vocabulary // max(1, len(rows_R)))
        for start in range(0, vocabulary, width):
            part = slice(start, start + width)
            weight_CD, bias_C = weight_VD[part], None if bias_V is None else bias_V[part]
            if kept_NV is None:
                logits_RC = _logits(hidden_RD, weight_CD, bias_C, lse_N.dtype)
                grad_logits_RC = logits_RC.sub_(lse_N[rows_R, None]).exp_()
            elif len(rows_R) == len(kept_NV):
                grad_logits_RC = kept_NV.exp()
            else:
                grad_logits_RC = kept_NV[rows_R].exp_()
            _subtract_one_at(grad_logits_RC, labels_R1 - start)
            grad_logits_RC.mul_(upstream_R1)
            if grad_bias_V is not None:
                grad_bias_V[part] = grad_logits_RC.sum(0)
            grad_logits_RC = grad_logits_RC.to(hidden_ND.dtype)
            grad_hidden_RD += grad_logits_RC @ weight_CD
            if grad_weight_VD is not None:
                torch.mm(grad_logits_RC.T, hidden_RD, out=grad_weight_VD[part])
        grad_hidden_ND = torch.zeros_like(hidden_ND).index_copy_(0, rows_R, grad_hidden_RD.to(hidden_ND.dtype))
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None


def token_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    want: tuple[str, ...] = (),
    chunk: int | None = None,
) -> tuple[Tensor, ...]:
    """Cross-entropy of each token in nats, logits never materialised beyond one chunk.

    Args:
        hidden_ND: the last hidden states, any float dtype.
        weight_VD: the head's weight, same dtype; a ZeRO-3 parameter must be gathered.
        labels_N: int64; negative labels are ignored: loss 0, no gradient.
        bias_V: the head's bias, if it has one.
        want: further columns of `COLUMNS`, such as `entropy`; they have no gradient.
        chunk: tokens at a time; default: what fits `CHUNK_BYTES`.

    Returns:
        float32 `[N]` losses, whatever the dtype (float64 for float64), then the columns of `want`, in nats.
    """
    chunk = chunk or max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    columns: tuple[Tensor, ...] = TokenLoss.apply(hidden_ND, weight_VD, bias_V, labels_N, want, chunk)
    return columns


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits_CV = (hidden_CD @ weight_VD.T).to(dtype)
    return logits_CV if bias_V is None else logits_CV + bias_V.to(dtype)


def _subtract_one_at(grad_logits_RC: Tensor, column_R1: Tensor) -> None:
    """From one column of each row, if it lies in this chunk."""
    inside_R1 = (column_R1 >= 0) & (column_R1 < grad_logits_RC.shape[1])
    column_R1 = column_R1.masked_fill(~inside_R1, 0)
    grad_logits_RC.scatter_add_(1, column_R1, -inside_R1.to(grad_logits_RC.dtype))
