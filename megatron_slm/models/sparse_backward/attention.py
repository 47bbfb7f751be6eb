"""Attention for the backward of selected tokens: replaceable attention of a model, and attention of selected queries.

After `open_attention`, a call of the model can pass an object that computes the attention of its layers. Packed
attention is causal attention of some queries of each sequence, packed in one row, over all keys of their sequences.

Suffixes: B sequences of T positions, H heads in G groups, D head size; R queries in total, N = B * T keys in total,
S keys of one block; Q blocks of queries, K blocks of keys.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.transformers_internals import (
    AttentionFunction,
    attention_name,
    find_attention,
    has_attention,
    register_attention,
    set_attention,
)
from megatron_slm.torch_internals import is_compiled

PREFIX = "selective_"
"""Prefix of the names under which opened attention is registered."""
BLOCK = 128
"""Queries per block. Keys after a block's last query are left out; those after each other query are masked."""

Attended = tuple[Tensor, Tensor | None]
"""The output `[B, T, H, D]`, and the attention weights if the kernel returns them."""


class AttentionCall(NamedTuple):
    """The arguments with which Hugging Face calls the attention of one layer.

    kernel      the layer's own attention function
    module      the layer's attention module
    query       `[B, H, T, D]`
    key, value  `[B, G, S, D]`, after rotation and norms
    options     further arguments: `scaling`, `sliding_window`, and so on
    """

    kernel: AttentionFunction
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    options: dict[str, Any]

    @property
    def scale(self) -> float | None:
        """The factor of the query-key products; None for 1 / sqrt(D)."""
        return self.options.get("scaling")

    @property
    def window(self) -> int | None:
        """The number of tokens that a query attends to, itself included; None for its whole document so far."""
        return self.options.get("sliding_window")

    def run(self) -> Attended:
        """Return the output of the layer's own kernel."""
        return self.kernel(self.module, self.query, self.key, self.value, self.attention_mask, **self.options)


class Selective(Protocol):
    """An object that computes the attention of all layers in one call of the model."""

    def attend(self, call: AttentionCall) -> Attended:
        """Return the output of one layer's attention."""


def open_attention(lm: PreTrainedModel) -> None:
    """Let calls of this model pass a `Selective` object as `selective`; other calls run the kernel as before.

    Raises:
        UserError: the kernel is not in Hugging Face's registry. `eager` is not, because each family has its own.
    """
    kernel = attention_name(lm)
    if kernel.startswith(PREFIX):  # opened before
        return
    require_registered(kernel, type(lm).__name__)
    # Register the kernel's own mask too, because a model looks up both by the one name in its configuration.
    register_attention(PREFIX + kernel, partial(_attend, find_attention(kernel)), mask_of=kernel)
    set_attention(lm, PREFIX + kernel)


def require_registered(kernel: str, model: str) -> None:
    """Raise a UserError if Hugging Face's registries lack an attention.

    Args:
        kernel: `model.attn_implementation`, or Hugging Face's choice.
        model: name of the model that runs it, for the error.
    """
    if not has_attention(kernel):
        raise UserError(
            "model.attn_implementation",
            kernel,
            f"selection.backward is rows or replay, which replace the attention of {model} and can replace only one "
            "that is in Hugging Face's registry",
            "Set model.attn_implementation=sdpa or selection.backward=exact",
        )


def refuse_compiled(module: nn.Module, backward: str) -> None:
    """Raise a UserError if a student, or a module in it, is compiled by `torch.compile`.

    A compiled graph cannot use rows that are selected after its forward.

    Args:
        module: the student.
        backward: `selection.backward`, for the error.
    """
    if is_compiled(module):
        raise UserError(
            "selection.backward",
            backward,
            "the student is compiled by torch.compile, whose graphs do not support it",
            "Do not compile it, or set selection.backward=exact",
        )


def _attend(
    kernel: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    selective: Selective | None = None,
    **options: Any,
) -> Attended:
    call = AttentionCall(kernel, module, query, key, value, attention_mask, options)
    return call.run() if selective is None else selective.attend(call)


