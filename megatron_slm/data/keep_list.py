"""The documents that a run trains on: the training part of the split, without those that a keep-list drops.

A keep-list is one safetensors file with a bit per document of each corpus:

Tensor NAME   uint8; bit d (the highest bit of a byte first) is 1 if document d of that corpus is kept
Metadata      `keep_list`: JSON of the format version, the origin, and each corpus's name and SHA-256

The split is applied first: it divides all documents of a corpus, as in megatron-core, and the keep-list keeps some of
its training part. So the held-out documents are the same with and without a keep-list.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_slm.data.corpus import Corpus, count_tokens, unique_names
from megatron_slm.data.settings import DataSettings
from megatron_slm.errors import AgreedError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
_METADATA = "keep_list"  # one key: safetensors writes several in any order, and equal lists must be equal files


class KeptDocuments(NamedTuple):
    """The documents of one corpus that are trained on.

    documents   bool `[num_documents]`, True for those of the split's training part that the keep-list keeps
    num_tokens  number of their tokens
    """

    documents: "NDArray[np.bool_]"
    num_tokens: int


def kept_documents(settings: DataSettings, corpora: Sequence[Corpus]) -> list[KeptDocuments] | None:
    """Return the documents of each corpus that are trained on; None if there is no keep-list.

    Raises:
        UserError: the keep-list cannot be read, does not cover a corpus, or keeps no training document of it.
        AgreedError: see `refuse_empty_split`.
    """
    if settings.keep is None:
        return None
    from megatron_slm.data.megatron import num_training_documents

    refuse_empty_split(settings, corpora)
    keep_list = open_keep_list(settings.keep)
    kept = []
    for corpus in corpora:
        documents = keep_list.documents(corpus)
        documents[num_training_documents(settings.split, corpus.num_documents) :] = False
        kept.append(KeptDocuments(documents, count_tokens(corpus, documents)))
        if kept[-1].num_tokens < 1:
            reason = f"it keeps no document of {corpus.prefix} in the part that data.split gives to training"
            remedy = "Raise filter.keep, or leave this corpus out of data.train"
            raise UserError("data.keep", settings.keep, reason, remedy)
    return kept


def refuse_empty_split(settings: DataSettings, corpora: Sequence[Corpus]) -> None:
    """Raise a UserError if the split gives no document of a corpus to training: megatron-core would loop forever.

    Raises:
        AgreedError: the training part of a corpus is empty.
    """
    from megatron_slm.data.megatron import num_training_documents

    for corpus in corpora:
        if num_training_documents(settings.split, corpus.num_documents) < 1:
            reason = f"it gives none of the {corpus.num_documents} documents of {corpus.prefix} to training"
            raise AgreedError("data.split", settings.split, reason, "Give the first part a larger share")


class Entry(NamedTuple):
    """One corpus of a keep-list: the name of its tensor, its documents, and the SHA-256 of its files by suffix."""

    name: str
    documents: int
    sha256: dict[str, str]


class KeepList:
    """An opened keep-list.

    Args:
        path: path of the file.
        entries: one entry per corpus.
    """

    def __init__(self, path: str, entries: Sequence[Entry]) -> None:
        self._path = path
        self._entries = entries

    def documents(self, corpus: Corpus) -> "NDArray[np.bool_]":
        """Return a mask of the kept documents of a corpus, bool `[num_documents]`.

        Raises:
            UserError: the list does not cover the corpus.
        """
        entry = next((entry for entry in self._entries if entry.sha256 == corpus.sha256), None)
        if entry is None:
            names = ", ".join(entry.name for entry in self._entries)
            reason = f"it does not cover {corpus.prefix}, only {names} (compared by SHA-256)"
            remedy = "Run megatron-slm filter on the corpora of data.train"
            raise UserError("data.keep", self._path, reason, remedy)
        from safetensors import safe_open

        with safe_open(self._path, framework="numpy") as file:
            bits = file.get_tensor(entry.name)
        return np.unpackbits(bits, count=corpus.num_documents).astype(bool)


def write_keep_list(
    path: Path, corpora: Sequence[Corpus], kept: "Sequence[NDArray[np.bool_]]", origin: Mapping[str, Any]
) -> None:
    """Write a keep-list; equal lists give equal bytes.

    Args:
        path: path of the file.
        corpora: the corpora that it covers.
        kept: bool `[num_documents]` per corpus.
        origin: JSON values that tell a reader of the file how the documents were chosen.
    """
    from safetensors.numpy import save

    names = unique_names([corpus.prefix for corpus in corpora])
    tensors = {name: np.packbits(documents) for name, documents in zip(names, kept, strict=True)}
    entries = [
        Entry(name, corpus.num_documents, corpus.sha256)._asdict() for name, corpus in zip(names, corpora, strict=True)
    ]
    described = {"format_version": FORMAT_VERSION, **origin, "corpora": entries}
    path.write_bytes(save(tensors, {_METADATA: json.dumps(described)}))


def open_keep_list(path: str) -> KeepList:
    """Read the description of a keep-list and check that the file is whole.

    Raises:
        UserError: the file is missing, not a keep-list, or of another version.
    """
    if not Path(path).is_file():
        raise UserError("data.keep", path, "it is not a file", "Give the file that megatron-slm filter wrote")
    described, shapes = _read(path)
    if described["format_version"] != FORMAT_VERSION:
        reason = f"its format version is {described['format_version']}, and this program reads {FORMAT_VERSION}"
        raise UserError("data.keep", path, reason, "Run megatron-slm filter again")
    entries = [Entry(**entry) for entry in described["corpora"]]
    if any(shapes.get(entry.name) != [-(-entry.documents // 8)] for entry in entries):
        raise UserError("data.keep", path, "it does not have one bit per document of its corpora", "Copy it again")
    return KeepList(path, entries)


def _read(path: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return the description in a file, and the shapes of its tensors by name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {})[_METADATA])
            return described, {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        remedy = "Give the file that megatron-slm filter wrote, or copy it again"
        raise UserError("data.keep", path, f"it is not a keep-list ({error})", remedy) from error
