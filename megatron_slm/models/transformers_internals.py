"""The private and undocumented names of transformers that this package uses. No other file touches them.

    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS   registry of mask functions, by the name of an attention
    modeling_utils.ALL_ATTENTION_FUNCTIONS       registry of attention functions, by name
    PreTrainedConfig._attn_implementation        name of the attention that a model looks up in every forward
    PreTrainedModel._init_weights                a family's initialisation of one module
    PreTrainedModel._loss_function               attribute in which the setter of `loss_function` stores the function
    PreTrainedModel.all_tied_weights_keys        tied weights, each with its source
    PreTrainedModel.get_expanded_tied_weights_keys   weights that the configuration ties
    load_balancing_loss_func                     router loss, in the module of each family of mixtures
    pytorch_utils.Conv1D                         linear of GPT-2, whose weight is transposed

Checked with transformers 5.17 and 5.24. `tests/contracts/test_private_names.py` fails if one is missing.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.pytorch_utils import Conv1D

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""A function that returns the output `[B, T, H, D]`, and the attention weights or None."""

ROUTER_LOSS = "load_balancing_loss_func"
ROUTER_LOSS_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def attention_name(model: PreTrainedModel) -> str:
    """Return the name of a model's attention, such as `sdpa`."""
    return str(model.config._attn_implementation)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the name by which every further forward of a model looks up its attention."""
    model.config._attn_implementation = name


def has_attention(name: str) -> bool:
    """Return whether both registries hold this name; `eager` is in neither, because each family has its own."""
    return name in ALL_ATTENTION_FUNCTIONS.valid_keys() and name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


def find_attention(name: str) -> AttentionFunction:
    """Return a registered attention function."""
    function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[name]
    return function


def register_attention(name: str, function: AttentionFunction, mask_of: str) -> None:
    """Register an attention function, with the mask of the registered attention `mask_of`."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask_of])


def initializer(model: PreTrainedModel) -> Callable[[nn.Module], None]:
    """Return the function with which a model initialises one of its modules."""
    function: Callable[[nn.Module], None] = model._init_weights
    return function


@contextmanager
def token_loss_replaced(model: PreTrainedModel, function: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the function that computes a model's loss from logits and labels, inside the context."""
    before = vars(model).get("_loss_function")
    model.loss_function = function
    try:
        yield
    finally:
        del model._loss_function  # the property then returns the function that the configuration names
        if before is not None:
            model.loss_function = before


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Return the names of tied weights, each with the name of the weight that it shares."""
    tied: dict[str, str] = model.all_tied_weights_keys
    return tied


def weights_to_tie(model: PreTrainedModel) -> dict[str, str]:
    """Return the weights that the configuration ties, like `tied_weights`, even if the files held two values."""
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return tied


def router_loss_function(model: PreTrainedModel) -> Callable[..., Any] | None:
    """Return the function that computes the router loss of a model's family; None without one of this signature."""
    function = getattr(sys.modules[type(model).__module__], ROUTER_LOSS, None)
    if function is None or list(inspect.signature(function).parameters) != ROUTER_LOSS_ARGUMENTS:
        return None
    found: Callable[..., Any] = function
    return found


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear with an unchanged forward, unlike quantised linears and some routers."""
    return getattr(module.forward, "__func__", None) in (nn.Linear.forward, Conv1D.forward)


def is_transposed(linear: nn.Module) -> bool:
    """Return whether the weight of a linear is [input size, output size]."""
    return isinstance(linear, Conv1D)
