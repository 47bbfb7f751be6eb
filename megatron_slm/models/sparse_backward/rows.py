"""Row backward: the backward of the decoder's linears and attention computes only the rows of selected tokens.

The hidden states, keys and values of all other positions are treated as constants. Their gradients are then zero in
every layer, so their rows can be left out, and the products have R rows instead of N:

    linear     y = x W'      grad_x = grad_y W,   grad_W = grad_y' x        over the selected rows of x and grad_y
    attention  runs the selected queries again, over the keys and values of all positions

Below the last layer, this approximates the gradient of the selected loss (docs/benchmarks.md has the error): the
exact gradient also flows through the keys and values of positions that were not selected.

Suffixes: B sequences of T positions, N = B * T, R selected positions, I and O input and output size of a linear,
H heads in G groups, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
from megatron_slm.models.transformers_internals import is_plain_linear, is_transposed
from megatron_slm.types import Batch, TokenSignals, TokenWeights


class Rows:
    """The selected positions of one batch. The forward keeps this object; `select` fills it before the backward.

    Args:
        position_ids_BT: int64, of the batch.
        packed: runs the selected queries alone in the backward; None for the kernel's own backward, of all queries.
    """

    mask_BT: Tensor
    index_R: Tensor
    queries: PackedQueries

    def __init__(self, position_ids_BT: Tensor, packed: PackedAttention | None) -> None:
        self.shape = position_ids_BT.shape
        self._position_ids_BT = position_ids_BT
        self._packed = packed

    def select(self, mask_BT: Tensor) -> None:
        """Set the selected positions, bool `[B, T]`."""
        self.mask_BT = mask_BT
        self.index_R = mask_BT.flatten().nonzero().squeeze(-1)
        self.queries = PackedQueries(self.index_R, self._position_ids_BT)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the selected rows `[R, D]` of `[B, T, D]`."""
        rows_ND = tensor.flatten(0, -2)
        # No copy if every position is selected.
        all_selected = len(self.index_R) == len(rows_ND)
        return rows_ND if all_selected else rows_ND.index_select(0, self.index_R)

    def scatter(self, rows_RD: Tensor) -> Tensor:
        """Return `[B, T, D]` with these rows at the selected positions, and zero elsewhere."""
        if len(rows_RD) == self.shape.numel():  # every position is selected, in order
            return rows_RD.view(*self.shape, -1)
        whole_ND = rows_RD.new_zeros(self.shape.numel(), rows_RD.shape[-1])
        return whole_ND.index_copy_(0, self.index_R, rows_RD).view(*self.shape, -1)

    def attend(self, call: AttentionCall) -> Attended:
        """Return the layer's own attention, with constant keys and values at positions that are not selected."""
        if self._packed is not None:
            return RowAttention.apply(call.query, call.key, call.value, call, self._packed, self), None
        # The kernel's own backward computes the gradient of all queries, keys and values. For unselected queries it is
        # zero, because their output has no gradient. For unselected keys and values it is set to zero here.
        key = ConstantUnlessSelected.apply(call.key, self)
        value = ConstantUnlessSelected.apply(call.value, self)
        return call._replace(key=key, value=value).run()


class ConstantUnlessSelected(torch.autograd.Function):
    """The identity on `[B, G, T, D]`, whose backward keeps only the gradient of selected positions."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.rows.mask_BT[:, None, :, None], None


class RowAttention(torch.autograd.Function):
    """A layer's attention `[B, T, H, D]`, whose backward runs only the selected queries again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, packed: PackedAttention, rows: Rows
    ) -> Tensor:
        # Do not keep the call: it holds tensors, and activation checkpointing frees only those that are saved here.
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.window, ctx.packed, ctx.rows = call.scale, call.window, packed, rows
        attended, _ = call.run()
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.rows
        query, key, value = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        if len(rows.index_R) == 0:  # packed attention needs a query, and ZeRO-3 needs a gradient from every rank
            return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), None, None, None
        # The forward above recorded no graph, so run the selected queries again with one. Forward and backward cost the
        # selected share of a whole pass.
        with torch.enable_grad():
            attended_RHD = attend_rows(rows, ctx.packed, query, key, value, ctx.scale, ctx.window)
        grad_RHD = rows.gather(grad_BTHD.flatten(2)).view_as(attended_RHD)
        grad_query, grad_key, grad_value = torch.autograd.grad(attended_RHD, (query, key, value), grad_RHD)
        # Unselected keys and values are constants, although selected queries attend to them.
        mask_B1T1 = rows.mask_BT[:, None, :, None]
        return grad_query, grad_key.mul_(mask_B1T1), grad_value.mul_(mask_B1T1), None, None, None


