"""Floating-point operations of a token, and what the hardware could do at best."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

DENSE_BF16_PEAKS = {
    # Dense tensor-core peaks in FLOP/s, from NVIDIA's datasheets: SXM where the name says no more.
    # The sparse figures printed larger there are twice as high.
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs a token of one model: `forward`, and `training` (forward and a backward of twice that)."""

    forward: float

    @property
    def training(self) -> float:
        return 3 * self.forward


def token_flops(module: nn.Module, config: PretrainedConfig, seq_length: int) -> TokenFlops:
    """2 FLOPs a weight that multiplies, and 4 * layers * width * T of attention, not halved for causality.

    The convention of PaLM (appendix B). Embeddings are looked up, not multiplied; one that is
    tied is the head, and counts. All experts count, also those that a token is not routed to.
    """
    size = {id(parameter): getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()}
    looked_up = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    multiplied = {id(child.weight) for child in module.modules() if isinstance(child, nn.Linear)}
    weights = sum(size.values()) - sum(size[key] for key in looked_up - multiplied)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TokenFlops(2.0 * weights + 4.0 * config.num_hidden_layers * width * seq_length)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known, as for any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in DENSE_BF16_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
