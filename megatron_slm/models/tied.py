"""Weights that a configuration ties, and whose files hold two that differ: training them as one loses the other."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError

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