def attend_rows(
    rows: Rows,
    packed: PackedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return attention `[R, H, D]` of the selected queries of `[B, H, T, D]`, over keys and values `[B, G, T, D]`."""
    heads = query.shape[1]
    query_BTI = query.transpose(1, 2).flatten(2)
    query_RHD = rows.gather(query_BTI).unflatten(1, (heads, -1))
    query_1HRD = query_RHD.transpose(0, 1)[None]
    attended_1HRD = packed(rows.queries, query_1HRD, by_group(key), by_group(value), scale, window)
    return attended_1HRD[0].transpose(0, 1)


class RowLinear(torch.autograd.Function):
    """A linear `[B, T, I] -> [B, T, O]` whose backward multiplies only the selected rows."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, rows: Rows) -> Tensor:
        # Save the parameter itself: a detached copy would keep a gathered ZeRO-3 parameter in memory.
        ctx.save_for_backward(input, weight)
        ctx.rows, ctx.transposed, ctx.has_bias = rows, transposed, bias is not None
        return nn.functional.linear(input, weight.T if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_RO, input_RI = ctx.rows.gather(grad), ctx.rows.gather(input)
        if ctx.transposed:  # the weight is [I, O]
            grad_input_RI = grad_RO @ weight.T
            grad_weight = input_RI.T @ grad_RO
        else:
            grad_input_RI = grad_RO @ weight
            grad_weight = grad_RO.T @ input_RI
        grad_bias = grad_RO.sum(0) if ctx.has_bias else None
        return ctx.rows.scatter(grad_input_RI), grad_weight, grad_bias, None, None


@contextmanager
def bound(linears: Sequence[nn.Module], rows: Rows) -> Iterator[None]:
    """Make these linears use `RowLinear` with `rows` inside the context."""
    # An attribute of the instance hides the forward of its class and leaves hooks and parameters in place. ZeRO-3 needs
    # them: the hooks of a linear gather its weight.
    for linear in linears:
        linear.forward = partial(_forward, linear, rows)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _forward(linear: nn.Module, rows: Rows, input: Tensor) -> Tensor:
    # An expert of a mixture receives some rows of the batch in its own order, which `rows` does not index.
    if input.shape[:-1] != rows.shape:
        output: Tensor = type(linear).forward(linear, input)
    else:
        output = RowLinear.apply(input, linear.weight, linear.bias, is_transposed(linear), rows)
    return output


@dataclass(frozen=True)
class RowTape:
    """The batch, its rows, and the output of its forward with the graph; None if it was not kept."""

    batch: Batch
    rows: Rows
    output: TokenSignals | None


class RowStudent:
    """A student whose backward computes the selected rows only; see `Student`.

    Args:
        engine: the module (a `CausalLM` whose attention is open) with its optimizer.
        decoder: the module whose linears compute only the selected rows in their backward.
        packed: see `Rows`.
    """

    def __init__(self, engine: TrainingEngine, decoder: nn.Module, packed: PackedAttention | None) -> None:
        refuse_compiled(engine.module, "rows")
        self._engine = engine
        self._packed = packed
        self._linears = [child for child in decoder.modules() if is_plain_linear(child)]

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, RowTape]:
        rows = Rows(batch.position_ids_BT, self._packed)
        with torch.set_grad_enabled(keep):
            output = self._run(batch, rows, want)
        return detached_columns(output), RowTape(batch, rows, output if keep else None)

    def backward(
        self, tape: RowTape, weights: TokenWeights, scale: float, *, last: bool, share: float = 1.0
    ) -> dict[str, Tensor]:
        # The graph of the forward refers to these rows: fill them before autograd runs.
        tape.rows.select(selected_tokens(weights))
        output = tape.output
        if output is None:
            output = self._run(tape.batch, tape.rows, weighed_columns(weights))
        # Activation checkpointing runs forwards again inside this backward, and they must use the rows too.
        with bound(self._linears, tape.rows):
            self._engine.backward(weighted_sum(output, weights) * scale, last=last)
        return {}

    def _run(self, batch: Batch, rows: Rows, want: tuple[str, ...] = ()) -> TokenSignals:
        with bound(self._linears, rows):
            return score_batch(self._engine.module, batch, want, {"selective": rows})
