"""A Hugging Face folder from the weights of a checkpoint, with everything that `from_pretrained` needs.

Memory holds a shard of the weights at a time. The folder is read back and compared before it is published.
"""

import ctypes
import json
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_slm.backend.stored import StoredWeight
from megatron_slm.errors import UserError

SMALLEST_SHARD, LARGEST_SHARD = 1 << 28, 5 * 10**9
"""Bytes. A quarter of the weights lies between, so that copies of a shard are small beside the whole."""


def empty_model(
    folder: Path, weights: Mapping[str, StoredWeight], dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the Hugging Face model without weights, on the meta device.

    Args:
        folder: that holds the student's configuration.
        weights: of the Hugging Face model, by its names.
        dtype: of the exported weights.
        trust_remote_code: run Python that came with the model that the run began from.

    Raises:
        UserError: the configuration cannot be read, or the checkpoint's weights are not the model's.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # Hugging Face has no error of its own for files that it cannot use
        raise UserError(f"The configuration in {folder} cannot be read ({_one_line(error)}): put it back.") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.config.use_cache = True
    own = model.state_dict()
    tied = model.all_tied_weights_keys
    misfit = {name for name in own if name not in weights and name not in tied} | (weights.keys() - own.keys())
    misfit |= {name for name, tensor in own.items() if name in weights and weights[name].shape != tensor.shape}
    if misfit:
        raise UserError(f"The checkpoint does not fit the run's model: {sorted(misfit)[:3]}.")
    for name, source in tied.items():
        if name in weights and weights[name] != weights[source]:
            raise UserError(
                f"The configuration of the run ties {name} to {source}, but the checkpoint holds two different "
                "weights: set model.config.tie_word_embeddings to false in RUN_DIR/config.yaml, and export again."
            )
    return model


def write_weights(
    model: PreTrainedModel,
    weights: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    folder: Path,
    told: Callable[[int], None],
) -> None:
    """Write weights (safetensors) and configurations to an existing folder.

    `save_pretrained` runs once for each shard: for some architectures it splits or merges weights, which copies them.

    Args:
        model: of `empty_model`.
        weights: as there.
        dtype: of the exported weights.
        folder: to write to.
        told: called with the number of parameters that are written.
    """
    names = [name for name in model.state_dict() if name not in model.all_tied_weights_keys]
    shards = split_into_shards({name: _bytes(weights[name], dtype) for name in names})
    written: list[Path] = []
    for number, shard in enumerate(shards, 1):
        state = {name: weights[name].read(dtype) for name in shard}
        model.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
        # safetensors makes a file that only its owner can read.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
        del state
        _release_freed_memory()
        if len(shards) > 1:
            written.append((folder / "model.safetensors").rename(folder / f"shard-{number}"))
        told(sum(weights[name].shape.numel() for name in chain(*shards[:number])))
    if written:
        _write_index(written, sum(weights[name].shape.numel() for name in names), folder)


def split_into_shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return the names of weights in groups of similar size; a layer is never split.

    Architectures that store weights in another form than they compute with convert within a layer.

    Args:
        sizes: bytes of each weight, by its name.
    """
    limit = min(max(sum(sizes.values()) // 4, SMALLEST_SHARD), LARGEST_SHARD)
    layers: dict[str, list[str]] = {}
    for name in sizes:
        numbered = re.match(r".*?\.\d+\.", name)
        layers.setdefault(numbered[0] if numbered else "", []).append(name)
    shards: list[list[str]] = []
    room = 0
    for names in layers.values():
        size = sum(sizes[name] for name in names)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1] += names
        room -= size
    return shards


def check_export(
    folder: Path,
    weights: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    trust_remote_code: bool,
    told: Callable[[int], None],
) -> None:
    """Load an exported folder as anyone would, and compare it with the checkpoint, bit for bit.

    Args:
        folder: of the export.
        weights: of the Hugging Face model, by its names.
        dtype: that they were rounded to.
        trust_remote_code: run Python in the folder.
        told: called with the number of parameters that are compared.

    Raises:
        UserError: it cannot be loaded, or holds anything else.
    """
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": "auto"}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # models are foreign code
        raise _failed(f"cannot be loaded again: {_one_line(error)}") from error
    loaded: dict[str, Tensor] = model.state_dict()
    wrong = {*found["missing_keys"], *found["unexpected_keys"], *(key for key, *_ in found["mismatched_keys"])}
    wrong |= loaded.keys() ^ (weights.keys() | {*model.all_tied_weights_keys})
    done = 0
    for name, weight in weights.items():
        if name in loaded and not weight.equals(loaded[name], dtype):
            wrong.add(name)
        done += weight.shape.numel()
        told(done)
    if wrong:
        raise _failed(
            f"differs from the checkpoint in {len(wrong)} weights when it is loaded again: {sorted(wrong)[:3]}"
        )


def _failed(what: str) -> UserError:
    return UserError(
        f"Nothing was exported, because the folder {what}. This version of transformers does not store "
        "this architecture as it was trained: export with another version of transformers."
    )


def _release_freed_memory() -> None:
    """Give freed blocks back to the system: glibc keeps those below 32 MiB, which most weights are."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _bytes(weight: StoredWeight, dtype: torch.dtype) -> int:
    return weight.shape.numel() * dtype.itemsize


def _write_index(shards: list[Path], parameters: int, folder: Path) -> None:
    """Name the shards as Hugging Face does, and write the index in which `from_pretrained` finds them."""
    where: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.rename(folder / name)
        with safe_open(folder / name, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), name)
            size += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": where}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
