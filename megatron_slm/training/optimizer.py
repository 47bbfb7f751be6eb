"""The optimizer (AdamW, with weight decay on matrices only) and its learning rate."""

import math
from typing import Literal

import torch
from torch import nn

from megatron_slm.backend.deepspeed_internals import whole_shape
from megatron_slm.training.settings import TrainingSettings


def adamw(module: nn.Module, settings: TrainingSettings, device: torch.device) -> torch.optim.AdamW:
    """Build the optimizer of a model.

    Args:
        module: the student. Its parameters may be partitioned, and may still be in host memory.
        settings: learning rate, betas, epsilon and weight decay.
        device: the device on which the engine will hold the parameters. On CUDA, the update is one fused kernel per
            partition.
    """
    decayed, kept = decay_groups(module)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True if device.type == "cuda" else None,
    )


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters with weight decay, and those without: norms, biases and embeddings, even if tied."""
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in module.parameters():
        shape = whole_shape(parameter)
        (kept if len(shape) < 2 or id(parameter) in embeddings else decayed).append(parameter)
    return decayed, kept


def learning_rate(
    tokens: int,
    *,
    train_tokens: int,
    warmup_tokens: int,
    lr: float,
    min_lr: float,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """Return the learning rate of the step that ends after `tokens`.

    It rises linearly from 0 to `lr` over the warm-up. It then falls to `min_lr` at `train_tokens`, or stays constant.
    """
    if tokens < warmup_tokens:
        return lr * tokens / warmup_tokens
    if schedule == "constant":
        return lr
    progress = min(1.0, (tokens - warmup_tokens) / max(1, train_tokens - warmup_tokens))
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min_lr + (lr - min_lr) * remaining
