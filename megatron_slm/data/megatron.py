"""The adapter to megatron-core: its packing, blending and shuffling, with the offset of every token.

Checked against megatron-core 0.16. The attributes `shuffle_index`, `sample_index`, `document_index`, `indices`,
`dataset` and `dataset_id` of its datasets, their methods `_build_document_sample_shuffle_indices` and `_build_indices`,
the readers behind `dataset.index` and `dataset.bin_reader`, and `split_matrix` of its configuration are not documented.
tests/unit/test_megatron.py fails if one of them changes.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

_WHOLE = "1,0,0"  # the split that gives all documents to training


@dataclass
class OrderConfig(GPTDatasetConfig):  # type: ignore[misc]  # megatron-core has no types
    """megatron-core's configuration, with the documents that a keep-list keeps.

    kept  bool `[num_documents]` by PREFIX, True for documents to keep; a corpus without an entry keeps all documents
    """

    kept: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


class PackedDocuments(GPTDataset):  # type: ignore[misc]
    """megatron-core's packed samples of the kept documents, with the offset of every token in the `.bin`."""

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
        # Only building reads them. Every rank would keep four bytes per document.
        self.indices = np.zeros(0, np.int32)
        # Samples are far apart. Without this advice, the kernel reads megabytes around every page of a sample.
        indexed_dataset.bin_reader._bin_buffer_mmap._mmap.madvise(mmap.MADV_RANDOM)

    def _build_document_sample_shuffle_indices(self) -> tuple[NDArray[Any], ...]:
        """Build the indices, or map those in the cache.

        After building them, megatron-core keeps them in the memory of rank 0. A second call maps the files, whose pages
        all ranks of a host share.
        """
        super()._build_document_sample_shuffle_indices()
        indices: tuple[NDArray[Any], ...] = super()._build_document_sample_shuffle_indices()
        return indices

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the fields `text`, `offset`, `position` and `continued` of a `Sample`, see data/samples.py."""
        place = int(self.shuffle_index[index])
        first, begin = (int(value) for value in self.sample_index[place])
        last, end = (int(value) for value in self.sample_index[place + 1])
        texts, offsets, positions = [], [], []
        for entry in range(first, last + 1):
            document = int(self.document_index[entry])
            start = begin if entry == first else 0
            # The last token of a sample is also the first of the next one.
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


def build_packed_documents(
    prefixes: Sequence[str],
    weights: Sequence[float],
    *,
    split: str | None,
    kept: Mapping[str, NDArray[np.bool_]],
    seq_length: int,
    num_samples: int,
    seed: int,
    cache: Path,
) -> PackedDocuments:
    """Return the samples of one cycle; rank 0 builds their indices in the cache, and the other ranks read them.

    For several corpora, the result is a blend, another class of megatron-core, whose items also have `dataset_id`, the
    index of the corpus.

    Args:
        prefixes: PREFIX of each corpus.
        weights: weight of each corpus in the blend.
        split: as in the settings; None gives all documents to training.
        kept: documents to keep, by PREFIX; see `OrderConfig`.
        seq_length: T; a sample has T + 1 tokens.
        num_samples: samples in the cycle.
        seed: seed of the order.
        cache: folder for the indices.
    """
    config = OrderConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(list(prefixes), list(weights) if len(prefixes) > 1 else None),
        split=split or _WHOLE,
        path_to_cache=str(cache),
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        kept=kept,
    )
    # Without this, indices of the validation and test parts would be built too.
    config.split_matrix = [config.split_matrix[0], None, None]
    builder = BlendedMegatronDatasetBuilder(PackedDocuments, [num_samples, 0, 0], lambda: True, config)
    train: PackedDocuments = builder.build()[0]
    if isinstance(train, BlendedDataset):  # on rank 0, as in `_build_document_sample_shuffle_indices`
        train.dataset_index, train.dataset_sample_index = train._build_indices()
    return train


def num_training_documents(split: str | None, num_documents: int) -> int:
    """Return the number of leading documents that a split gives to training, rounded as megatron-core rounds it."""
    return round(float(parse_and_normalize_split(split or _WHOLE)[0]) * num_documents)


class _NoTokenizer:
    """A stand-in for the tokenizer that megatron-core requires but does not use for prepared tokens."""

    vocab_size = None
    eod = None

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {}
