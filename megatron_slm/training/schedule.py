"""The learning rate as a function of the tokens that were trained on, so that resuming needs no state."""

import math
from typing import Literal


def learning_rate(
    tokens: int,
    *,
    train_tokens: int,
    warmup_tokens: int,
    lr: float,
    min_lr: float,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """The rate of the step that ends at `tokens`: linear from 0 to `lr`, then down to `min_lr` at `train_tokens`."""
    if tokens < warmup_tokens:
        return lr * tokens / warmup_tokens
    if schedule == "constant":
        return lr
    progress = min(1.0, (tokens - warmup_tokens) / max(1, train_tokens - warmup_tokens))
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min_lr + (lr - min_lr) * remaining
