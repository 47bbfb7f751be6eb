"""Megatron's PREFIX.idx, written and read a block at a time: one sequence a document.

Header; then int32 tokens a sequence, int64 place of each sequence in the .bin in bytes, int64
number of the first sequence of each document, with one more number at the end.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from megatron_slm.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {4: "int32", 8: "uint16"}  # Megatron's codes
_BLOCK = 1 << 18  # sequences


class Index(NamedTuple):
    """What the header of an index says."""

    dtype: str
    sequences: int
    boundaries: int  # documents + 1

    @property
    def item_size(self) -> int:
        """Bytes a token."""
        return np.dtype(self.dtype).itemsize


def read_index(path: Path, remedy: str) -> Index:
    """Read the header.

    Raises:
        UserError: it is not an index of tokens, or cut inside its header; the sentence ends with ``remedy``.
    """
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is cut short: {remedy}")
    magic, version, code, sequences, boundaries = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise UserError(f"{path} is not an index of tokens: {remedy}")
    return Index(_DTYPES[code], sequences, boundaries)


def index_size(index: Index) -> int:
    """Bytes of the whole file."""
    return _HEADER.size + (4 + 8) * index.sequences + 8 * index.boundaries


def read_lengths(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the tokens of the sequences, int32, a block at a time."""
    yield from _blocks(path, np.dtype(np.int32), _HEADER.size, index.sequences)


def read_pointers(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the places of the sequences in the .bin, int64 bytes, a block at a time."""
    yield from _blocks(path, np.dtype(np.int64), _HEADER.size + 4 * index.sequences, index.sequences)


def read_boundaries(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the number of the first sequence of each document, int64, and one more, a block at a time."""
    yield from _blocks(path, np.dtype(np.int64), _HEADER.size + (4 + 8) * index.sequences, index.boundaries)


def write_index(path: Path, dtype: str, lengths: Path) -> None:
    """Write the index of documents that follow each other in a .bin.

    Args:
        dtype: of the tokens, "uint16" or "int32".
        lengths: a file of int32, the tokens of each document.
    """
    documents = lengths.stat().st_size // 4
    index = Index(dtype, documents, documents + 1)
    code = next(code for code, name in _DTYPES.items() if name == dtype)
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, index.sequences, index.boundaries))
        _write_blocks(stream, lengths, lambda block, first, place: block)
        _write_blocks(stream, lengths, lambda block, first, place: (place + _starts(block)) * index.item_size)
        _write_blocks(stream, lengths, lambda block, first, place: first + np.arange(len(block)))
        stream.write(np.int64(documents).tobytes())


def _write_blocks(stream: IO[bytes], lengths: Path, column: Callable[[np.ndarray, int, int], np.ndarray]) -> None:
    """Write ``column(block, number of its first document, tokens before it)`` for each block of lengths."""
    first = place = 0
    for block in _blocks(lengths, np.dtype(np.int32), 0, lengths.stat().st_size // 4):
        stream.write(column(block, first, place).tobytes())
        first += len(block)
        place += int(block.sum(dtype=np.int64))


def _starts(block: np.ndarray) -> np.ndarray:
    return np.cumsum(block, dtype=np.int64) - block


def _blocks(path: Path, dtype: np.dtype, offset: int, count: int) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        stream.seek(offset)
        for done in range(0, count, _BLOCK):
            yield np.fromfile(stream, dtype, min(_BLOCK, count - done))
