"""The order of samples: the tokens of sample number n of a run, with the offset of each token in its corpus.

The order is a function of (seed, blend, split, keep-list, seq_length, order_tokens) alone. megatron-core's indices
depend on how many samples are requested, so `order_tokens` fixes that number: one *cycle*. Training beyond it
continues with the next cycle, which has its own seed.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_slm.data.corpus import Corpus, open_mask
from megatron_slm.data.keep_list import KeptDocuments, refuse_empty_split
from megatron_slm.data.megatron import PackedDocuments, build_packed_documents
from megatron_slm.data.settings import DataSettings, blend, train_share
from megatron_slm.dist import World
from megatron_slm.errors import AgreedError
from megatron_slm.io.files import hold

ORDER_FORMAT = 1
"""Increment it when the same settings give a different order than before."""


class Sample(NamedTuple):
    """`T + 1 = seq_length + 1` consecutive tokens of the packed stream; the last one is only a label.

    text       int64 `[T + 1]`, the tokens
    offset     int64 `[T + 1]`, the offset in tokens of each token in its corpus's `.bin`
    position   int64 `[T + 1]`, counted from the last document start within the sample
    source     index of the corpus in the blend
    continued  tokens at the beginning that continue a document from before the sample; 0 if a document begins there
    valid      bool `[T + 1]`, True for tokens that count toward the loss; None if all of them count
    """

    text: NDArray[np.int64]
    offset: NDArray[np.int64]
    position: NDArray[np.int64]
    source: int
    continued: int = 0
    valid: NDArray[np.bool_] | None = None


class Samples:
    """The samples of a run; each is read by its ordinal, in O(1).

    Args:
        build_cycle: builds the dataset of a cycle from its number, counted from 0; every rank calls it.
        cycle_length: samples per cycle.
        fingerprint: SHA-256 of everything that the order depends on.
        masks: uint8 `[num_tokens]` per corpus of the blend, 1 for tokens that count toward the loss; None if all do.
    """

    def __init__(
        self,
        build_cycle: Callable[[int], PackedDocuments],
        cycle_length: int,
        fingerprint: str,
        masks: Sequence[NDArray[np.uint8] | None],
    ) -> None:
        self._build_cycle = build_cycle
        self._cycles: list[PackedDocuments] = []
        self._cycle_length = cycle_length
        self._masks = masks
        self.fingerprint = fingerprint

    def reach(self, total_samples: int) -> None:
        """Build the cycles that the first `total_samples` samples need; every rank calls it."""
        while len(self) < total_samples:
            self._cycles.append(self._build_cycle(len(self._cycles)))

    def __len__(self) -> int:
        return len(self._cycles) * self._cycle_length

    def __getitem__(self, ordinal: int) -> Sample:
        cycle, index = divmod(ordinal, self._cycle_length)
        item = self._cycles[cycle][index]
        # megatron-core does not blend a single corpus, so its items have no `dataset_id`.
        source = int(item.get("dataset_id", 0))
        mask = self._masks[source]
        # The mask is addressed like the `.bin`, because packing cuts and joins documents.
        valid = None if mask is None else mask[item["offset"]].astype(bool)
        return Sample(item["text"], item["offset"], item["position"], source, item["continued"], valid)


def build_samples(
    settings: DataSettings,
    corpora: list[Corpus],
    *,
    seed: int,
    order_tokens: int,
    total_samples: int,
    cache: Path,
    world: World,
    kept: Sequence[KeptDocuments] | None = None,
) -> Samples:
    """Return the samples of a run; every rank calls it, and rank 0 builds missing indices.

    Args:
        settings: the blend, the split and the sequence length.
        corpora: the opened corpora, in the order of the blend.
        seed: seed of the order.
        order_tokens: length of a cycle in tokens.
        total_samples: samples that the run reads, including those that it skips.
        cache: folder for the indices, on a file system that all ranks share.
        world: the rank and world size of this process.
        kept: the documents of each corpus that are trained on; None if there is no keep-list.

    Raises:
        AgreedError: see `check_order`.
    """
    check_order(settings, corpora, total_samples)
    cycle_length = math.ceil(order_tokens / settings.seq_length)
    fingerprint = order_fingerprint(settings, corpora, seed, order_tokens, kept)
    kept_of = {corpus.prefix: part.documents for corpus, part in zip(corpora, kept, strict=True)} if kept else {}

    def build_cycle(cycle: int) -> PackedDocuments:
        # The name identifies the contents, so runs with the same order can share a cache.
        folder = cache / f"{fingerprint[:16]}-{cycle}"
        with _alone_in(folder) if world.is_main else nullcontext():
            if dist.is_initialized():
                dist.barrier()  # Rank 0 holds the cache before any rank reads it.
            return build_packed_documents(
                [corpus.prefix for corpus in corpora],
                _weights(settings, corpora, kept),
                split=settings.split,
                kept=kept_of,
                seq_length=settings.seq_length,
                num_samples=cycle_length,
                seed=cycle_seed(seed, cycle),
                cache=folder,
            )

    samples = Samples(build_cycle, cycle_length, fingerprint, [open_mask(corpus) for corpus in corpora])
    samples.reach(total_samples)
    return samples


def order_fingerprint(
    settings: DataSettings,
    corpora: list[Corpus],
    seed: int,
    order_tokens: int,
    kept: Sequence[KeptDocuments] | None = None,
) -> str:
    """Return the SHA-256 of everything that the order depends on; the arguments are those of `build_samples`."""
    identity: dict[str, Any] = {
        "format": ORDER_FORMAT,
        "seed": seed,
        # Checksums and not paths, because a corpus may move between two runs.
        "blend": [_weights(settings, corpora, kept), [corpus.sha256 for corpus in corpora]],
        "split": settings.split,
        "seq_length": settings.seq_length,
        "order_tokens": order_tokens,
    }
    if kept is not None:  # Without one, the fingerprint is the same as before keep-lists existed.
        identity["keep"] = [hashlib.sha256(np.packbits(part.documents).tobytes()).hexdigest() for part in kept]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def cycle_seed(seed: int, cycle: int) -> int:
    """Return the seed of a cycle for NumPy, below 2**32."""
    # A hash, because with `seed + cycle`, cycle 1 of seed 1 would equal cycle 0 of seed 2.
    return int.from_bytes(hashlib.sha256(f"{seed}:{cycle}".encode()).digest()[:4], "big")


def tokens_per_epoch(settings: DataSettings, corpora: Sequence[Corpus], kept: Sequence[KeptDocuments] | None) -> float:
    """Return the number of tokens in one pass over the training documents.

    With a split and no keep-list this is an estimate: the split's share of all tokens.
    """
    share = train_share(settings.split) if kept is None else 1.0
    return share * sum(_num_tokens(corpora, kept))


def check_order(settings: DataSettings, corpora: list[Corpus], total_samples: int) -> None:
    """Raise a UserError if there is nothing to train on; the arguments are those of `build_samples`.

    Raises:
        AgreedError: the split gives no document of a corpus to training, or the run skips more samples than it trains
            on.
    """
    refuse_empty_split(settings, corpora)
    skipped = end = 0
    for first, last in sorted(settings.skip_samples):
        # Ranges may overlap; `end` is the end of those before, so that no sample is counted twice.
        skipped += max(0, last - max(first, end))
        end = max(end, last)
    if skipped > total_samples:
        reason = f"it skips {skipped} samples, more than the {total_samples} that the run trains on"
        raise AgreedError("data.skip_samples", settings.skip_samples, reason, "Use the ranges that spikes.jsonl lists")


def _weights(settings: DataSettings, corpora: list[Corpus], kept: Sequence[KeptDocuments] | None) -> list[float]:
    _, weights = blend(settings.train)
    # In proportion to their tokens, so that no corpus is repeated more often than another.
    return weights or [float(tokens) for tokens in _num_tokens(corpora, kept)]


def _num_tokens(corpora: Sequence[Corpus], kept: Sequence[KeptDocuments] | None) -> list[int]:
    return [part.num_tokens for part in (corpora if kept is None else kept)]


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    """Lock a cache while it is built or read; first empty it if the process that built it was killed."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    complete = cache / "complete"
    with hold(cache.with_name(f"{cache.name}.lock")):
        if not complete.exists():
            shutil.rmtree(cache, ignore_errors=True)
        yield
        # Created last, so a cache without it is partial.
        complete.touch()
