"""A keep-list: which documents of prepared corpora are worth training on, a bit each, in one safetensors file.

Tensor NAME   uint8, bit d of the row (highest first within a byte): whether document d of that corpus is kept
Metadata      `keep_list`: JSON of the format version, where it came from, and each corpus's name and sha256
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_slm.data.corpus import Corpus, unique_names
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
_METADATA = "keep_list"  # one key: safetensors writes several in any order, and equal lists shall be equal files


class Entry(NamedTuple):
    """Of one corpus: name of its tensor, documents, and sha256 of its files by suffix."""

    name: str
    documents: int
    sha256: dict[str, str]


class KeepList:
    """An opened keep-list.

    Args:
        path: of the file.
        entries: one a corpus.
    """

    def __init__(self, path: str, entries: Sequence[Entry]) -> None:
        self._path = path
        self._entries = entries

    def documents(self, corpus: Corpus) -> "NDArray[np.bool_]":
        """Which documents of a corpus are kept, bool `[num_documents]`.

        Raises:
            UserError: the list is of other corpora.
        """
        entry = next((entry for entry in self._entries if entry.sha256 == corpus.sha256), None)
        if entry is None:
            names = ", ".join(entry.name for entry in self._entries)
            raise UserError(
                f"data.keep is {self._path}, which says nothing of {corpus.prefix}, but of {names} with other "
                "contents (their sha256 differ): run megatron-slm filter on the corpora of data.train."
            )
        from safetensors import safe_open

        with safe_open(self._path, framework="numpy") as file:
            bits = file.get_tensor(entry.name)
        return np.unpackbits(bits, count=corpus.num_documents).astype(bool)


def write_keep_list(
    path: Path, corpora: Sequence[Corpus], kept: "Sequence[NDArray[np.bool_]]", origin: Mapping[str, Any]
) -> None:
    """Write which documents are kept of each corpus, and where that came from. The same list is the same bytes."""
    from safetensors.numpy import save

    names = unique_names([corpus.prefix for corpus in corpora])
    tensors = {name: np.packbits(documents) for name, documents in zip(names, kept, strict=True)}
    entries = [
        Entry(name, corpus.num_documents, corpus.sha256)._asdict() for name, corpus in zip(names, corpora, strict=True)
    ]
    described = {"format_version": FORMAT_VERSION, **origin, "corpora": entries}
    path.write_bytes(save(tensors, {_METADATA: json.dumps(described)}))


def open_keep_list(path: str) -> KeepList:
    """Read what a keep-list speaks of, and check that it is whole.

    Raises:
        UserError: it is not there, is no keep-list, or is of another version.
    """
    if not Path(path).is_file():
        raise UserError(f"data.keep is {path}, which is no file: name what megatron-slm filter wrote.")
    described, shapes = _read(path)
    if described["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"data.keep is {path}, of format version {described['format_version']}, which this program does not read: "
            "run megatron-slm filter again."
        )
    entries = [Entry(**entry) for entry in described["corpora"]]
    if any(shapes.get(entry.name) != [-(-entry.documents // 8)] for entry in entries):
        raise UserError(f"data.keep is {path}, which lacks bits of the corpora that it names: copy it again.")
    return KeepList(path, entries)


def _read(path: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The description in a file, and the shape of each of its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {})[_METADATA])
            return described, {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.keep is {path}, which is no keep-list ({error}): name what megatron-slm filter wrote, or copy it "
            "again."
        ) from error
