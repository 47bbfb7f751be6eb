"""The format of a store of scores: a manifest, and files with one row per token, then a checksum per block of rows."""

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

FORMAT_VERSION = 2
"""Version 1 lacks tokenizer_probe."""
MANIFEST = "manifest.json"
ORDER = "order"
"""Name of the only file in a store of kind `packed`."""
BLOCK_ROWS = 4096
"""Rows per checksum."""


class BlockChecksums:
    """The CRC-32 of each block of rows, computed from bytes that arrive in pieces of any size.

    Args:
        row_bytes: bytes per row.
    """

    def __init__(self, row_bytes: int) -> None:
        self._size = BLOCK_ROWS * row_bytes
        self._finished = array("I")
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Add the next bytes of the file."""
        data = self._rest + data
        whole = len(data) - len(data) % self._size
        self._finished.extend(zlib.crc32(data[start : start + self._size]) for start in range(0, whole, self._size))
        self._rest = data[whole:]

    def table(self) -> bytes:
        """Return the checksums of all blocks, as written after the rows; the last block may be short."""
        last = [zlib.crc32(self._rest)] if self._rest else []
        return np.array([*self._finished, *last], dtype="<u4").tobytes()


class ScoreFile:
    """An opened file of a store. It reads rows by number, and checks each block before its first use.

    Args:
        path: path of the file.
        rows: number of rows, one per token.
        columns: values per row.
        encoding: a name in `ENCODINGS`.

    Raises:
        UserError: the file is missing or has the wrong size.
    """

    def __init__(self, path: Path, rows: int, columns: int, encoding: str) -> None:
        self.path = path
        self.rows = rows
        self._encoding = encoding
        dtype = np.dtype(ENCODINGS[encoding].dtype)
        blocks = -(-rows // BLOCK_ROWS)
        _check_size(path, rows * columns * dtype.itemsize + 4 * blocks)
        self._codes = np.memmap(path, dtype, "r", 0, (rows, columns))
        self._checksums = np.memmap(path, "<u4", "r", rows * columns * dtype.itemsize, (blocks,))
        self._checked = np.zeros(blocks, dtype=bool)

    def read(self, rows_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the values of the rows `rows_N`, float32 `[N, columns]`.

        Raises:
            UserError: a block that holds one of these rows has changed since it was written.
        """
        self._check_blocks(np.unique(rows_N // BLOCK_ROWS))
        return decode(self._codes[rows_N], self._encoding)

    def stretch(self, first: int, last: int) -> NDArray[np.float32]:
        """Return the values of the rows `first` to `last - 1`, float32 `[N, columns]`.

        Raises:
            UserError: a block that holds one of these rows has changed since it was written.
        """
        self._check_blocks(np.arange(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)))
        return decode(self._codes[first:last], self._encoding)

    def check_all(self) -> Iterator[int]:
        """Check every block; yield the number of rows checked so far.

        Raises:
            UserError: a block has changed since it was written.
        """
        for block in range(len(self._checked)):
            self._check(block)
            yield min(self.rows, (block + 1) * BLOCK_ROWS)

    def table_checksum(self) -> int:
        """Return the CRC-32 of the checksums."""
        return zlib.crc32(self._checksums.tobytes())

    def _check_blocks(self, blocks: NDArray[np.int64]) -> None:
        for block in blocks[~self._checked[blocks]]:
            self._check(int(block))

    def _check(self, block: int) -> None:
        first = block * BLOCK_ROWS
        if zlib.crc32(self._codes[first : first + BLOCK_ROWS].tobytes()) != self._checksums[block]:
            last = min(first + BLOCK_ROWS, self.rows) - 1
            raise _damaged(self.path, f"it is corrupted: the values of its tokens {first} to {last} have changed")
        self._checked[block] = True


def _damaged(path: Path, reason: str) -> UserError:
    return UserError("score file", path, reason, "Copy the store again, or score the corpus again")


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from error
    if size != expected:
        raise _damaged(path, f"it has {size} bytes instead of {expected}")


@dataclass(frozen=True)
class FileEntry:
    """The description of one file in the manifest.

    name      name of the file, without its suffix
    rows      tokens of the corpus's `.bin`, or samples x seq_length of the order
    corpus    PREFIX of the corpus when it was scored, for messages
    sha256    digests of the corpus's files, by suffix; empty for an order
    checksum  CRC-32 of the file's checksums
    clipped   number of values above the largest of the encoding
    mean      mean of each column, in nats per token
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
    """The description of a store.

    kind                   document: a row per offset of the `.bin`; packed: a row per (sample, position) of one order
    columns                names of the values in a row, `loss` first; in nats
    encoding               a name in `ENCODINGS`
    max_error              largest error of a value, in nats
    context                the context in which each token was scored, as text
    seq_length             labels per window, or per sample
    reset_attention        packed: attention was kept within documents
    order_fingerprint      packed: fingerprint of the order of samples
    tokenizer_fingerprint  fingerprint of the corpora's tokenizer
    tokenizer_probe        probe of the corpora's tokenizer; empty in version 1
    reference              path and fingerprint of the model's weights, and the precision in which it ran
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
        """Return the path of the model that computed the scores, for messages."""
        return str(self.reference.get("path", "elsewhere"))


@dataclass(frozen=True)
class Store:
    """An opened store.

    path      folder of the store
    manifest  description of the store
    setting   the setting that names it, for errors
    """

    path: Path
    manifest: Manifest
    setting: str = "reference.store"

    def file_of(self, name: str) -> ScoreFile:
        """Open the file `name`; check its size and the checksum of its checksums.

        Raises:
            UserError: the file is missing, truncated or changed.
        """
        manifest = self.manifest
        entry = next(entry for entry in manifest.files if entry.name == name)
        file = ScoreFile(self.path / f"{name}.scores", entry.rows, len(manifest.columns), manifest.encoding)
        if file.table_checksum() != entry.checksum:
            raise _damaged(file.path, f"its checksums differ from those of {self.path / MANIFEST}")
        return file

    def check_all(self) -> Iterator[int]:
        """Check every block of every file; yield the number of tokens checked so far.

        Raises:
            UserError: a file is missing, truncated or changed.
        """
        before = 0
        for entry in self.manifest.files:
            for checked in self.file_of(entry.name).check_all():
                yield before + checked
            before += entry.rows

    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the values, wherever the store is."""
        manifest = self.manifest
        values = [[entry.rows, entry.checksum] for entry in manifest.files]
        identity = [manifest.kind, manifest.columns, manifest.encoding, values]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def name_for(self, prefix: str, sha256: dict[str, str]) -> str:
        """Return the name of the file with the scores of a corpus, which may have moved since.

        Args:
            prefix: PREFIX of the corpus, for the error.
            sha256: digests of the corpus's files, by suffix.

        Raises:
            UserError: the store holds the scores of other tokens, or of the same tokens in other documents.
        """
        entries = self.manifest.files
        for entry in entries:
            # PREFIX.mask does not matter: which tokens count toward the loss changes no score.
            if all(entry.sha256[suffix] == sha256[suffix] for suffix in (".bin", ".idx")):
                return entry.name
        if any(entry.sha256[".bin"] == sha256[".bin"] for entry in entries):
            reason = f"it holds the scores of {prefix} with other documents (the .idx differs)"
        else:
            scored = ", ".join(entry.corpus for entry in entries)
            reason = f"it holds no scores of {prefix}, only of {scored} (the .bin differs)"
        raise UserError(self.setting, self.path, reason, "Score this corpus, or train on those that were scored")


def open_store(path: str, setting: str = "reference.store") -> Store:
    """Open a store by its manifest.

    Args:
        path: the folder.
        setting: the setting that names it, for errors.

    Raises:
        UserError: the folder is not a complete store, or its manifest cannot be read or has an unsupported version.
    """
    try:
        fields: dict[str, Any] = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
        version, encoding = fields["format_version"], fields["encoding"]
        if version in range(1, FORMAT_VERSION + 1) and encoding in ENCODINGS:
            fields["files"] = [FileEntry(**entry) for entry in fields["files"]]
            return Store(Path(path), Manifest(**fields), setting)
    except FileNotFoundError:
        reason = f"it holds no {MANIFEST}, so it is not a complete store"
        raise UserError(setting, path, reason, "Name a folder that megatron-slm score has completed") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"its {MANIFEST} cannot be read ({error})"
        raise UserError(setting, path, reason, "Copy the store again, or score the corpus again") from error
    reason = f"its format version {version} with encoding {encoding} is not supported"
    raise UserError(setting, path, reason, "Score the corpus again")
