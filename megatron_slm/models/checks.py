"""What is asked of a model before it trains: that it computes what the run's settings take for granted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError

UNUSED_DROPOUTS = ("classif", "summary")
"""Parts of the names of dropouts that a causal language model never applies."""
LEAK = 2e-3
"""Share of an attended document's influence that is still round-off: of experts, which multiply other batches."""


def check_length(config: PretrainedConfig, setting: str, seq_length: int) -> None:
    """Refuse sequences longer than a model's positions: learned ones end there, rotary ones were trained up to it.

    Args:
        config: of the model.
        setting: `model` or `reference`, for the message.
        seq_length: tokens a sample.

    Raises:
        UserError: `data.seq_length` is above `max_position_embeddings` (GPT-2 calls it `n_positions`).
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and seq_length > longest > 0:
        other = f", or set model.config.max_position_embeddings={seq_length}" if setting == "model" else ""
        raise UserError(
            f"data.seq_length is {seq_length}, and the {setting} has {longest} positions (max_position_embeddings): "
            f"use data.seq_length={longest} or less{other}."
        )


def check_dropout_settings(config: PretrainedConfig) -> None:
    """Refuse a configuration that drops anything: the losses of two forwards would differ by noise.

    Raises:
        UserError: naming the first such entry.
    """
    for name, value in _dropouts(config.to_dict()):
        raise UserError(
            f"The student's {name} is {value}: dropout makes excess loss noise, so set model.config.{name}=0 "
            "or objective=clm."
        )


def check_dropout(model: nn.Module) -> None:
    """Refuse a model that drops anything, whatever its configuration calls it.

    Raises:
        UserError: naming the first such module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UserError(
                f"The student's module {name} drops {module.p} of its input: dropout makes excess loss noise, "
                "so turn it off in model.config or set objective=clm."
            )


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than hidden states times the head: soft caps, scales, extra layers.

    One forward of eight tokens on every rank, in which the head answers with values of its own:
    they must come out untouched, and what went in must be the last hidden states.

    Raises:
        UserError: it is not so.
    """
    tokens_BT = some_tokens(model, 1, 8)
    arguments = {"input_ids": tokens_BT, "position_ids": straight(tokens_BT), "use_cache": False}
    with torch.no_grad(), evaluating(model), _replaced_head(model) as seen:
        logits_BTV = model(**arguments).logits
        body = model.base_model(**arguments)
    # A base model that is the model itself asks the head again.
    known = len(seen) == 2 and _is_linear(model) and _close(seen[0], body.last_hidden_state)
    if not known or not _same(logits_BTV, seen[1]):
        raise UserError(
            f"{type(model).__name__} computes its logits in a way that this system does not know "
            "(a soft cap, a scale, or no model of its own beneath the head): use another architecture."
        )


def check_packing(module: nn.Module, model: PreTrainedModel) -> None:
    """Refuse `data.reset_attention` for a model that attends across packed documents all the same.

    Other tokens in the first document of a sequence must not change the losses of the second. Where
    positions do not restart they do, and that is the measure: it holds for any weights and dtype. So is
    what two equal forwards differ by, where an accelerator sums in any order. Two sequences, because
    some kernels see restarts in a batch of one only.

    Args:
        module: the `CausalLM`, or its engine; every rank calls it.
        model: the model inside.

    Raises:
        UserError: documents leak into each other.
    """
    text_BS = some_tokens(model, 2, 17)
    tokens_BT, labels_BT = text_BS[:, :-1], text_BS[:, 1:]
    straight_BT = straight(tokens_BT)
    start_B1 = torch.tensor([[5], [9]], device=tokens_BT.device)
    second_BT = straight_BT >= start_B1
    restarted_BT = torch.where(second_BT, straight_BT - start_B1, straight_BT)
    changed_BT = torch.where(second_BT, tokens_BT, (tokens_BT + 1) % model.config.vocab_size)

    def change(other_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        one, other = (module(text_BT, labels_BT, position_ids_BT)["loss"] for text_BT in (tokens_BT, other_BT))
        distance: Tensor = (one - other)[second_BT].norm()
        return distance

    # The model inside: a DeepSpeed engine forgets its own mode, and would train a frozen model afterwards.
    with torch.no_grad(), evaluating(model):
        noise = change(tokens_BT, restarted_BT)
        leaked, attended = change(changed_BT, restarted_BT), change(changed_BT, straight_BT)
    if leaked > LEAK * attended + 4 * noise:
        kernel = model.config._attn_implementation
        raise UserError(
            f"data.reset_attention is true, and {type(model).__name__} with attention '{kernel}' lets packed documents "
            "see each other all the same: set data.reset_attention=false, model.attn_implementation=sdpa, or use "
            "another architecture."
        )


def _dropouts(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted names and values of all dropouts above 0."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dropouts({str(inner): item for inner, item in value.items()}, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            is_dropout = any(part in key for part in ("dropout", "pdrop", "layerdrop"))
            if is_dropout and not any(part in key for part in UNUSED_DROPOUTS):
                yield f"{prefix}{key}", value


def some_tokens(model: PreTrainedModel, sequences: int, length: int) -> Tensor:
    """int64 `[sequences, length]` on the model's device."""
    device = next(model.parameters()).device
    text_N = torch.arange(sequences * length, device=device) * 7919 % int(model.config.vocab_size)
    return text_N.view(sequences, length)


