"""The speed of this machine's CPU, measured in a few seconds."""

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from megatron_slm.planning.time import Rates

SECONDS, PASSES = 0.4, 3
"""Shortest duration of one measurement, and how often all of them are repeated: other work may disturb one pass."""
COPIED_BYTES = 1 << 28
MOST_PRODUCT, MOST_WIDTH = 1 << 36, 1 << 14
"""FLOPs of the largest product that is measured (a second at 64 GFLOP/s), and the largest width of its weight."""


def measured_rates(tokens: int, width: int, inner: int, heads: int, seq_length: int) -> Rates:
    """Return the float32 speed of this CPU at the shapes of a model.

    Args:
        tokens: tokens per micro-batch.
        width: hidden size of the model.
        inner: inner size of its MLP.
        heads: heads of its attention.
        seq_length: tokens per sample.
    """
    passes = [
        (_products(tokens, width, inner), _attention(heads, width // heads, seq_length), _copies(), _fresh_writes())
        for _ in range(PASSES)
    ]
    return Rates(*(max(speeds) for speeds in zip(*passes, strict=True)))


def _products(tokens: int, width: int, inner: int) -> float:
    """Return the FLOP/s of the three products of a linear layer's forward and backward."""
    width, inner = min(width, MOST_WIDTH), min(inner, MOST_WIDTH)
    tokens = max(1, min(tokens, MOST_PRODUCT // (6 * width * inner)))
    hidden_ND, weight_FD, grad_NF = torch.randn(tokens, width), torch.randn(inner, width), torch.randn(tokens, inner)

    def products() -> None:
        F.linear(hidden_ND, weight_FD)
        grad_NF @ weight_FD
        grad_NF.T @ hidden_ND

    return 6.0 * tokens * width * inner / _seconds(products)


def _attention(heads: int, head_width: int, seq_length: int) -> float:
    """Return the FLOP/s of the forward and backward of attention, counted as in `token_flops`."""
    query, key, value = (torch.randn(1, heads, seq_length, head_width, requires_grad=True) for _ in range(3))

    def forward_and_backward() -> None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(output, (query, key, value), torch.ones_like(output))

    return 12.0 * heads * head_width * seq_length * seq_length / _seconds(forward_and_backward)


def _copies() -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source))


def _fresh_writes() -> float:
    """Return the bytes per second that are written to a block so large that glibc maps it anew each time."""
    return COPIED_BYTES / _seconds(lambda: torch.ones(COPIED_BYTES // 4))


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of at least three calls, after one that is not timed."""
    work()
    fastest, began, calls = float("inf"), time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
        calls += 1
    return fastest
