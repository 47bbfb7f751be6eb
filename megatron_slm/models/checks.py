"""Checks of a model before it is trained: it must compute what the method and the run's settings assume."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.transformers_internals import attention_name

DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
UNUSED_DROPOUTS = ("classif", "summary")
"""Parts of the names of dropouts that a causal language model never applies."""
LEAK = 2e-3
"""Influence of one document on another, relative to that of attended tokens, that round-off can cause.

It is highest for experts: other tokens in a batch change the shapes of their products."""


def check_length(config: PretrainedConfig, setting: str, seq_length: int) -> None:
    """Raise a UserError if sequences are longer than `max_position_embeddings` (`n_positions` in GPT-2).

    Learned positions end there, and rotary ones were trained up to it.

    Args:
        config: configuration of the model.
        setting: `model` or `reference`, for the error.
        seq_length: tokens per sample.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and seq_length > longest > 0:
        other = f", or set model.config.max_position_embeddings={seq_length}" if setting == "model" else ""
        raise UserError(
            "data.seq_length",
            seq_length,
            f"the {setting} supports at most {longest} positions (max_position_embeddings)",
            f"Use {longest} or less{other}",
        )


def check_dropout_settings(config: PretrainedConfig) -> None:
    """Raise a UserError if a configuration turns dropout on, which would add noise to the losses of each forward."""
    for name, value in _dropouts(config.to_dict()):
        raise UserError(
            f"model.config.{name}",
            value,
            "dropout adds noise to the excess loss, by which tokens are selected",
            f"Set model.config.{name}=0 or objective=clm",
        )


def check_dropout(model: nn.Module) -> None:
    """Raise a UserError if a student has dropout, under any name in its configuration."""
    for name, module in model.named_modules():
        if isinstance(module, DROPOUT_MODULES) and module.p > 0:
            raise UserError(
                f"dropout of the student's module {name}",
                module.p,
                "dropout adds noise to the excess loss, by which tokens are selected",
                "Turn it off in model.config, or set objective=clm",
            )


def check_head(model: PreTrainedModel) -> None:
    """Raise a UserError if a model's logits are not its last hidden states times the head: soft caps, scales, layers.

    Every rank runs one forward of eight tokens, in which the output of the head is replaced by known values. The logits
    must be these values, unchanged, and the input of the head must be the last hidden states.

    Args:
        model: as its engine runs it.
    """
    tokens_BT = some_tokens(model, 1, 8)
    arguments = {"input_ids": tokens_BT, "position_ids": straight(tokens_BT), "use_cache": False}
    with torch.no_grad(), evaluating(model), _replaced_head(model) as seen:
        logits_BTV = model(**arguments).logits
        body = model.base_model(**arguments)
    # If the base model is the model itself, its forward called the head a second time.
    called_once = len(seen) == 2
    # `CausalLM` reads only the weight and the bias of the head.
    is_linear = type(model.get_output_embeddings()).forward is nn.Linear.forward
    takes_hidden_states = called_once and is_linear and _close(seen[0], body.last_hidden_state)
    if not takes_hidden_states or not torch.equal(logits_BTV.float(), seen[1].float()):
        raise UserError(
            "architecture",
            type(model).__name__,
            "its logits are not the last hidden states times the head (a soft cap, a scale, or no model beneath the "
            "head)",
            "Use another architecture",
        )


def check_packing(module: nn.Module, model: PreTrainedModel) -> None:
    """Raise a UserError if `data.reset_attention` is on for a model that attends across packed documents.

    Other tokens in the first document of a sequence must not change the losses of the second. To hold for
    any weights and dtype, the check compares this change with two others: with the change if positions do not restart,
    so that the second document attends to the first, and with the difference of two equal forwards, which is not zero
    on accelerators that sum in any order. There are two sequences, because some kernels detect restarts only in a batch
    of one.

    Args:
        module: the `CausalLM`, or its engine; every rank calls it.
        model: the model inside.
    """
    text_BS = some_tokens(model, 2, 17)
    # The first documents of the two sequences differ in length, to detect kernels that use the first sequence's mask.
    tokens_BT, labels_BT = text_BS[:, :-1], text_BS[:, 1:]
    straight_BT = straight(tokens_BT)
    start_B1 = torch.tensor([[5], [9]], device=tokens_BT.device)
    second_BT = straight_BT >= start_B1
    restarted_BT = torch.where(second_BT, straight_BT - start_B1, straight_BT)
    changed_BT = torch.where(second_BT, tokens_BT, (tokens_BT + 1) % model.config.vocab_size)

    def change(other_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        before_BT = module(tokens_BT, labels_BT, position_ids_BT)["loss"]
        after_BT = module(other_BT, labels_BT, position_ids_BT)["loss"]
        distance: Tensor = (after_BT - before_BT)[second_BT].norm()
        return distance

    # `model` and not `module`: a DeepSpeed engine does not restore its mode, and a frozen model would stay in training
    # mode.
    with torch.no_grad(), evaluating(model):
        noise = change(tokens_BT, restarted_BT)
        leaked, attended = change(changed_BT, restarted_BT), change(changed_BT, straight_BT)
    # Four times, because one pair of forwards is only a sample of the noise.
    if leaked > LEAK * attended + 4 * noise:
        raise UserError(
            "data.reset_attention",
            True,
            f"{type(model).__name__} with the attention {attention_name(model)} attends across packed documents",
            "Set data.reset_attention=false or model.attn_implementation=sdpa, or use another architecture",
        )


def _dropouts(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the dotted names and the values of all dropouts above 0."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dropouts({str(inner): item for inner, item in value.items()}, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            is_dropout = any(part in key for part in ("dropout", "pdrop", "layerdrop"))
            if is_dropout and not any(part in key for part in UNUSED_DROPOUTS):
                yield f"{prefix}{key}", value


def some_tokens(model: PreTrainedModel, sequences: int, length: int) -> Tensor:
    """Return fixed tokens, int64 `[sequences, length]`, on the model's device."""
    device = next(model.parameters()).device
    text_N = torch.arange(sequences * length, device=device) * 7919 % int(model.config.vocab_size)
    return text_N.view(sequences, length)


def straight(tokens_BT: Tensor) -> Tensor:
    """Return positions that do not restart, int64 `[B, T]`."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)


@contextmanager
def _replaced_head(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Replace the output of the head by large known values.

    Yields:
        A list, to which each call of the head adds its input and these values.
    """
    seen: list[Tensor] = []

    def replace(head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        known = torch.linspace(-1e4, 1e4, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
        seen.extend((inputs[0], known))
        return known

    hook = model.get_output_embeddings().register_forward_hook(replace)
    try:
        yield seen
    finally:
        hook.remove()


def _close(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal up to round-off: an accelerator may sum experts in any order."""
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    return one.shape == other.shape and bool((one - other).norm() <= 2e-2 * other.norm())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode inside the context: dropout would differ between two forwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
