"""Weights in checkpoint files, read in pieces: no file is held in memory or mapped into it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.torch_internals import offset_in_file

PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class Extent:
    """Consecutive numbers in one file: `numel` of `dtype`, starting at byte `offset`."""

    file: Path
    offset: int
    numel: int
    dtype: torch.dtype

    def cut(self, start: int, stop: int) -> "Extent":
        """Return the numbers `start` to `stop` of this extent."""
        return Extent(self.file, self.offset + start * self.dtype.itemsize, stop - start, self.dtype)


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a checkpoint: the numbers of its extents, in order, fill it row by row."""

    shape: torch.Size
    extents: tuple[Extent, ...]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the position of a piece in the flattened weight, and the piece: 1-D, at most 16 MiB.

        The next piece overwrites it.

        Raises:
            OSError: the file is shorter than its weights.
        """
        position = 0
        for extent in self.extents:
            size = PIECE_BYTES // extent.dtype.itemsize
            buffer = torch.empty(min(size, extent.numel), dtype=extent.dtype)
            with extent.file.open("rb") as file:
                file.seek(extent.offset)
                for start in range(0, extent.numel, size):
                    piece = buffer[: min(size, extent.numel - start)]
                    if file.readinto(piece.view(torch.uint8).numpy().data) != piece.nbytes:
                        raise OSError(f"{extent.file} is truncated: it is shorter than its weights")
                    yield position, piece
                    position += len(piece)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight, rounded to `dtype` if it holds floating-point numbers."""
        stored = self.extents[0].dtype if self.extents else dtype
        whole = torch.empty(self.shape, dtype=dtype if stored.is_floating_point else stored)
        flat = whole.view(-1)
        for position, piece in self.pieces():
            flat[position : position + len(piece)] = piece
        return whole

    def equals(self, other: Tensor, dtype: torch.dtype) -> bool:
        """Return whether `other` holds this weight, rounded to `dtype`, bit for bit."""
        if other.shape != self.shape:
            return False
        flat = other.detach().reshape(-1)
        for position, piece in self.pieces():
            expected = piece.to(dtype) if piece.is_floating_point() else piece
            # In the dtype of `other`, because some models hold a few weights in float32 whatever the dtype of the rest.
            if not _same_bits(flat[position : position + len(piece)], expected.to(other.dtype)):
                return False
        return True


def read_layout(file: Path, *, weights_only: bool) -> Any:
    """Return what `torch.save` wrote, with its tensors on the meta device; `extent` finds their numbers in the file.

    Args:
        file: a checkpoint file.
        weights_only: False for files that hold more than tensors: pickles, which can run code.
    """
    return torch.load(file, map_location="meta", weights_only=weights_only)


def extent(file: Path, tensor: Tensor) -> Extent:
    """Return the place in the file of a tensor that `read_layout` returned.

    Raises:
        ValueError: its place in the file is unknown.
    """
    base = offset_in_file(tensor)
    if base is None or not tensor.is_contiguous():
        raise ValueError(f"{file} holds a tensor whose place in the file is unknown")
    return Extent(file, base + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.numel(), tensor.dtype)


def stored(file: Path, tensor: Tensor) -> StoredWeight:
    """Return a tensor from `read_layout` as a weight."""
    return StoredWeight(tensor.shape, (extent(file, tensor),))


def span(extents: Sequence[Extent], start: int, stop: int) -> tuple[Extent, ...]:
    """Return the numbers `start` to `stop` of extents that follow each other.

    Raises:
        ValueError: the extents hold fewer.
    """
    found = []
    first = 0
    for part in extents:
        low, high = max(start - first, 0), min(stop - first, part.numel)
        if low < high:
            found.append(part.cut(low, high))
        first += part.numel
    if sum(part.numel for part in found) != stop - start:
        raise ValueError(f"the checkpoint holds {first} numbers where {stop} were expected")
    return tuple(found)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one dtype are equal; NaN equals NaN, and -0.0 is not 0.0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
