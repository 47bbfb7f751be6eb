"""One file of scores: rows of values, then a checksum of every block of rows.

NAME.scores   rows x columns of codes, then uint32 CRC-32s of blocks of `BLOCK_ROWS` rows; all little-endian
"""

import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.errors import UserError
from megatron_slm.signals.encoding import ENCODINGS, decode

BLOCK_ROWS = 4096


class BlockChecksums:
    """CRC-32 of each block of rows, from bytes that come in any pieces.

    Args:
        row_bytes: of one row.
    """

    def __init__(self, row_bytes: int) -> None:
        self._size = BLOCK_ROWS * row_bytes
        self._found = array("I")
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """The bytes that follow."""
        data = self._rest + data
        whole = len(data) - len(data) % self._size
        self._found.extend(zlib.crc32(data[start : start + self._size]) for start in range(0, whole, self._size))
        self._rest = data[whole:]

    def table(self) -> bytes:
        """What stands behind the rows, the last block included."""
        last = [zlib.crc32(self._rest)] if self._rest else []
        return np.array([*self._found, *last], dtype="<u4").tobytes()


class ScoreFile:
    """Reads rows by number, from the page cache, and checks each block once before its first use.

    Args:
        path: of the file.
        rows: tokens.
        columns: values a token.
        encoding: a name in `ENCODINGS`.

    Raises:
        UserError: the file is missing or of another size.
    """

    def __init__(self, path: Path, rows: int, columns: int, encoding: str) -> None:
        self.path = path
        self.rows = rows
        self._encoding = encoding
        dtype = np.dtype(ENCODINGS[encoding].dtype)
        blocks = -(-rows // BLOCK_ROWS)
        _refuse_other_size(path, rows * columns * dtype.itemsize + 4 * blocks)
        self._codes = np.memmap(path, dtype, "r", 0, (rows, columns))
        self._checksums = np.memmap(path, "<u4", "r", rows * columns * dtype.itemsize, (blocks,))
        self._checked = np.zeros(blocks, dtype=bool)

    def read(self, rows_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 `[N, columns]`.

        Raises:
            UserError: a block that holds one of these rows is not as it was written.
        """
        self._check_blocks(np.unique(rows_N // BLOCK_ROWS))
        return decode(self._codes[rows_N], self._encoding)

    def stretch(self, first: int, last: int) -> NDArray[np.float32]:
        """The rows from `first` to `last`, float32 `[N, columns]`.

        Raises:
            UserError: as `read`.
        """
        self._check_blocks(np.arange(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)))
        return decode(self._codes[first:last], self._encoding)

    def check_all(self) -> Iterator[int]:
        """Check every block; yields the rows that are done.

        Raises:
            UserError: at the first that is not as it was written.
        """
        for block in range(len(self._checked)):
            self._check(block)
            yield min(self.rows, (block + 1) * BLOCK_ROWS)

    def table_checksum(self) -> int:
        """CRC-32 of the checksums."""
        return zlib.crc32(self._checksums.tobytes())

    def _check_blocks(self, blocks: NDArray[np.int64]) -> None:
        for block in blocks[~self._checked[blocks]]:
            self._check(int(block))

    def _check(self, block: int) -> None:
        first = block * BLOCK_ROWS
        if zlib.crc32(self._codes[first : first + BLOCK_ROWS].tobytes()) != self._checksums[block]:
            last = min(first + BLOCK_ROWS, self.rows) - 1
            raise UserError(
                f"{self.path} is corrupted: the values of its tokens {first} to {last} are not those that were "
                "written. Copy it again, or score the corpus again."
            )
        self._checked[block] = True


def _refuse_other_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): copy the whole store again.") from error
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: copy it again, or score the corpus again.")
