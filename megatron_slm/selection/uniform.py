"""Random numbers that belong to a token, not to a process."""

import torch
from torch import Tensor


def token_uniform(seed: int, sample_index_B: Tensor, length: int) -> Tensor:
    """Uniform numbers in (0, 1) hashed from (seed, sample index, position).

    Args:
        seed: the run's seed.
        sample_index_B: int64, ordinals of the samples in the run's order.
        length: positions a sample, T.

    Returns:
        float32 `[B, T]`, the same whichever rank or micro-batch holds the sample. 23 bits, so
        that neither 0 nor 1 can occur.
    """
    position_T = torch.arange(length, device=sample_index_B.device)
    key_B = _mix(sample_index_B.long() + _mix(torch.tensor(seed, device=sample_index_B.device)))
    bits_BT = _mix(key_B[:, None] ^ _mix(position_T + 1)) >> 41
    return ((bits_BT & 0x7FFFFF).double() + 0.5).div(1 << 23).float()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), in wrapping int64 arithmetic."""
    x = x + _int64(0x9E3779B97F4A7C15)
    x = (x ^ _logical_shift(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift(x, 27)) * _int64(0x94D049BB133111EB)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64)
