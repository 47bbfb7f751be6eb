"""Floating-point operations of a token, and what the hardware could do at best."""

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

    The convention of PaLM (appendix B). Input embeddings are looked up, not multiplied; a tied
    one is the head, and counts. Only routed experts differ from what this counts.
    """
    weights = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TokenFlops(2.0 * weights + 4.0 * config.num_hidden_layers * width * seq_length)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known, as for any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in DENSE_BF16_PEAKS.items() if key in name), None)
