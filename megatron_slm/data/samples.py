"""Which tokens make sample number n of a run: megatron-core's packing and blending, with every token's address.

The order is a function of (seed, blend, split, keep-list, seq_length, order_tokens) alone. megatron-core's
indices depend on how many samples are asked for, so that number is fixed by `order_tokens`: one
*cycle*. Training beyond it goes on with the next cycle, which has a seed of its own.

The split comes first: it divides all documents of a corpus, as in megatron-core, and the keep-list leaves some
of those that it gives to training. So what is held out is the same with a keep-list and without.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_slm.data.corpus import Corpus, count_tokens, open_mask
from megatron_slm.data.keep_list import open_keep_list
from megatron_slm.data.settings import DataSettings, blend, train_share
from megatron_slm.dist import World
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.io.files import hold

ORDER_FORMAT = 1
"""Raised when the same settings would give another order than before."""

WHOLE = "1,0,0"
"""The split that takes all documents."""


class Sample(NamedTuple):
    """`seq_length + 1` consecutive tokens of the packed stream, the last one only as a label.

    text       int64 `[T + 1]`
    offset     int64 `[T + 1]`, offset in tokens in the source's `.bin`
    position   int64 `[T + 1]`, counted from the last document start within the sample
    source     entry of the blend
    continued  tokens at the beginning that continue a document from before the sample; 0 if a document begins there
    valid      bool `[T + 1]`, whether a token counts; None where all of them do
    """

    text: NDArray[np.int64]
    offset: NDArray[np.int64]
    position: NDArray[np.int64]
    source: int
    continued: int = 0
    valid: NDArray[np.bool_] | None = None


class Kept(NamedTuple):
    """What a keep-list leaves of one corpus: bool `[num_documents]`, within the split, and tokens in these."""

    documents: NDArray[np.bool_]
    num_tokens: int


def kept_documents(settings: DataSettings, corpora: Sequence[Corpus]) -> list[Kept] | None:
    """What is left of each corpus; None where there is no keep-list.

    Raises:
        UserError: it cannot be read, is of other corpora, or leaves nothing of one.
    """
    if settings.keep is None:
        return None
    _refuse_empty_split(settings, corpora)
    keep_list = open_keep_list(settings.keep)
    kept = [_kept(keep_list.documents(corpus), corpus, settings.split) for corpus in corpora]
    for corpus, part in zip(corpora, kept, strict=True):
        if part.num_tokens < 1:
            raise UserError(
                f"data.keep is {settings.keep}, which keeps no document of {corpus.prefix} among those that data.split "
                "gives to training: raise filter.keep, or leave this corpus out of data.train."
            )
    return kept


def _kept(documents: NDArray[np.bool_], corpus: Corpus, split: str | None) -> Kept:
    documents[_split_documents(corpus, split) :] = False
    return Kept(documents, count_tokens(corpus, documents))


@dataclass
class OrderConfig(GPTDatasetConfig):  # type: ignore[misc]  # megatron-core has no types
    """megatron-core's configuration, and which documents of a PREFIX are kept; all of one that is not named."""

    kept: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


