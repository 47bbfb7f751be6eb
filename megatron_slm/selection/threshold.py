"""The exact k-th largest score over all ranks, without gathering a score.

A float32 is mapped to an integer of the same order, and the k-th largest integer is found one
digit at a time: every rank counts the digits of its candidates, one all-reduce sums the counts,
and all ranks agree on the digit in which the k-th largest lies (radix selection). Three rounds
of 16 kB decide 32 bits, whatever the batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor

DIGIT_BITS = 11
KEY_BITS = 32


class Ranks:
    """The ranks that select together: sums and maxima over them.

    Args:
        group: a process group; None for the default group, or this process if there is none.
        alone: this process only, whatever the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self._group = group
        self._alone = alone or not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)

    def sum(self, value: Tensor) -> Tensor:
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if not self._alone:
            value = value.clone()
            dist.all_reduce(value, op=op, group=self._group)
        return value


def order_key(scores: Tensor) -> Tensor:
    """Integers in the order of the scores.

    -0.0 equals 0.0, and NaN lies below -inf: a token without a score is taken last.

    Args:
        scores: float tensor of any shape, ranked as float32.

    Returns:
        int64 of the same shape, in [0, 2**32).
    """
    values = scores.detach().float()
    bits = values.contiguous().view(torch.int32).long()
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, (1 << 31) - magnitude, (1 << 31) + magnitude)
    return keys.masked_fill(values.isnan(), 0)


def score_of_key(keys: Tensor) -> Tensor:
    """The float32 scores whose `order_key` these are; 0 gives NaN."""
    signed = keys - (1 << 31)
    bits = torch.where(signed < 0, -signed - (1 << 31), signed)
    scores = bits.to(torch.int32).view(torch.float32)
    return scores.masked_fill(keys == 0, torch.nan)


def kth_largest(keys_N: Tensor, k_K: Tensor, ranks: Ranks, bits: int = KEY_BITS) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest key over all ranks, for several k at once.

    Args:
        keys_N: int64 in [0, 2**bits), this rank's candidates; may be empty.
        k_K: int64, each between 1 and the number of keys of all ranks; equal on all ranks.
        ranks: who selects together.
        bits: width of the keys; ceil(bits / 11) all-reduces of K * 16 kB.

    Returns:
        int64 `[K]` each, equal on all ranks: the k-th largest key, how many of the keys that
        equal it belong to the k largest, and how many keys equal it.
    """
    prefix_K, wanted_K = torch.zeros_like(k_K), k_K
    equal_K = torch.zeros_like(k_K)
    for low in reversed(range(0, bits, DIGIT_BITS)):
        counts_KD = ranks.sum(torch.stack([_digit_counts(keys_N, prefix, low) for prefix in prefix_K]))
        above_KD = counts_KD.flip(-1).cumsum(-1).flip(-1) - counts_KD
        digit_K1 = (above_KD < wanted_K[:, None]).int().argmax(-1, keepdim=True)
        wanted_K = wanted_K - above_KD.gather(-1, digit_K1).squeeze(-1)
        equal_K = counts_KD.gather(-1, digit_K1).squeeze(-1)
        prefix_K = (prefix_K << DIGIT_BITS) + digit_K1.squeeze(-1)
    return prefix_K, wanted_K, equal_K


def _digit_counts(keys_N: Tensor, prefix: Tensor, low: int) -> Tensor:
    """How often each digit at bit `low` occurs among the keys that begin with `prefix`: int64 `[2**11]`."""
    size = 1 << DIGIT_BITS
    digit_N = (keys_N >> low) & (size - 1)
    outside_N = (keys_N >> (low + DIGIT_BITS)) != prefix
    return torch.bincount(digit_N.masked_fill(outside_N, size), minlength=size + 1)[:size]