def straight(tokens_BT: Tensor) -> Tensor:
    """Positions that never restart."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)


@contextmanager
def _replaced_head(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The head answers with large known values. Yields its input and that answer, once it has been called."""
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


def _is_linear(model: PreTrainedModel) -> bool:
    """The head is a product with a weight and a bias, which is all that `CausalLM` takes from it."""
    return type(model.get_output_embeddings()).forward is nn.Linear.forward


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, whatever the dtypes."""
    return torch.equal(one.float(), other.float())


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to round-off, NaN included: an accelerator may sum experts in another order each time."""
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    return one.shape == other.shape and bool((one - other).norm() <= 2e-2 * other.norm())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which two forwards would draw differently."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


ROWS = 4096


def refuse_untied(model: PreTrainedModel, path: str) -> None:
    """Refuse a student of which Hugging Face has not tied what its configuration ties.

    It trains both weights then, and an export could hold only one. A reference may be so: its losses are Hugging
    Face's own, from both weights.

    Args:
        model: as `from_pretrained` returns it.
        path: `model.path`, for the message.

    Raises:
        UserError: the files hold two different weights.
    """
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target in wanted.keys() - model.all_tied_weights_keys.keys():
        _refuse(path, target, wanted[target])


def refuse_untied_files(config: PretrainedConfig, path: str, trust_remote_code: bool) -> None:
    """The same, from a local folder's files alone: no model is loaded.

    Args:
        config: of the student.
        path: `model.path`.
        trust_remote_code: run Python that comes with the model.

    Raises:
        UserError: as `refuse_untied`.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # models are foreign code; training names what is wrong with them
        return
    files: dict[str, Path] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        held = [key for key in (_key(target, files), _key(source, files)) if key is not None]
        if len(held) == 2 and not _equal(files, *held):
            _refuse(path, target, source)


def _refuse(path: str, target: str, source: str) -> None:
    raise UserError(
        f"model.path is '{path}', whose configuration ties {target} to {source}, but whose files hold two different "
        "weights: set model.config.tie_word_embeddings=false to train and export both."
    )


def _key(name: str, files: Mapping[str, Path]) -> str | None:
    """Return the name of a weight in files, which may lack the model's prefix or have one more."""
    return next((key for key in files if f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")), None)


def _equal(files: Mapping[str, Path], one: str, other: str) -> bool:
    with safe_open(files[one], framework="pt") as first, safe_open(files[other], framework="pt") as second:
        left, right = first.get_slice(one), second.get_slice(other)
        shape = left.get_shape()
        if shape != right.get_shape():
            return False
        starts = range(0, shape[0], ROWS)
        return all(torch.equal(left[row : row + ROWS], right[row : row + ROWS]) for row in starts)