class Block(NamedTuple):
    """The queries `rows` of the pack, and the `keys` that they attend to where `mask_RS` is true."""

    rows: slice
    keys: slice
    mask_RS: Tensor


class PackedQueries:
    """The positions of packed queries in their batch, and the keys that each of them attends to.

    Args:
        index_R: int64, ascending, at least one: sequence * T + position.
        position_ids_BT: int64, of the whole batch. A query attends back to the nearest position id 0.
    """

    def __init__(self, index_R: Tensor, position_ids_BT: Tensor) -> None:
        self.index_R = index_R
        self.num_keys = position_ids_BT.numel()
        self._length = position_ids_BT.shape[1]
        # A position id counts from the start of its document, so subtracting it gives the document's first key.
        self._start_R = index_R - position_ids_BT.flatten()[index_R]
        # Layers differ only in their windows, so most layers share one list of blocks and one mask.
        self._blocks: dict[int | None, list[Block]] = {}
        self._masks: dict[int | None, BlockMask] = {}

    def merge(self, known_BGTD: Tensor, fresh_1GRD: Tensor) -> Tensor:
        """Return `[G, N, D]`: the known tensor, with the fresh one and its graph at the positions of the queries."""
        # Out of place: activation checkpointing runs the layer again, and must find the known tensor unchanged.
        return by_group(known_BGTD).index_copy(1, self.index_R, fresh_1GRD[0])

    def first_R(self, window: int | None) -> Tensor:
        """Return the first key that each query attends to: of its document, or of the last `window` keys."""
        return self._start_R if window is None else self._start_R.maximum(self.index_R - window + 1)

    def blocks(self, window: int | None) -> list[Block]:
        """Return all queries in blocks of at most `BLOCK`, each from one sequence."""
        if window not in self._blocks:
            self._blocks[window] = list(self._cut(window))
        return self._blocks[window]

    def mask(self, window: int | None) -> BlockMask:
        """Return the mask of all queries and keys, for flex attention."""
        if window not in self._masks:
            self._masks[window] = block_mask(self, window)
        return self._masks[window]

    def _cut(self, window: int | None) -> Iterator[Block]:
        first_R = self.first_R(window)
        # Queries are in ascending order, so those of one sequence are adjacent: from `begin` up to `end`.
        begin = 0
        for end in torch.bincount(self.index_R // self._length).cumsum(0).tolist():
            for start in range(begin, end, BLOCK):
                rows = slice(start, min(start + BLOCK, end))
                # From the earliest key of any query in the block to the position of its last query.
                keys = slice(int(first_R[rows].min()), int(self.index_R[rows.stop - 1]) + 1)
                key_S = torch.arange(keys.start, keys.stop, device=self.index_R.device)
                mask_RS = (key_S >= first_R[rows, None]) & (key_S <= self.index_R[rows, None])
                yield Block(rows, keys, mask_RS)
            begin = end


def by_group(tensor_BGTD: Tensor) -> Tensor:
    """Return keys or values as `[G, N, D]`, their layout in packed attention."""
    return tensor_BGTD.transpose(0, 1).flatten(1, 2)


class PackedAttention(Protocol):
    """Attention of packed queries: query `[1, H, R, D]` over key and value `[G, N, D]` -> `[1, H, R, D]`.

    `scale` is the factor of the query-key products; None for 1 / sqrt(D).
    """

    def __call__(
        self, queries: PackedQueries, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor: ...


def packed_attention(device: torch.device) -> PackedAttention:
    """Return the faster packed attention for a device."""
    return FlexAttention(compiled=True) if device.type == "cuda" else attend_by_sequence


def attend_by_sequence(
    queries: PackedQueries, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Return packed attention, computed block by block with PyTorch's fused attention; see `PackedAttention`."""
    grouped = query.shape[1] != len(key)  # several heads of queries share a head of keys and values
    blocks = queries.blocks(window)
    query_of_blocks = query.split([block.rows.stop - block.rows.start for block in blocks], dim=2)
    key_of_blocks = KeysOfBlocks.apply(key, blocks)
    value_of_blocks = KeysOfBlocks.apply(value, blocks)
    attended = []
    for index, block in enumerate(blocks):
        inputs = (query_of_blocks[index], key_of_blocks[index][None], value_of_blocks[index][None])
        # A mask instead of `is_causal`, which would take the selected queries for consecutive positions.
        attended.append(scaled_dot_product_attention(*inputs, block.mask_RS, scale=scale, enable_gqa=grouped))
    return torch.cat(attended, dim=2)


class KeysOfBlocks(torch.autograd.Function):
    """Keys or values `[G, N, D]` -> `[G, S, D]` for each block.

    Plain slices have the same gradient, but the backward of each slice would allocate all N rows.
    """

    @staticmethod
    def forward(ctx: Any, tensor_GND: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
        ctx.size, ctx.blocks = tensor_GND.shape, blocks
        # Views: blocks of neighbouring queries overlap, and copies would hold most keys several times.
        return tuple(tensor_GND[:, block.keys] for block in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_GND = grads[0].new_zeros(ctx.size)
        # Blocks overlap, so their gradients add up.
        for block, grad_GSD in zip(ctx.blocks, grads, strict=True):
            grad_GND[:, block.keys] += grad_GSD
        return grad_GND, None


class FlexAttention:
    """Packed attention in one kernel that skips blocks of keys that no query attends to; see `PackedAttention`.

    Args:
        compiled: compile the kernel, which needs a compiler; uncompiled, it computes all products.
    """

    def __init__(self, compiled: bool) -> None:
        # Dynamic shapes, because every micro-step selects another number of tokens.
        self._attend = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention

    def __call__(
        self, queries: PackedQueries, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        grouped = query.shape[1] != len(key)
        mask = queries.mask(window)
        # For the kernel, the keys of all sequences are one sequence; the mask keeps them apart.
        return self._attend(query, key[None], value[None], block_mask=mask, scale=scale, enable_gqa=grouped)


def block_mask(queries: PackedQueries, window: int | None) -> BlockMask:
    """Return the mask with the blocks of keys that each block of queries attends to, in part or as a whole.

    `create_block_mask` would evaluate all R x N entries of the mask.
    """
    first_R, index_R = queries.first_R(window), queries.index_R

    def attends(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= first_R[row]) & (key <= index_R[row])

    # Repeat the last query until every block of queries is full.
    num_blocks = -(-len(index_R) // BLOCK)
    rows = torch.arange(num_blocks * BLOCK, device=index_R.device).clamp(max=len(index_R) - 1)
    first_QR, last_QR = first_R[rows].view(-1, BLOCK), index_R[rows].view(-1, BLOCK)
    start_K = torch.arange(0, queries.num_keys, BLOCK, device=index_R.device)
    end_K = (start_K + BLOCK).clamp(max=queries.num_keys) - 1
    # A block of keys is listed if it overlaps the range from the earliest first key to the latest last key of the
    # queries. It is whole, and needs no mask, if every query attends to all of it. A short last block is never whole.
    some_QK = (end_K >= first_QR.amin(1, keepdim=True)) & (start_K <= last_QR.amax(1, keepdim=True))
    all_QK = (start_K >= first_QR.amax(1, keepdim=True)) & (end_K <= last_QR.amin(1, keepdim=True))
    whole_QK = all_QK & (end_K - start_K == BLOCK - 1)
    partial_count, partial_blocks = _listed(some_QK & ~whole_QK)
    whole_count, whole_blocks = _listed(whole_QK)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        whole_count,
        whole_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=attends,
        seq_lengths=(len(index_R), queries.num_keys),
    )


def _listed(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks of keys for each block of queries, and all blocks, the chosen ones first.

    Both are int32: `[1, 1, Q]` and `[1, 1, Q, K]`, as `BlockMask` stores them.
    """
    # Stable, so that the kernel visits the blocks in the order of their keys.
    order_QK = chosen_QK.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_QK.sum(-1).int()[None, None], order_QK.int()[None, None]
