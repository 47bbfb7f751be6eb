"""A store in the making: files that grow by whole shards, and a journal with the checksum of every finished shard.

The staging folder's `ready` becomes the store.
"""

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.errors import UserError
from megatron_slm.io.files import publish, sync
from megatron_slm.io.staging import Journal, Staging
from megatron_slm.reference.scoring import Values
from megatron_slm.reference.store import MANIFEST, BlockChecksums, FileEntry
from megatron_slm.signals import ENCODINGS, encode


@dataclass
class FileProgress:
    """Of one file: rows and CRC-32 of each finished shard, values above the largest, and the sum of each column."""

    shards: list[tuple[int, int]] = field(default_factory=list)
    clipped: int = 0
    sums: list[float] = field(default_factory=list)


class Attempt:
    """Writes shards where they belong, and remembers them once they are on the disk.

    Args:
        staging: open.
        journal: in it.
        columns: values a row.
        encoding: a name in `ENCODINGS`.

    Raises:
        UserError: the journal cannot be read, or is of other settings.
    """

    def __init__(self, staging: Staging, journal: Journal, columns: list[str], encoding: str) -> None:
        self.ready = staging.ready
        self._staging = staging
        self._journal = journal
        if not self.ready.exists():  # the store was there, and its journal was about to go
            journal.remove()
            self.ready.mkdir()
        self._columns = columns
        self._encoding = encoding
        self._row_bytes = np.dtype(ENCODINGS[encoding].dtype).itemsize * len(columns)
        self._files = self._read()
        self._checksums: dict[str, int] = {}

    def finished(self, name: str) -> tuple[int, int]:
        """Shards of a file that are on the disk, and their rows."""
        shards = self._file(name).shards
        return len(shards), sum(rows for rows, _ in shards)

    def write(self, name: str, found: Values) -> None:
        """Encode the next shard of a file, write it, flush it, and remember it.

        Raises:
            UserError: a value is not finite.
        """
        bad = np.flatnonzero(~np.isfinite(found.values_NC).all(-1))
        if len(bad):
            raise UserError(
                f"The reference's answer for token {found.start + bad[0]} of {name} is not finite: look at the model, "
                "or score in training.precision=fp32."
            )
        codes = encode(found.values_NC, self._encoding).tobytes()
        path = self._path(name)
        path.touch()
        with path.open("r+b") as stream:
            stream.seek(found.start * self._row_bytes)
            stream.write(codes)
        sync(path)
        self._remember(name, found.values_NC, zlib.crc32(codes))

    def read_back(self, name: str) -> Iterator[None]:
        """Compare a file with what was computed, a shard at a time, and then add the checksums of its blocks.

        Raises:
            UserError: the disk gave back something else.
        """
        path, blocks = self._path(name), BlockChecksums(self._row_bytes)
        with path.open("r+b") as stream:
            for count, checksum in self._file(name).shards:
                found = stream.read(count * self._row_bytes)
                if zlib.crc32(found) != checksum:
                    raise UserError(
                        f"{path} does not hold what was written to it: the disk is not to be trusted. Remove "
                        f"{self._staging.folder} and score again on another."
                    )
                blocks.feed(found)
                yield
            table = blocks.table()
            stream.truncate()
            stream.write(table)
        self._checksums[name] = zlib.crc32(table)
        yield

    def entry(self, name: str, corpus: str, sha256: dict[str, str]) -> FileEntry:
        """What the manifest says of a file that was read back to its end."""
        file, (_, rows) = self._file(name), self.finished(name)
        means = {column: total / rows for column, total in zip(self._columns, file.sums, strict=True)}
        return FileEntry(name, rows, corpus, sha256, self._checksums[name], file.clipped, means)

    def publish(self, manifest: str, output: Path) -> None:
        """Make the folder of the store be there, whole, at once."""
        (self.ready / MANIFEST).write_text(manifest, encoding="utf-8")
        publish(self.ready, output)

    def _remember(self, name: str, values_NC: NDArray[np.float32], checksum: int) -> None:
        file = self._files.setdefault(name, FileProgress())
        file.shards.append((len(values_NC), checksum))
        file.clipped += int((values_NC > ENCODINGS[self._encoding].largest).sum())
        totals = values_NC.sum(0, dtype=np.float64).tolist()
        file.sums = [before + more for before, more in zip(file.sums or [0.0] * len(totals), totals, strict=True)]
        self._save()

    def _save(self) -> None:
        self._journal.write({"files": {name: asdict(file) for name, file in self._files.items()}})

    def _read(self) -> dict[str, FileProgress]:
        progress = self._journal.read()
        try:
            files = {} if progress is None else progress["files"]
            return {name: FileProgress(**fields) for name, fields in files.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._journal.unusable(f"its journal cannot be read ({error})") from error

    def _file(self, name: str) -> FileProgress:
        return self._files.get(name, FileProgress())

    def _path(self, name: str) -> Path:
        return self.ready / f"{name}.scores"
