"""A way into the attention of any Hugging Face model: what is done with queries, keys and values may be changed.

Hugging Face looks attention up by name in a registry, and passes on what the call of the model was given. So the
model stays as it is: its attention is registered once more under a name of ours, and a call that brings
`selective=...` has its layers attend by that object.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from megatron_slm.errors import UserError

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
