"""Export of a checkpoint's weights to a folder that `from_pretrained` loads, and the check of that folder.

The export holds one shard of the weights in memory at a time.
"""

import ctypes
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_slm.backend.stored import StoredWeight
from megatron_slm.errors import UserError
from megatron_slm.models.pretrained import one_line
from megatron_slm.models.transformers_internals import tied_weights

SMALLEST_SHARD, LARGEST_SHARD = 1 << 28, 5 * 10**9
"""Bytes. A shard is a quarter of the weights within these limits, so that a copy of it needs little memory."""


def empty_model(
    folder: Path, weights: Mapping[str, StoredWeight], dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the Hugging Face model without weights, on the meta device.

    Args:
        folder: folder with the student's configuration.
        weights: weights of the checkpoint, by their names in the Hugging Face model.
        dtype: dtype of the exported weights.
        trust_remote_code: run Python that came with the starting model of the run.

    Raises:
        UserError: the configuration cannot be read, or the checkpoint's weights do not fit it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # Hugging Face raises many types of errors for files that it cannot read
        reason = f"the configuration in it cannot be read ({one_line(error)})"
        raise UserError("model configuration", folder, reason, "Restore the folder") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.config.use_cache = True
    expected = model.state_dict()
    tied = tied_weights(model)
    wrong = (expected.keys() - weights.keys() - tied.keys()) | (weights.keys() - expected.keys())
    wrong |= {name for name, tensor in expected.items() if name in weights and weights[name].shape != tensor.shape}
    if wrong:
        examples = ", ".join(sorted(wrong)[:3])
        reason = f"{len(wrong)} weights of the checkpoint do not fit it, such as {examples}"
        raise UserError("model configuration", folder, reason, "Restore the folder, or the checkpoint")
    for name, source in tied.items():
        if name in weights and weights[name] != weights[source]:
            raise UserError(
                "model.config.tie_word_embeddings",
                True,
                f"the checkpoint holds two different weights for {name} and {source}",
                "Set it to false in RUN_DIR/config.yaml, and export again",
            )
    return model


def write_weights(
    model: PreTrainedModel,
    weights: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    folder: Path,
    report: Callable[[int], None],
) -> None:
    """Write weights (safetensors) and configurations to an existing folder.

    `save_pretrained` runs once per shard: for some architectures it splits or merges weights, which copies them.

    Args:
        model: from `empty_model`.
        weights: weights of the checkpoint, by their names in the model.
        dtype: dtype of the exported weights.
        folder: existing folder to write to.
        report: called with the number of parameters written so far.
    """
    tied = tied_weights(model)
    names = [name for name in model.state_dict() if name not in tied]
    shards = split_into_shards({name: weights[name].shape.numel() * dtype.itemsize for name in names})
    written: list[Path] = []
    num_written = 0
    for number, shard in enumerate(shards, 1):
        state = {name: weights[name].read(dtype) for name in shard}
        model.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
        # safetensors creates files that only the owner can read.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
        del state
        _release_freed_memory()
        if len(shards) > 1:
            written.append((folder / "model.safetensors").rename(folder / f"shard-{number}"))
        num_written += sum(weights[name].shape.numel() for name in shard)
        report(num_written)
    if written:
        _write_index(written, num_written, folder)


def split_into_shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return the names of weights in groups of similar size, without splitting a layer.

    Some architectures convert weights when they are saved, and such a conversion needs all weights of a layer.

    Args:
        sizes: bytes of each weight, by its name.
    """
    limit = min(max(sum(sizes.values()) // 4, SMALLEST_SHARD), LARGEST_SHARD)
    layers: dict[str, list[str]] = {}
    for name in sizes:
        numbered = re.match(r".*?\.\d+\.", name)
        layers.setdefault(numbered[0] if numbered else "", []).append(name)
    shards: list[list[str]] = []
    space_left = 0
    for names in layers.values():
        size = sum(sizes[name] for name in names)
        if not shards or size > space_left:
            shards.append([])
            space_left = limit
        shards[-1] += names
        space_left -= size
    return shards


def check_export(
    folder: Path,
    weights: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    trust_remote_code: bool,
    report: Callable[[int], None],
) -> None:
    """Load an exported folder with `from_pretrained`, and compare it with the checkpoint, bit for bit.

    Args:
        folder: the exported folder.
        weights: weights of the checkpoint, by their names in the Hugging Face model.
        dtype: dtype that they were rounded to.
        trust_remote_code: run Python in the folder.
        report: called with the number of parameters compared so far.

    Raises:
        UserError: the folder cannot be loaded, or differs from the checkpoint.
    """
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": "auto"}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a model is foreign code, which may raise anything
        raise _not_exported(f"cannot be loaded again ({one_line(error)})") from error
    loaded: dict[str, Tensor] = model.state_dict()
    wrong = {*found["missing_keys"], *found["unexpected_keys"], *(key for key, *_ in found["mismatched_keys"])}
    wrong |= loaded.keys() ^ (weights.keys() | tied_weights(model).keys())
    num_compared = 0
    for name, weight in weights.items():
        if name in loaded and not weight.equals(loaded[name], dtype):
            wrong.add(name)
        num_compared += weight.shape.numel()
        report(num_compared)
    if wrong:
        examples = ", ".join(sorted(wrong)[:3])
        raise _not_exported(f"differs from the checkpoint in {len(wrong)} weights, such as {examples}")


def _not_exported(reason: str) -> UserError:
    return UserError(
        "version of transformers",
        transformers.__version__,
        f"the folder that it writes for this architecture {reason}, so nothing was exported",
        "Export with another version of transformers",
    )


def _release_freed_memory() -> None:
    """Return freed blocks to the system: glibc keeps those below 32 MiB, and most weights are smaller."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _write_index(shards: list[Path], parameters: int, folder: Path) -> None:
    """Name the shards as Hugging Face does, and write the index that `from_pretrained` reads."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.rename(folder / name)
        with safe_open(folder / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
            total_size += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    index = {"metadata": {"total_parameters": parameters, "total_size": total_size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
