"""The loss that balances the experts of a mixture (Switch Transformer, Fedus et al. 2021, section 2.2).

Hugging Face adds it to a model's loss where `output_router_logits` is true: for each micro-batch, over all layers, the
share of tokens that each expert gets times its mean probability. A family's own function computes it.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.checks import evaluating, some_tokens, straight

FUNCTION = "load_balancing_loss_func"
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
TOLERANCE = 2e-2
"""Relative: of bf16, in which experts may be chosen anew."""


@dataclass(frozen=True)
class RouterLoss:
    """What a model adds to its loss: `coefficient` times what `balance` computes from the logits of its routers."""

    coefficient: float
    balance: Callable[[tuple[Tensor, ...]], Tensor]


def find_router_loss(lm: PreTrainedModel) -> RouterLoss | None:
    """Return the router loss that the configuration of a model turns on, if its family has the usual one."""
    function = getattr(sys.modules[type(lm).__module__], FUNCTION, None)
    coefficient = getattr(lm, "router_aux_loss_coef", getattr(lm, "aux_loss_coef", None))
    if not getattr(lm.config, "output_router_logits", False) or function is None or coefficient is None:
        return None
    if list(inspect.signature(function).parameters) != ARGUMENTS:
        return None
    return RouterLoss(float(coefficient), partial(function, num_experts=lm.num_experts, top_k=lm.num_experts_per_tok))


def check_own_losses(lm: PreTrainedModel, router: RouterLoss | None) -> None:
    """Refuse a model that adds a term to its loss which training would leave out.

    One forward on every rank, in which the loss of the tokens is made zero: what is left is the model's own.

    Args:
        lm: the student, as its engine runs it.
        router: what training adds.

    Raises:
        UserError: the rest is not the router loss.
    """
    tokens_BT = some_tokens(lm, 1, 8)
    arguments = {"input_ids": tokens_BT, "position_ids": straight(tokens_BT), "use_cache": False}
    with torch.no_grad(), evaluating(lm), _without_token_loss(lm) as called:
        own = lm(**arguments, labels=tokens_BT).loss
        if not called:
            return  # models with a loss of their own code, of before Hugging Face's families had further terms
        expected = torch.zeros_like(own)
        if router is not None:
            logits = lm.base_model(**arguments, output_router_logits=True).router_logits
            expected = router.coefficient * router.balance(logits)
    if not (own - expected).abs() <= TOLERANCE * expected.abs():
        raise UserError(
            f"{type(lm).__name__} adds {float(own):.3g} to the loss of eight tokens, a term that this system does not "
            "know, and training would leave it out: turn it off in model.config (output_router_logits, "
            "z_loss_coefficient, or what the architecture calls it)."
        )


@contextmanager
def _without_token_loss(lm: PreTrainedModel) -> Iterator[list[bool]]:
    """The model's loss of tokens is zero. Yields a list that is empty until it was asked for."""
    called: list[bool] = []

    def zero(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        called.append(True)
        return logits.new_zeros((), dtype=torch.float32)

    before = vars(lm).get("_loss_function")
    lm.loss_function = zero
    try:
        yield called
    finally:
        # The setter of `loss_function` keeps it under this name; checked with transformers 5.17 and 5.24.
        del lm._loss_function
        if before is not None:
            lm.loss_function = before
