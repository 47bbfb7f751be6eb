"""The router loss, which balances the experts of a mixture (Switch Transformer, Fedus et al. 2021, section 2.2).

Hugging Face adds it to a model's loss if `output_router_logits` is true. Per micro-batch, it sums over the experts of
all layers the share of tokens that an expert receives times the expert's mean probability. Each model family has a
function that computes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.checks import evaluating, some_tokens, straight
from megatron_slm.models.transformers_internals import router_loss_function, token_loss_replaced

TOLERANCE = 2e-2
"""Relative difference that round-off can cause: in bf16, it may change which experts a token is routed to."""


@dataclass(frozen=True)
class RouterLoss:
    """The term `coefficient * balance(router_logits)` that a model adds to its loss."""

    coefficient: float
    balance: Callable[[tuple[Tensor, ...]], Tensor]


def find_router_loss(lm: PreTrainedModel) -> RouterLoss | None:
    """Return the router loss of a model; None if its configuration turns it off, or if it is not the usual one."""
    function = router_loss_function(lm)
    coefficient = getattr(lm, "router_aux_loss_coef", getattr(lm, "aux_loss_coef", None))
    if not getattr(lm.config, "output_router_logits", False) or function is None or coefficient is None:
        return None
    return RouterLoss(float(coefficient), partial(function, num_experts=lm.num_experts, top_k=lm.num_experts_per_tok))


def check_own_losses(lm: PreTrainedModel, router: RouterLoss | None) -> None:
    """Raise a UserError if a model adds a term to its loss that training would leave out.

    Every rank runs one forward in which the loss of the tokens is zero. What remains must be the router loss.

    Args:
        lm: the student, as its engine runs it.
        router: the term that training adds.
    """
    tokens_BT = some_tokens(lm, 1, 8)
    arguments = {"input_ids": tokens_BT, "position_ids": straight(tokens_BT), "use_cache": False}
    called = False

    def zero(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal called
        called = True
        return logits.new_zeros((), dtype=torch.float32)

    with torch.no_grad(), evaluating(lm), token_loss_replaced(lm, zero):
        own = lm(**arguments, labels=tokens_BT).loss
        if not called:
            return  # an older architecture, which computes the loss itself and adds nothing to it
        expected = torch.zeros_like(own)
        if router is not None:
            logits = lm.base_model(**arguments, output_router_logits=True).router_logits
            expected = router.coefficient * router.balance(logits)
    if not (own - expected).abs() <= TOLERANCE * expected.abs():
        raise UserError(
            "architecture",
            type(lm).__name__,
            f"it adds {float(own):.3g} to the loss of eight tokens, a term that is not supported and that training "
            "would leave out",
            "Turn it off in model.config (output_router_logits, z_loss_coefficient, or the architecture's name for it)",
        )
