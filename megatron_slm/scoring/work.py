"""What is to be scored, in shards: stretches of rows that are computed, written and flushed together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_slm.types import Batch


class ScoringBatch(NamedTuple):
    """A batch, and the row of the file that each of its valid labels belongs to: int64 `[B, T]`."""

    batch: Batch
    row_BT: Tensor


class Shard(NamedTuple):
    """Rows `start` to `stop`, and the batches that fill them, each made on demand."""

    start: int
    stop: int
    batches: Sequence[Callable[[], ScoringBatch]]


class Work(Protocol):
    """One file's worth, the same whatever the number of ranks: batches depend on nothing but the settings."""

    rows: int
    num_shards: int

    def shard(self, number: int) -> Shard: ...
