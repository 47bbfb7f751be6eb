"""Causal attention of a few queries of each sequence, packed in one row, over all keys of their sequences.

Suffixes: H heads in G groups, R queries in all, N = B * T keys in all, S of them in one block.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from megatron_slm.errors import UserError

BLOCK = 128
"""Queries that attend together: keys after the last of them are left out, and those after each are masked."""


class Block(NamedTuple):
    """Queries `rows` of the pack attend to `keys`, where `mask_RS` is true."""

    rows: slice
    keys: slice
    mask_RS: Tensor


class PackedQueries:
    """Where the queries of a pack stand in their batch.

    Args:
        index_R: int64, ascending, at least one: sequence * T + position.
        position_ids_BT: int64, of the whole batch: a query attends back to the position 0 before it.
    """

    def __init__(self, index_R: Tensor, position_ids_BT: Tensor) -> None:
        self.index_R = index_R
        self.num_keys = position_ids_BT.numel()
        self._length = position_ids_BT.shape[1]
        self._start_R = index_R - position_ids_BT.flatten()[index_R]
        self._blocks: dict[int | None, list[Block]] = {}
        self._masks: dict[int | None, BlockMask] = {}

    def merge(self, known_BGTD: Tensor, fresh_1GRD: Tensor) -> Tensor:
        """`[G, N, D]`: what is known of all positions, and at those of the queries what is fresh, with its graph."""
        return by_group(known_BGTD).index_copy(1, self.index_R, fresh_1GRD[0])

    def first_R(self, window: int | None) -> Tensor:
        """The first key that each query sees: of its document, or of the last `window`."""
        return self._start_R if window is None else self._start_R.maximum(self.index_R - window + 1)

    def blocks(self, window: int | None) -> list[Block]:
        """At most `BLOCK` queries of one sequence each; the same in every layer of that window."""
        if window not in self._blocks:
            self._blocks[window] = list(self._cut(window))
        return self._blocks[window]

    def mask(self, window: int | None) -> BlockMask:
        """The same in one, for flex attention."""
        if window not in self._masks:
            self._masks[window] = block_mask(self, window)
        return self._masks[window]

    def _cut(self, window: int | None) -> Iterator[Block]:
        first_R = self.first_R(window)
        ends = torch.bincount(self.index_R // self._length).cumsum(0).tolist()
        for begin, end in zip([0, *ends], ends, strict=False):
            for start in range(begin, end, BLOCK):
                rows = slice(start, min(start + BLOCK, end))
                keys = slice(int(first_R[rows].min()), int(self.index_R[rows.stop - 1]) + 1)
                key_S = torch.arange(keys.start, keys.stop, device=self.index_R.device)
                mask_RS = (key_S >= first_R[rows, None]) & (key_S <= self.index_R[rows, None])
                yield Block(rows, keys, mask_RS)


def by_group(tensor_BGTD: Tensor) -> Tensor:
    """`[G, N, D]`, as packed attention takes keys and values."""
    return tensor_BGTD.transpose(0, 1).flatten(1, 2)


class PackedAttention(Protocol):
    """query `[1, H, R, D]` over key and value `[G, N, D]` -> `[1, H, R, D]`; scale: default 1 / sqrt(D)."""

    def __call__(
        self, queries: PackedQueries, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor: ...


def attend_by_sequence(
    queries: PackedQueries, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Block after block by PyTorch's fused attention; see `PackedAttention`."""
    grouped = query.shape[1] != len(key)
    blocks = queries.blocks(window)
    parts = [
        scaled_dot_product_attention(part, keys[None], values[None], block.mask_RS, scale=scale, enable_gqa=grouped)
        for block, part, keys, values in zip(
            blocks,
            query.split([block.rows.stop - block.rows.start for block in blocks], dim=2),
            KeysOfBlocks.apply(key, blocks),
            KeysOfBlocks.apply(value, blocks),
            strict=True,
        )
    ]
    return torch.cat(parts, dim=2)