class PackedDocuments(GPTDataset):  # type: ignore[misc]
    """megatron-core's packed samples, with document ids and offsets kept, and of kept documents alone."""

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str,
        indexed_indices: NDArray[np.int32],
        num_samples: int,
        index_split: Split,
        config: OrderConfig,
    ) -> None:
        if dataset_path in config.kept:
            indexed_indices = indexed_indices[config.kept[dataset_path][indexed_indices]]
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self.shuffle_index[index])
        first, begin = (int(value) for value in self.sample_index[place])
        last, end = (int(value) for value in self.sample_index[place + 1])
        texts, offsets, positions = [], [], []
        for entry in range(first, last + 1):
            document = int(self.document_index[entry])
            start = begin if entry == first else 0
            stop = end + 1 if entry == last else int(self.dataset.sequence_lengths[document])
            texts.append(self.dataset.get(document, offset=start, length=stop - start))
            offsets.append(self._document_offset(document) + np.arange(start, stop))
            positions.append(np.arange(stop - start))
        return {
            "text": np.concatenate(texts, dtype=np.int64),
            "offset": np.concatenate(offsets),
            "position": np.concatenate(positions),
            "continued": len(texts[0]) if begin > 0 else 0,
        }

    def _document_offset(self, document: int) -> int:
        return int(self.dataset.index.sequence_pointers[document] // self.dataset.index.dtype_size)


class Samples:
    """The samples of a run by ordinal, in O(1).

    Args:
        build_cycle: the dataset of cycle number 0, 1, and so on; every rank calls it.
        cycle_length: samples taken from each.
        fingerprint: of everything that the order depends on.
        masks: uint8 of each entry of the blend, by offset; None for one whose tokens all count.
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
        """Build the cycles of so many samples that are not there yet; every rank calls it."""
        while len(self) < total_samples:
            self._cycles.append(self._build_cycle(len(self._cycles)))

    def __len__(self) -> int:
        return len(self._cycles) * self._cycle_length

    def __getitem__(self, ordinal: int) -> Sample:
        cycle, index = divmod(ordinal, self._cycle_length)
        item = self._cycles[cycle][index]
        # A blend of one corpus is that corpus's dataset itself, which names no source.
        source = int(item.get("dataset_id", 0))
        mask = self._masks[source]
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
    kept: Sequence[Kept] | None = None,
) -> Samples:
    """The run's samples; every rank calls it, rank 0 builds the indices.

    Args:
        settings: the blend, the split and the sequence length.
        corpora: opened, in the order of the blend.
        seed: of the order.
        order_tokens: length of a cycle in tokens.
        total_samples: as far as this run will go.
        cache: folder that all ranks see; built indices are kept there.
        world: this process among all.
        kept: what a keep-list leaves of each corpus; None: there is none.

    Raises:
        AgreedError: as `check_order`.
    """
    check_order(settings, corpora, total_samples)
    cycle_length = math.ceil(order_tokens / settings.seq_length)
    fingerprint = order_fingerprint(settings, corpora, seed, order_tokens, kept)

    def build_cycle(cycle: int) -> PackedDocuments:
        folder = cache / f"{fingerprint[:16]}-{cycle}"
        return _build_cycle(settings, corpora, kept, cycle_seed(seed, cycle), cycle_length, folder, world)

    samples = Samples(build_cycle, cycle_length, fingerprint, [open_mask(corpus) for corpus in corpora])
    samples.reach(total_samples)
    return samples


def order_fingerprint(
    settings: DataSettings,
    corpora: list[Corpus],
    seed: int,
    order_tokens: int,
    kept: Sequence[Kept] | None = None,
) -> str:
    """sha256 of everything that the order of samples depends on; the arguments are those of `build_samples`."""
    identity: dict[str, Any] = {
        "format": ORDER_FORMAT,
        "seed": seed,
        "blend": [_weights(settings, corpora, kept), [corpus.sha256 for corpus in corpora]],
        "split": settings.split,
        "seq_length": settings.seq_length,
        "order_tokens": order_tokens,
    }
    if kept is not None:  # Orders from before there were keep-lists have their fingerprints.
        identity["keep"] = [hashlib.sha256(np.packbits(part.documents).tobytes()).hexdigest() for part in kept]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def cycle_seed(seed: int, cycle: int) -> int:
    """A seed for NumPy, below 2**32. Hashed, or a cycle would be the cycle before of the next seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{cycle}".encode()).digest()[:4], "big")


def tokens_per_epoch(settings: DataSettings, corpora: Sequence[Corpus], kept: Sequence[Kept] | None) -> float:
    """Tokens of one pass over what is trained on; under a split its share of all tokens, unless they are counted."""
    share = train_share(settings.split) if kept is None else 1.0
    return share * sum(_num_tokens(corpora, kept))


def check_order(settings: DataSettings, corpora: list[Corpus], total_samples: int) -> None:
    """Look for what would leave nothing to train on; the arguments are those of `build_samples`.

    Raises:
        AgreedError: the split leaves a corpus without a document, or more is left out than trained on.
    """
    _refuse_empty_split(settings, corpora)
    _refuse_to_skip_more(settings.skip_samples, total_samples)


def _refuse_empty_split(settings: DataSettings, corpora: Sequence[Corpus]) -> None:
    """megatron-core would look for a first sample for ever."""
    for corpus in corpora:
        if _split_documents(corpus, settings.split) < 1:
            raise AgreedError(
                f"data.split is '{settings.split}', which leaves none of the {corpus.num_documents} documents of "
                f"{corpus.prefix} for training: give the first part a larger share."
            )


def _split_documents(corpus: Corpus, split: str | None) -> int:
    """The first so many documents are for training; counted as megatron-core does."""
    return round(float(parse_and_normalize_split(split or WHOLE)[0]) * corpus.num_documents)


def _refuse_to_skip_more(skip: list[tuple[int, int]], total_samples: int) -> None:
    skipped = end = 0
    for first, last in sorted(skip):  # ranges may overlap
        skipped += max(0, last - max(first, end))
        end = max(end, last)
    if skipped > total_samples:
        raise AgreedError(
            f"data.skip_samples leaves out {skipped} samples, more than the {total_samples} that the run trains on: "
            "they are ordinals of samples, as spikes.jsonl names them."
        )


def _weights(settings: DataSettings, corpora: list[Corpus], kept: Sequence[Kept] | None) -> list[float]:
    _, weights = blend(settings.train)
    return weights or [float(tokens) for tokens in _num_tokens(corpora, kept)]


def _num_tokens(corpora: Sequence[Corpus], kept: Sequence[Kept] | None) -> list[int]:
    return [part.num_tokens for part in (corpora if kept is None else kept)]


def _build_cycle(
    settings: DataSettings,
    corpora: list[Corpus],
    kept: Sequence[Kept] | None,
    seed: int,
    length: int,
    cache: Path,
    world: World,
) -> PackedDocuments:
    """One cycle's dataset: rank 0 builds the indices if they are not there, then all ranks map them."""
    prefixes = [corpus.prefix for corpus in corpora]
    config = OrderConfig(
        random_seed=seed,
        sequence_length=settings.seq_length,
        blend=(prefixes, _weights(settings, corpora, kept) if len(prefixes) > 1 else None),
        split=settings.split or WHOLE,
        path_to_cache=str(cache),
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        kept={} if kept is None else {prefix: part.documents for prefix, part in zip(prefixes, kept, strict=True)},
    )
    config.split_matrix = [config.split_matrix[0], None, None]
    with _alone_in(cache) if world.is_main else nullcontext():
        if dist.is_initialized():
            dist.barrier()
        builder = BlendedMegatronDatasetBuilder(PackedDocuments, [length, 0, 0], lambda: True, config)
        train: PackedDocuments = builder.build()[0]
    return train


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    """Hold a cache while it is built or read. One without its mark was left by a run that died in it."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    complete = cache / "complete"
    with hold(cache.with_name(f"{cache.name}.lock")):
        if not complete.exists():
            shutil.rmtree(cache, ignore_errors=True)
        yield
        complete.touch()


class _NoTokenizer:
    """What megatron-core asks of a tokenizer, and does not need for tokens that are already made."""

    vocab_size = None
    eod = None

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {}
