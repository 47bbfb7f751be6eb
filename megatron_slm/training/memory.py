"""The memory that a rank will hold, estimated before anything is loaded. Nothing is refused for it.

One CPU rank with 135M parameters at stage 3 and 256 tokens per sample took, above what importing the libraries takes,
4.8 and 6.2 GiB under clm at micro-batches of 1 and 4, and 5.4 GiB under slm at 1. The estimates are 5.0, 6.3 and 5.7.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.models.head import CHUNK_BYTES
from megatron_slm.training.flops import TokenFlops, token_flops

LIVE_PARAMETERS, REDUCE_BUCKET = 1_000_000_000, 500_000_000
"""DeepSpeed's defaults of stage3_max_live_parameters and reduce_bucket_size, in parameters."""

SUB_GROUP = 1_000_000_000
"""DeepSpeed's default of sub_group_size, the parameters that one update at stage 3 takes at a time."""

OFFLOADS = {"offload_optimizer": ("optimizer", "gradients"), "offload_param": ("weights",)}
"""Keys of `zero_optimization`, and what each moves to the host."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: on its device, and moved to the host by DeepSpeed's offload, each by what they are for."""

    device: dict[str, int]
    host: dict[str, int]


@dataclass(frozen=True)
class ModelSize:
    """Of one model, from its configuration alone: no weight is made.

    parameters        all of them
    layers            decoder layers
    layer_bytes       what one layer keeps for the backward of one micro-batch
    boundary_bytes    the hidden states of one micro-batch
    cache_bytes       keys and values of one layer for one micro-batch
    head_bytes        the head's chunk of logits, its exponentials and their gradient
    flops             of a token
    """

    parameters: int
    layers: int
    layer_bytes: int
    boundary_bytes: int
    cache_bytes: int
    head_bytes: int
    flops: TokenFlops


def model_size(config: PretrainedConfig, samples: int, seq_length: int, precision: torch.dtype) -> ModelSize:
    """Build one and two layers on PyTorch's meta device and see what the second keeps for the backward.

    Args:
        config: of the whole model.
        samples: sequences of a micro-batch.
        seq_length: tokens of each.
        precision: of weights and activations.
    """
    layers = config.num_hidden_layers
    with FakeTensorMode():
        one, two = (_kept(_on_meta(config, n, precision), samples, seq_length) for n in (1, 2))
        whole = _on_meta(config, layers, precision)
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    boundary = samples * seq_length * config.hidden_size * precision.itemsize
    head = 3 * min(CHUNK_BYTES, 4 * samples * seq_length * config.vocab_size)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * samples * seq_length * groups * width * precision.itemsize
    return ModelSize(parameters, layers, two - one, boundary, cache, head, token_flops(whole, config, seq_length))


def _on_meta(config: PretrainedConfig, layers: int, precision: torch.dtype) -> PreTrainedModel:
    """The model with so many layers; no memory is taken and nothing is initialised."""
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        smaller.layer_types = (config.layer_types * layers)[:layers]
    return AutoModelForCausalLM.from_config(smaller, dtype=precision)


def _kept(model: PreTrainedModel, samples: int, seq_length: int) -> int:
    """Bytes that a forward without the head keeps for its backward, weights and T x T matrices aside.

    Fused attention keeps no T x T matrix; where attention is not fused, the true figure is higher.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tensor.shape[-2:] != (seq_length, seq_length):
            storages[storage._cdata] = storage.nbytes()
        kept_alive.append(tensor)
        return tensor

    kept_alive: list[torch.Tensor] = []
    tokens_BT = torch.zeros(samples, seq_length, dtype=torch.long)
    with saved_tensors_hooks(see, lambda tensor: tensor):
        model.base_model(input_ids=tokens_BT, use_cache=False)
    return sum(storages.values())


def rank_memory(
    student: ModelSize,
    references: Sequence[tuple[ModelSize, bool]],
    *,
    ranks: int,
    precision: torch.dtype,
    zero: Mapping[str, Any],
    checkpointing: bool,
    replayed: float | None = None,
    fused: bool = True,
) -> RankMemory:
    """Return what one of `ranks` holds at its fullest.

    A GPU is fullest in the backward. A CPU is so in the update, because the system does not get back what the
    activations took.

    Args:
        student: size of the model, at its micro-batch.
        references: sizes of the models that run along, each at its own micro-batch, and whether it is sharded.
        ranks: of the run.
        precision: of weights and activations.
        zero: DeepSpeed's `zero_optimization` section.
        checkpointing: each layer is recomputed in the backward.
        replayed: share of the tokens that replay runs again, over keys and values of all; None without it.
        fused: the optimizer updates in one kernel, as on CUDA, and makes no temporary tensors.
    """
    stage = int(zero.get("stage", 3))
    each = precision.itemsize
    kept = student.boundary_bytes if checkpointing else student.layer_bytes
    if replayed is not None:
        kept = int(replayed * kept) + student.cache_bytes
    # One layer more: recomputed, or the gradients of what it keeps.
    device = {
        "weights": each * student.parameters // (ranks if stage == 3 else 1),
        "gradients": 4 * student.parameters // (ranks if stage >= 2 else 1),
        # AdamW's two moments; with ZeRO also DeepSpeed's float32 copy of the weights.
        "optimizer": (12 if stage else 8) * student.parameters // (ranks if stage else 1),
        "activations": student.layers * kept + student.layer_bytes,
        "head": student.head_bytes,
        "buffers of ZeRO": _buffers(student.parameters, each, stage, zero) if stage else 0,
        "update": 0 if fused else _update(student.parameters // (ranks if stage else 1), stage, zero),
    }
    device["reference"] = 0
    for reference, sharded in references:
        share = ranks if sharded else 1
        gathered = each * min(reference.parameters, _live(zero)) if share > 1 else 0
        device["reference"] += each * reference.parameters // share + gathered + reference.layer_bytes
    offloaded = [name for key, names in OFFLOADS.items() if _is_offloaded(zero, key) for name in names]
    return RankMemory(
        {name: size for name, size in device.items() if size and name not in offloaded},
        {name: device[name] for name in offloaded},
    )


def _buffers(parameters: int, each: int, stage: int, zero: Mapping[str, Any]) -> int:
    """Gathered weights in use, and gradients on their way to their owners."""
    bucket = each * min(parameters, int(zero.get("reduce_bucket_size", REDUCE_BUCKET)))
    return bucket + (each * min(parameters, _live(zero)) if stage == 3 else 0)


def _update(partition: int, stage: int, zero: Mapping[str, Any]) -> int:
    """Return the two float32 tensors that AdamW makes for each flat partition of ZeRO; weights alone are small."""
    return 8 * min(partition, int(zero.get("sub_group_size", SUB_GROUP))) if stage else 0


def _live(zero: Mapping[str, Any]) -> int:
    return int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))


def _is_offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"