class KeysOfBlocks(torch.autograd.Function):
    """`[G, N, D]` -> the `[G, S, D]` of every block. Slices alone would add a gradient of all N for each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
        ctx.size, ctx.blocks = tensor.shape, blocks
        return tuple(tensor[:, block.keys] for block in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].new_zeros(ctx.size)
        for block, grad in zip(ctx.blocks, grads, strict=True):
            whole[:, block.keys] += grad
        return whole, None


class FlexAttention:
    """All blocks in one kernel, which skips those that no query sees; see `PackedAttention`.

    Args:
        compiled: as one kernel; else every product is made, as where no compiler is.
    """

    def __init__(self, compiled: bool) -> None:
        self._attend = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention

    def __call__(
        self, queries: PackedQueries, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        grouped = query.shape[1] != len(key)
        mask = queries.mask(window)
        return self._attend(query, key[None], value[None], block_mask=mask, scale=scale, enable_gqa=grouped)


def block_mask(queries: PackedQueries, window: int | None) -> BlockMask:
    """Which blocks of keys a block of queries sees in part, and which whole; no mask of R x N is ever made."""
    first_R, index_R = queries.first_R(window), queries.index_R

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= first_R[row]) & (key <= index_R[row])

    # Rows beyond the last repeat it, so that every block of queries is whole.
    rows = torch.arange(-(-len(index_R) // BLOCK) * BLOCK, device=index_R.device).clamp(max=len(index_R) - 1)
    first_QR, index_QR = first_R[rows].view(-1, BLOCK), index_R[rows].view(-1, BLOCK)
    start_K = torch.arange(0, queries.num_keys, BLOCK, device=index_R.device)
    end_K = (start_K + BLOCK).clamp(max=queries.num_keys) - 1
    some_QK = (end_K >= first_QR.amin(1, keepdim=True)) & (start_K <= index_QR.amax(1, keepdim=True))
    all_QK = (start_K >= first_QR.amax(1, keepdim=True)) & (end_K <= index_QR.amin(1, keepdim=True))
    whole_QK = all_QK & (end_K - start_K == BLOCK - 1)
    lists = (*_listed(some_QK & ~whole_QK), *_listed(whole_QK))
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(index_R), queries.num_keys)
    )


def _listed(seen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """int32 `[1, 1, Q]` and `[1, 1, Q, K]`: how many blocks of keys each block of queries sees, and these first."""
    order_QK = seen_QK.int().argsort(dim=-1, descending=True, stable=True)
    return seen_QK.sum(-1).int()[None, None], order_QK.int()[None, None]


def packed_attention(device: torch.device) -> PackedAttention:
    """The way that is fast on a device."""
    return FlexAttention(compiled=True) if device.type == "cuda" else attend_by_sequence


PREFIX = "selective_"
"""Of the names that attention is registered by here."""

Attended = tuple[Tensor, Tensor | None]
"""The output `[B, T, H, D]`, and weights if the kernel has them."""


class AttentionCall(NamedTuple):
    """One layer's attention, as Hugging Face calls it.

    kernel      the layer's own
    module      the layer's attention
    query       `[B, H, T, D]`
    key, value  `[B, G, S, D]`, of G groups of heads: as attention sees them, after rotation and norms
    options     the rest: `scaling`, `sliding_window`, and so on
    """

    kernel: Callable[..., Attended]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    options: dict[str, Any]

    @property
    def scale(self) -> float | None:
        """Of the products; None: 1 / sqrt(D)."""
        return self.options.get("scaling")

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself among them; None: all of its document so far."""
        return self.options.get("sliding_window")

    def run(self) -> Attended:
        """By the layer's own kernel."""
        return self.kernel(self.module, self.query, self.key, self.value, self.attention_mask, **self.options)


class Selective(Protocol):
    """What a call of the model brings to its attention."""

    def attend(self, call: AttentionCall) -> Attended:
        """The output of one layer."""


def open_attention(lm: PreTrainedModel) -> None:
    """Let calls of this model bring a `selective` object to its attention; without one nothing changes.

    Raises:
        UserError: the kernel is not in Hugging Face's registry (`eager` is each model's own).
    """
    kernel = lm.config._attn_implementation
    if kernel.startswith(PREFIX):
        return
    require_registered(kernel, type(lm).__name__)
    AttentionInterface.register(PREFIX + kernel, partial(_attend, ALL_ATTENTION_FUNCTIONS[kernel]))
    AttentionMaskInterface.register(PREFIX + kernel, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    lm.config._attn_implementation = PREFIX + kernel


def require_registered(kernel: str, model: str) -> None:
    """Refuse attention that cannot be looked up by its name.

    Args:
        kernel: `model.attn_implementation`, or what Hugging Face chose.
        model: who runs it, for the message.

    Raises:
        UserError: it is not in Hugging Face's registries.
    """
    if kernel not in ALL_ATTENTION_FUNCTIONS.valid_keys() or kernel not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        raise UserError(
            f"selection.backward is rows or replay, which need an attention of Hugging Face's registry, and {model} "
            f"runs '{kernel}': set model.attn_implementation=sdpa, or selection.backward=exact."
        )


def refuse_compiled(module: nn.Module) -> None:
    """Rows are known only after the forward, and a graph that was compiled before has no place for them.

    Raises:
        UserError: the module, or one in it, is compiled by `torch.compile`.
    """
    if any(hasattr(child, "_orig_mod") or child._compiled_call_impl for child in module.modules()):
        raise UserError(
            "selection.backward is rows or replay, and the student is compiled by torch.compile, which cannot follow "
            "them: do not compile it, or set selection.backward=exact."
        )


def _attend(
    kernel: Callable[..., Attended],
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
