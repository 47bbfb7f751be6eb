"""A run's samples as they are trained, in one order: its scores serve that order alone."""

from functools import partial

from megatron_slm.data.loader import make_batch
from megatron_slm.data.samples import Samples
from megatron_slm.scoring.work import ScoringBatch, Shard

CONTEXT = (
    "Each token in the sample that it is trained in: {length} tokens of consecutive documents, {attention}; the first "
    "label of a sample is predicted from one token."
)


class PackedWork:
    """See `Work`: a row is `sample * seq_length + position` of the run's order.

    Args:
        samples: of the run.
        num_samples: of the order, from its beginning.
        seq_length: tokens a sample, T.
        micro_batch_size: samples a batch.
        shard_tokens: a shard, in whole batches.
        reset_attention: positions restart at each document.
    """

    def __init__(
        self,
        samples: Samples,
        num_samples: int,
        seq_length: int,
        micro_batch_size: int,
        shard_tokens: int,
        reset_attention: bool,
    ) -> None:
        self.rows = num_samples * seq_length
        self._samples = samples
        self._num_samples = num_samples
        self._seq_length = seq_length
        self._micro_batch_size = micro_batch_size
        self._reset_attention = reset_attention
        self._shard_samples = max(1, shard_tokens // (seq_length * micro_batch_size)) * micro_batch_size
        self.num_shards = -(-num_samples // self._shard_samples)

    def shard(self, number: int) -> Shard:
        first = number * self._shard_samples
        last = min(first + self._shard_samples, self._num_samples)
        starts = range(first, last, self._micro_batch_size)
        batches = [partial(self._batch, start, min(start + self._micro_batch_size, last)) for start in starts]
        return Shard(first * self._seq_length, last * self._seq_length, batches)

    def _batch(self, first: int, last: int) -> ScoringBatch:
        ordinals = list(range(first, last))
        batch = make_batch([self._samples[n] for n in ordinals], ordinals, self._reset_attention)
        return ScoringBatch(batch, batch.token_position_BT)
