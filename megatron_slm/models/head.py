"""The language-model head and the cross-entropy per token, computed without holding the logits of all tokens.

With logits z_v = hidden . weight_v + bias_v and label y, over the vocabulary v:

    lse  = log sum_v exp(z_v)
    loss = lse - z_y                in nats
    p_v  = exp(z_v - lse)
    d loss / d z_v = p_v - [v = y]

`megatron_slm.signals.COLUMNS` defines further columns, such as the entropy of p.

Suffixes: N tokens, R tokens with a gradient, D hidden size, V vocabulary, C one chunk (of tokens in the forward, of the
vocabulary in the backward).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.signals import COLUMNS

CHUNK_BYTES = 1 << 27
"""Size of one chunk of logits in float32: 256 tokens at a vocabulary of 128k."""


class TokenLoss(torch.autograd.Function):
    """Cross-entropy per token, and further columns on demand, chunk by chunk. See `token_loss`.

    The backward computes only the rows of tokens whose upstream gradient is not zero. This is exact, and tokens that
    were not selected cost nothing. The logits are computed again, unless those of all tokens fit in one chunk.
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
        num_tokens = len(labels_N)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss_N = torch.empty(num_tokens, dtype=dtype, device=hidden_ND.device)
        lse_N = torch.empty_like(loss_N)
        further = {name: torch.zeros_like(loss_N) for name in want}
        logprobs_CV = None
        for start in range(0, num_tokens, chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_ND[part], weight_VD, bias_V, dtype)
            # An ignored label is negative and has no column: column 0 stands in, and the loss is set to 0 below.
            label_C1 = labels_N[part, None].clamp(min=0)
            label_logit_C = logits_CV.gather(-1, label_C1).squeeze(-1)
            logprobs_CV = logits_CV.log_softmax(-1)
            loss_N[part] = COLUMNS["loss"].compute(logprobs_CV, label_C1)
            lse_N[part] = label_logit_C + loss_N[part]
            for name, column_N in further.items():
                column_N[part] = COLUMNS[name].compute(logprobs_CV, label_C1)
        loss_N.masked_fill_(labels_N < 0, 0.0)
        only_one_chunk = num_tokens <= chunk
        # Save the parameter itself: a detached copy would keep a gathered ZeRO-3 parameter in memory.
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, lse_N, logprobs_CV if only_one_chunk else None)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(*further.values())
        return loss_N, *further.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, labels_N, lse_N, logprobs_NV = ctx.saved_tensors
        # Ignored labels have no gradient, even if the upstream gradient is NaN.
        grad_loss_N = grad_loss_N.masked_fill(labels_N < 0, 0.0)
        index_R = grad_loss_N.nonzero().squeeze(-1)
        hidden_RD, labels_R1, grad_loss_R1 = hidden_ND[index_R], labels_N[index_R, None], grad_loss_N[index_R, None]
        grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=lse_N.dtype)
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.empty_like(bias_V) if bias_V is not None else None
        # lse is known by now, so the backward can split the vocabulary instead of the tokens: each chunk computes its
        # rows of the weight gradient in one product. Chunks of tokens would need a float32 sum as large as the weight.
        vocabulary = len(weight_VD)
        width = max(1, ctx.chunk * vocabulary // max(1, len(index_R)))
        for start in range(0, vocabulary, width):
            part = slice(start, start + width)
            weight_CD = weight_VD[part]
            bias_C = None if bias_V is None else bias_V[part]
            # p = exp(z - lse). If the log-probabilities were kept, this chunk is the whole vocabulary.
            if logprobs_NV is None:
                logits_RC = _logits(hidden_RD, weight_CD, bias_C, lse_N.dtype)
                probs_RC = logits_RC.sub_(lse_N[index_R, None]).exp_()
            elif len(index_R) == len(logprobs_NV):
                probs_RC = logprobs_NV.exp()  # all tokens have a gradient: no copy of rows
            else:
                probs_RC = logprobs_NV[index_R].exp_()
            grad_logits_RC = _subtract_one_hot(probs_RC, labels_R1 - start).mul_(grad_loss_R1)
            if grad_bias_V is not None:
                grad_bias_V[part] = grad_logits_RC.sum(0)
            grad_logits_RC = grad_logits_RC.to(hidden_ND.dtype)
            grad_hidden_RD += grad_logits_RC @ weight_CD
            if grad_weight_VD is not None:
                torch.mm(grad_logits_RC.T, hidden_RD, out=grad_weight_VD[part])
        grad_hidden_ND = torch.zeros_like(hidden_ND).index_copy_(0, index_R, grad_hidden_RD.to(hidden_ND.dtype))
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
    """Return the cross-entropy of each token in nats, with at most one chunk of logits in memory.

    Args:
        hidden_ND: the last hidden states, of any float dtype.
        weight_VD: the head's weight, of the same dtype; a ZeRO-3 parameter must be gathered.
        labels_N: int64; negative labels are ignored: their loss is 0, and they have no gradient.
        bias_V: the head's bias, if it has one.
        want: further columns of `COLUMNS`, such as `entropy`; they have no gradient.
        chunk: tokens per chunk; default: as many as fit in `CHUNK_BYTES`.

    Returns:
        The losses, then the columns of `want`: `[N]` each, float64 for float64 inputs and float32 for all others.
    """
    chunk = chunk or max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    columns: tuple[Tensor, ...] = TokenLoss.apply(hidden_ND, weight_VD, bias_V, labels_N, want, chunk)
    return columns


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits_CV = (hidden_CD @ weight_VD.T).to(dtype)
    return logits_CV if bias_V is None else logits_CV + bias_V.to(dtype)


def _subtract_one_hot(probs_RC: Tensor, column_R1: Tensor) -> Tensor:
    """Subtract 1 in place from the given column of each row, if it is in this chunk, and return the tensor."""
    inside_R1 = (column_R1 >= 0) & (column_R1 < probs_RC.shape[1])
    # If the label of a row is in another chunk, subtract 0 from column 0.
    column_R1 = column_R1.masked_fill(~inside_R1, 0)
    return probs_RC.scatter_add_(1, column_R1, -inside_R1.to(probs_RC.dtype))
