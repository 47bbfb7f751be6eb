"""Pretrained models from a Hugging Face folder or the hub: configuration, weights and fingerprint."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError, refuse_missing_folder
from megatron_slm.models.transformers_internals import tied_weights, weights_to_tie

CHECK_PATH = "Check the path, and that its files are complete"
ROWS = 4096
"""Rows of two weights that are compared at a time."""


def pretrained_config(path: str, setting: str, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a pretrained model.

    Args:
        path: Hugging Face folder or hub name.
        setting: `model` or `reference`, for the error.
        trust_remote_code: run Python that comes with the model.

    Raises:
        UserError: it cannot be read.
    """
    return _read(AutoConfig.from_pretrained, path, setting, trust_remote_code)


def load_pretrained(path: str, setting: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Return a pretrained model, from safetensors only: other weight files are pickles, which can run code.

    Args:
        path: Hugging Face folder or hub name.
        setting: `model` or `reference`, for the error.
        trust_remote_code: run Python that comes with the model.
        options: further arguments for `from_pretrained`.

    Raises:
        UserError: it cannot be loaded, weights are missing, or a student's files hold two values of a tied weight.
    """
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _read(AutoModelForCausalLM.from_pretrained, path, setting, trust_remote_code, **options)
    # Hugging Face initialises missing weights at random, with another seed on each rank.
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise UserError(
            f"{setting}.path",
            path,
            f"{len(missing)} of the model's weights are missing from its files or have another shape, such as "
            f"{missing[0]}",
            "Check that the files are complete, and model.config if it is set",
        )
    if setting == "model":
        _refuse_untied(model, path)
    return model


def refuse_pickles(setting: str, path: str | None) -> None:
    """Raise a UserError if a model's folder holds no `*.safetensors`; loading would refuse it, but later."""
    if path and Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise UserError(f"{setting}.path", path, "it holds no *.safetensors", "Save the model as safetensors")


def refuse_untied_files(config: PretrainedConfig, path: str, trust_remote_code: bool) -> None:
    """Raise the UserError of `load_pretrained` about tied weights, without loading the model of a local folder.

    Args:
        config: configuration of the student.
        path: `model.path`.
        trust_remote_code: run Python that comes with the model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model is foreign code, which may raise anything; training reports the error
        return
    files: dict[str, Path] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    for target, source in weights_to_tie(model).items():
        target_key, source_key = _stored_name(target, files), _stored_name(source, files)
        if target_key and source_key and not _equal(files, target_key, source_key):
            raise _untied(path, target, source)


def weights_fingerprint(path: str) -> str:
    """Return the SHA-256 of the configuration and the safetensors files of a reference model.

    It depends only on the contents of these files, not on their folder.

    Args:
        path: Hugging Face folder or hub name.

    Raises:
        UserError: the folder cannot be read, or holds no safetensors file.
    """
    refuse_missing_folder("reference.path", path)
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=["config.json", "*.safetensors"]))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise UserError("reference.path", path, f"it cannot be loaded ({one_line(error)})", CHECK_PATH) from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError("reference.path", path, "it holds no *.safetensors", "Save the model as safetensors")
    whole = hashlib.sha256()
    for file in (folder / "config.json", *files):
        try:
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(
                "reference.path", path, f"{file.name} in it cannot be read ({error.strerror})", "Save the model again"
            ) from error
    return whole.hexdigest()


def one_line(error: Exception) -> str:
    """Return the message of a library's error as a part of a sentence: in one line, without its period."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _read(read: Callable[..., Any], path: str, setting: str, trust_remote_code: bool, **options: Any) -> Any:
    """Return the result of a `from_pretrained` method, and raise its errors as user errors."""
    refuse_missing_folder(f"{setting}.path", path)
    try:
        return read(path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise UserError(f"{setting}.path", path, f"it cannot be loaded ({one_line(error)})", CHECK_PATH) from error


def _refuse_untied(model: PreTrainedModel, path: str) -> None:
    """Raise a UserError if Hugging Face did not tie two weights of a student that its configuration ties.

    It does not tie them if the files hold two values. Training would update both, and an export could hold only one.
    References are not checked: their losses come from both weights, as in Hugging Face.
    """
    wanted = weights_to_tie(model)
    for target in wanted.keys() - tied_weights(model).keys():
        raise _untied(path, target, wanted[target])


def _untied(path: str, target: str, source: str) -> UserError:
    return UserError(
        "model.path",
        path,
        f"its configuration ties {target} to {source}, and its files hold two different weights",
        "Set model.config.tie_word_embeddings=false to train and export both",
    )


def _stored_name(name: str, files: Mapping[str, Path]) -> str | None:
    """Return the name of a weight in the files, which may lack the model's prefix or have a further one."""
    return next((key for key in files if f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")), None)


def _equal(files: Mapping[str, Path], one: str, other: str) -> bool:
    with safe_open(files[one], framework="pt") as first, safe_open(files[other], framework="pt") as second:
        left, right = first.get_slice(one), second.get_slice(other)
        shape = left.get_shape()
        if shape != right.get_shape():
            return False
        starts = range(0, shape[0], ROWS)
        return all(torch.equal(left[row : row + ROWS], right[row : row + ROWS]) for row in starts)
