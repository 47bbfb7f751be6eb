"""Row backward: linears and attention of the decoder run, in their backward, the rows of selected tokens alone.

Hidden states of positions that are not selected, and their keys and values, are constants. Their gradient is
zero in every layer then, so that leaving out their rows changes nothing: the products are of k rows in place of all.
An approximation of the gradient of the selected loss below the last layer (docs/efficiency.md measures it).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from megatron_slm.backend import TrainingEngine
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.models.sparse_backward.attention import (
    Attended,
    AttentionCall,
    PackedAttention,
    PackedQueries,
    by_group,
    refuse_compiled,
)
from megatron_slm.models.student import detached_columns, selected_tokens, weighed_columns, weighted_sum
from megatron_slm.types import Batch, TokenSignals, TokenWeights


class Rows:
    """The selected positions of one batch, said once, between its forward and its backward.

    Args:
        position_ids_BT: int64, of the batch.
        packed: attention of selected queries alone, for the backward; None: the kernel's own backward, of all.
    """

    mask_BT: Tensor
    index_R: Tensor
    queries: PackedQueries

    def __init__(self, position_ids_BT: Tensor, packed: PackedAttention | None) -> None:
        self.shape = position_ids_BT.shape
        self._position_ids_BT = position_ids_BT
        self._packed = packed

    def choose(self, mask_BT: Tensor) -> None:
        """bool `[B, T]`."""
        self.mask_BT = mask_BT
        self.index_R = mask_BT.flatten().nonzero().squeeze(-1)
        self.queries = PackedQueries(self.index_R, self._position_ids_BT)

    def take(self, tensor: Tensor) -> Tensor:
        """The selected rows `[R, D]` of `[B, T, D]`."""
        rows_ND = tensor.flatten(0, -2)
        return rows_ND if len(self.index_R) == len(rows_ND) else rows_ND.index_select(0, self.index_R)

    def put(self, rows_RD: Tensor) -> Tensor:
        """`[B, T, D]` with these rows, and zero elsewhere."""
        if len(rows_RD) == self.shape.numel():
            return rows_RD.view(*self.shape, -1)
        whole_ND = rows_RD.new_zeros(self.shape.numel(), rows_RD.shape[-1])
        return whole_ND.index_copy_(0, self.index_R, rows_RD).view(*self.shape, -1)

    def attend(self, call: AttentionCall) -> Attended:
        """The layer's own attention; keys and values are constants where they are not selected."""
        if self._packed is None:
            key, value = (ConstantUnlessSelected.apply(tensor, self) for tensor in (call.key, call.value))
            return call._replace(key=key, value=value).run()
        return RowAttention.apply(call.query, call.key, call.value, call, self._packed, self), None


class ConstantUnlessSelected(torch.autograd.Function):
    """Identity of `[B, G, T, D]`, through which the gradient of selected positions comes back, and no other."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.rows.mask_BT[:, None, :, None], None


class RowAttention(torch.autograd.Function):
    """A layer's attention `[B, T, H, D]`, whose backward runs the selected queries again, and no others.

    Of the call nothing but its settings is kept: checkpointing would not know of tensors that were not saved.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, packed: PackedAttention, rows: Rows
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings, ctx.packed, ctx.rows = (call.scale, call.window), packed, rows
        return call.run()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.rows
        if len(rows.index_R) == 0:
            return *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors), None, None, None
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            attended_RHD = attend_rows(rows, ctx.packed, *inputs, *ctx.settings)
        query, key, value = torch.autograd.grad(attended_RHD, inputs, rows.take(grad.flatten(2)).view_as(attended_RHD))
        mask_B1T1 = rows.mask_BT[:, None, :, None]
        return query, key.mul_(mask_B1T1), value.mul_(mask_B1T1), None, None, None


def attend_rows(
    rows: Rows,
    packed: PackedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """`[R, H, D]` of the selected queries among `[B, H, T, D]`, over keys and values `[B, G, T, D]`."""
    query_RHD = rows.take(query.transpose(1, 2).flatten(2)).unflatten(1, (query.shape[1], -1))
    query_1HRD = query_RHD.transpose(0, 1)[None]
    return packed(rows.queries, query_1HRD, by_group(key), by_group(value), scale, window)[0].transpose(0, 1)


class RowLinear(torch.autograd.Function):
    """A linear `[B, T, I] -> [B, T, O]` whose backward multiplies the selected rows alone.

    The weight is saved as the parameter that it is: a detached copy would pin a ZeRO-3 parameter in memory.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, rows: Rows) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.rows, ctx.transposed, ctx.has_bias = rows, transposed, bias is not None
        return nn.functional.linear(input, weight.T if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = ctx.rows
        grad_RO, input_RI = rows.take(grad), rows.take(input)
        grad_input = rows.put(grad_RO @ (weight.T if ctx.transposed else weight))
        grad_weight = input_RI.T @ grad_RO if ctx.transposed else grad_RO.T @ input_RI
        return grad_input, grad_weight, grad_RO.sum(0) if ctx.has_bias else None, None, None


@contextmanager
def bound(linears: Sequence[nn.Module], rows: Rows) -> Iterator[None]:
    """Inside, these linears know the rows: around a forward, and around the backward, which may run it again."""
    for linear in linears:
        linear.forward = partial(_forward, linear, rows)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _is_plain(module: nn.Module) -> bool:
    """A linear that computes nothing of its own, as quantised ones and routers among the subclasses do."""
    return getattr(module.forward, "__func__", None) in (nn.Linear.forward, Conv1D.forward)


def _forward(linear: nn.Module, rows: Rows, input: Tensor) -> Tensor:
    """Rows that are not those of the batch, as an expert of a mixture gets them, take the linear's own way."""
    if input.shape[:-1] != rows.shape:
        output: Tensor = type(linear).forward(linear, input)
    else:
        output = RowLinear.apply(input, linear.weight, linear.bias, isinstance(linear, Conv1D), rows)
    return output


@dataclass(frozen=True)
class RowTape:
    """The batch and the slot for its rows, and the output of its forward with the graph if that was kept."""

    batch: Batch
    rows: Rows
    output: TokenSignals | None


class RowStudent:
    """See `Student`; the backward is that of selected rows.

    Args:
        engine: the module (a `CausalLM` whose attention is open) with its optimizer.
        decoder: the module whose linears know the rows.
        packed: see `Rows`.
    """

    def __init__(self, engine: TrainingEngine, decoder: nn.Module, packed: PackedAttention | None) -> None:
        refuse_compiled(engine.module)
        self._engine = engine
        self._packed = packed
        self._linears = [child for child in decoder.modules() if _is_plain(child)]

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, RowTape]:
        rows = Rows(batch.position_ids_BT, self._packed)
        with torch.set_grad_enabled(keep):
            output = self._run(batch, rows, want)
        return detached_columns(output), RowTape(batch, rows, output if keep else None)

    def backward(
        self, tape: RowTape, weights: TokenWeights, scale: float, *, last: bool, share: float = 1.0
    ) -> dict[str, Tensor]:
        tape.rows.choose(selected_tokens(weights))
        output = tape.output
        if output is None:
            output = self._run(tape.batch, tape.rows, weighed_columns(weights))
        with bound(self._linears, tape.rows):
            self._engine.backward(weighted_sum(output, weights) * scale, last=last)
        return {}

    def _run(self, batch: Batch, rows: Rows, want: tuple[str, ...] = ()) -> TokenSignals:
        with bound(self._linears, rows):
            return score_batch(self._engine.module, batch, want, {"selective": rows})
