"""The exact k-th largest score over all ranks, without gathering the scores.

Each float32 score is mapped to an integer *key* of the same order. Radix selection finds the k-th largest key one digit
at a time, from the most significant digit on: each rank counts the digits of its candidates, one all-reduce sums the
counts, and all ranks read the next digit of the k-th largest key from the sums. Three all-reduces of 16 kB decide all
32 bits, for a batch of any size.

Suffixes: N keys of this rank, K values of k, D digits.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

DIGIT_BITS = 11
"""Bits per digit: 32 bits take three rounds, and the counts of a round are small."""
KEY_BITS = 32


class Ranks:
    """The ranks that select together, and their sums and maxima.

    Args:
        group: process group; None for the default group, or for this process alone if there is none.
        alone: True for this process alone, even if there is a group.
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
    """Return integers in the order of the scores.

    -0.0 equals 0.0, and NaN lies below -inf, so that a token without a score is selected last.

    Args:
        scores: float tensor of any shape, ranked as float32.

    Returns:
        int64 of the same shape, in [0, 2**32).
    """
    values = scores.detach().float()
    bits = values.contiguous().view(torch.int32).long()
    # IEEE 754 stores sign and magnitude, and magnitudes are in the order of their bits: count up from the middle for
    # positive scores, and down for negative ones.
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, (1 << 31) - magnitude, (1 << 31) + magnitude)
    return keys.masked_fill(values.isnan(), 0)


def score_of_key(keys: Tensor) -> Tensor:
    """Return the float32 scores that have these keys; key 0 gives NaN."""
    signed = keys - (1 << 31)
    bits = torch.where(signed < 0, -signed - (1 << 31), signed)
    scores = bits.to(torch.int32).view(torch.float32)
    return scores.masked_fill(keys == 0, torch.nan)


class KthLargest(NamedTuple):
    """The k-th largest keys over all ranks: int64 `[K]` each, equal on all ranks.

    key          the k-th largest key
    num_wanted   how many of the keys that equal it belong to the k largest
    num_equal    how many keys equal it
    """

    key: Tensor
    num_wanted: Tensor
    num_equal: Tensor


def first_digit_counts(keys_N: Tensor) -> Tensor:
    """Return the count of each first digit among this rank's keys, for `kth_largest`: int64 `[2**11]`."""
    low_bit = (KEY_BITS - 1) // DIGIT_BITS * DIGIT_BITS
    return _digit_counts(keys_N, keys_N.new_zeros(1), low_bit)[0]


def kth_largest(
    keys_N: Tensor, k_K: Tensor, ranks: Ranks, bits: int = KEY_BITS, first_counts_D: Tensor | None = None
) -> KthLargest:
    """Return the k-th largest key over all ranks, for several k at once; every rank calls it.

    Args:
        keys_N: int64 in [0, 2**bits), this rank's candidates; may be empty.
        k_K: int64, each between 1 and the number of keys of all ranks; equal on all ranks.
        ranks: the ranks that select together.
        bits: width of the keys. The search takes ceil(bits / 11) all-reduces of K * 16 kB.
        first_counts_D: `first_digit_counts` of all ranks, if they are summed already, which saves an all-reduce.
    """
    # Invariant: the k-th largest key begins with the digits in `prefix_K`, and it is the `wanted_K`-th largest of the
    # keys with this prefix.
    prefix_K = torch.zeros_like(k_K)
    wanted_K = k_K
    equal_K = torch.zeros_like(k_K)
    digit_positions = range(0, bits, DIGIT_BITS)
    for low_bit in reversed(digit_positions):
        if first_counts_D is not None and low_bit == digit_positions[-1]:
            counts_KD = first_counts_D.expand(len(k_K), -1)
        else:
            counts_KD = ranks.sum(_digit_counts(keys_N, prefix_K, low_bit))
        # For each digit D, the candidates of all ranks with a larger digit.
        larger_KD = counts_KD.flip(-1).cumsum(-1).flip(-1) - counts_KD
        # The k-th largest key has the lowest digit that fewer than `wanted` candidates exceed.
        digit_K1 = (larger_KD < wanted_K[:, None]).int().argmax(-1, keepdim=True)
        wanted_K = wanted_K - larger_KD.gather(-1, digit_K1).squeeze(-1)
        equal_K = counts_KD.gather(-1, digit_K1).squeeze(-1)
        prefix_K = (prefix_K << DIGIT_BITS) + digit_K1.squeeze(-1)
    return KthLargest(prefix_K, wanted_K, equal_K)


def _digit_counts(keys_N: Tensor, prefix_K: Tensor, low_bit: int) -> Tensor:
    """Return the count of each digit at `low_bit` among the keys that begin with each prefix: int64 `[K, 2**11]`."""
    size = 1 << DIGIT_BITS
    digit_N = (keys_N >> low_bit) & (size - 1)
    outside_KN = (keys_N >> (low_bit + DIGIT_BITS)) != prefix_K[:, None]
    # Other keys go to an extra bin, which is cut off. A boolean mask would make the host wait for the device.
    digit_KN = digit_N.masked_fill(outside_KN, size)
    # Each prefix has its own bins, so that one pass counts the digits for all of them.
    num_prefixes = len(prefix_K)
    first_bin_K1 = (size + 1) * torch.arange(num_prefixes, device=keys_N.device)[:, None]
    counts = torch.bincount((first_bin_K1 + digit_KN).flatten(), minlength=num_prefixes * (size + 1))
    return counts.view(num_prefixes, size + 1)[:, :size]
