"""The format of a store of scores: a manifest, and files of one row per token with checksums."""

import hashlib
import json
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.errors import UserError
from megatron_slm.signals import ENCODINGS, decode

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


FORMAT_VERSION = 2
"""Version 1 lacks tokenizer_probe."""
MANIFEST = "manifest.json"
ORDER = "order"
"""Name of the one file of kind `packed`."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a store.

    name      of the file, without its suffix
    rows      tokens: of the corpus's .bin, or samples x seq_length of the order
    corpus    PREFIX when it was scored; for the reader
    sha256    of the corpus's files, by suffix; empty for an order
    checksum  of the file's checksums
    clipped   values above what the encoding can hold
    mean      of each column, in nats a token
    """

    name: str
    rows: int
    corpus: str = ""
    sha256: dict[str, str] = field(default_factory=dict)
    checksum: int = 0
    clipped: int = 0
    mean: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a store says of itself.

    kind                   document: a value an offset of the .bin; packed: a value a (sample, position) of one order
    columns                `loss`, and `entropy` if it was asked for; nats
    encoding               name in `ENCODINGS`
    max_error              of a value, in nats
    context                in which each token was scored, in words
    seq_length             of the windows, or of the samples
    reset_attention        packed: whether attention was kept within documents
    order_fingerprint      packed: of the order of samples
    tokenizer_fingerprint  of the corpora
    tokenizer_probe        of the corpora; empty in version 1
    reference              path and fingerprint of the model's weights, and the precision that it ran in
    """

    kind: str
    columns: list[str]
    encoding: str
    max_error: float
    context: str
    seq_length: int
    reset_attention: bool
    order_fingerprint: str
    tokenizer_fingerprint: str
    reference: dict[str, Any]
    files: list[FileEntry]
    tokenizer_probe: str = ""
    format_version: int = FORMAT_VERSION

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def scorer(self) -> str:
        """Whose scores these are, in words."""
        return str(self.reference.get("path", "elsewhere"))


@dataclass(frozen=True)
class Store:
    """An opened store."""

    path: Path
    manifest: Manifest
    setting: str = "reference.store"
    """That named it, for messages."""

    def file_of(self, name: str) -> ScoreFile:
        """The file of this name, checked for its size and the sum of its checksums.

        Raises:
            UserError: it is missing, cut short or changed.
        """
        manifest = self.manifest
        entry = next(entry for entry in manifest.files if entry.name == name)
        file = ScoreFile(self.path / f"{name}.scores", entry.rows, len(manifest.columns), manifest.encoding)
        if file.table_checksum() != entry.checksum:
            raise UserError(
                f"{file.path} is corrupted: its checksums are not those of {self.path / MANIFEST}. Copy it again, or "
                "score the corpus again."
            )
        return file

    def fingerprint(self) -> str:
        """sha256 of what the values are, wherever the store lies."""
        manifest = self.manifest
        values = [[entry.rows, entry.checksum] for entry in manifest.files]
        return hashlib.sha256(
            json.dumps([manifest.kind, manifest.columns, manifest.encoding, values]).encode()
        ).hexdigest()

    def name_for(self, prefix: str, sha256: dict[str, str]) -> str:
        """Name of the file with the scores of a corpus, wherever the corpus lies.

        Args:
            prefix: of the corpus, for the message.
            sha256: of its files, by suffix.

        Raises:
            UserError: the store holds other tokens, or the same in other documents.
        """
        entries = self.manifest.files
        for entry in entries:
            # Which of its tokens count (.mask) changes no score.
            if all(entry.sha256[suffix] == sha256[suffix] for suffix in (".bin", ".idx")):
                return entry.name
        if any(entry.sha256[".bin"] == sha256[".bin"] for entry in entries):
            differs = "whose tokens it has in other documents (the .idx differs)"
        else:
            differs = f"but those of {', '.join(entry.corpus for entry in entries)} (the .bin differs)"
        raise UserError(
            f"{self.setting} is {self.path}, which holds no scores of {prefix}, {differs}: score this corpus, or "
            "train on those that were scored."
        )


def open_store(path: str, setting: str = "reference.store") -> Store:
    """Read the manifest of a store.

    Args:
        path: of its folder.
        setting: that named it, for messages.

    Raises:
        UserError: there is none, it cannot be read, or it is of another version.
    """
    try:
        fields: dict[str, Any] = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
        if fields["format_version"] not in range(1, FORMAT_VERSION + 1) or fields["encoding"] not in ENCODINGS:
            raise UserError(
                f"{setting} is {path}, of format version {fields['format_version']} and encoding "
                f"{fields['encoding']}, which this program does not read: score the corpus again."
            )
        fields["files"] = [FileEntry(**entry) for entry in fields["files"]]
        return Store(Path(path), Manifest(**fields), setting)
    except FileNotFoundError:
        raise UserError(
            f"{setting} is {path}, which holds no {MANIFEST}: name the folder that megatron-slm score wrote; one "
            "that was not completed does not count."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{setting} is {path}, whose {MANIFEST} cannot be read ({error}): copy it again.") from error
