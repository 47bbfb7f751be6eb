"""A writer of stores, whose files grow by whole shards, so that a restart repeats at most one shard.

The journal of the staging folder holds the checksum of every finished shard. When all shards are written, they are read
back and compared, and the folder `ready` becomes the store.
"""

import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.corpus import Corpus
from megatron_slm.dist import World, agree, gather_objects
from megatron_slm.errors import UserError
from megatron_slm.io.files import publish, sync
from megatron_slm.io.progress import Meter
from megatron_slm.io.staging import Journal, Staging
from megatron_slm.reference.scoring import Source, Values
from megatron_slm.reference.store import MANIFEST, BlockChecksums, FileEntry, Manifest
from megatron_slm.signals import ENCODINGS, encode

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewFile:
    """One file to write.

    name    name of the file, without its suffix
    corpus  the corpus that it scores; None for the order of samples of a run
    source  the source of its values
    """

    name: str
    corpus: Corpus | None
    source: Source


def open_writer(manifest: Manifest, staging: Staging, journal: Journal, world: World) -> "StoreWriter | None":
    """Return the writer of a store, which resumes after the shards on the disk; None on ranks other than 0.

    Every rank calls it.

    Args:
        manifest: the description of the store, without its files.
        staging: the staging folder, open on rank 0.
        journal: the journal in it.
        world: the rank and world size of this process.

    Raises:
        AgreedError: the journal cannot be read or records other settings, or the disk is full.
    """
    return _agree_writing(staging, lambda: StoreWriter(manifest, staging, journal) if world.is_main else None)


def write_store(
    files: list[NewFile],
    writer: "StoreWriter | None",
    staging: Staging,
    world: World,
    finish: Callable[["StoreWriter"], None] | None = None,
) -> None:
    """Compute and write the missing shards, check the store on the disk, and publish it; every rank calls it.

    Args:
        files: the files of the store.
        writer: from `open_writer`.
        staging: the staging folder, open on rank 0.
        world: the rank and world size of this process.
        finish: publishes the files if they are a part of a store; None for a whole store.

    Raises:
        AgreedError: a value is not finite, or the disk is full or returns different bytes than were written.
    """
    _write_shards(files, writer, staging, world)
    _read_back(files, writer, staging)
    if finish is None:
        _agree_writing(staging, lambda: writer.publish(files) if writer else None)
    else:
        _agree_writing(staging, lambda: finish(writer) if writer else None)


class StoreWriter:
    """The files of an unfinished store, with their finished shards; see `open_writer`."""

    def __init__(self, manifest: Manifest, staging: Staging, journal: Journal) -> None:
        self._staging = staging
        self._journal = journal
        self._manifest = manifest
        if not staging.ready.exists():  # an earlier process was killed between publishing and removing its journal
            journal.remove()
            staging.ready.mkdir()
        self._row_bytes = np.dtype(ENCODINGS[manifest.encoding].dtype).itemsize * len(manifest.columns)
        self._files = self._read_journal()
        self._checksums: dict[str, int] = {}

    def finished(self, name: str) -> tuple[int, int]:
        """Return the number of shards of a file on the disk, and the number of their rows."""
        file = self._file(name)
        return len(file.shards), file.rows

    def write(self, name: str, values: Values) -> None:
        """Write the next shard of a file and flush it, then add it to the journal.

        Raises:
            UserError: a value is not finite.
        """
        bad = np.flatnonzero(~np.isfinite(values.values_NC).all(-1))
        if len(bad):
            reason = f"its loss for token {values.start + bad[0]} of {name} is not finite"
            remedy = "Check the model's weights, or set training.precision=fp32"
            raise UserError("reference.path", self._manifest.scorer, reason, remedy)
        codes = encode(values.values_NC, self._manifest.encoding).tobytes()
        path = self._path(name)
        path.touch()
        with path.open("r+b") as stream:
            # A killed process may have left part of this shard, which the journal does not list.
            stream.seek(self._file(name).rows * self._row_bytes)
            stream.write(codes)
        sync(path)
        self._add_to_journal(name, values.values_NC, zlib.crc32(codes))

    def read_back(self, name: str) -> Iterator[None]:
        """Compare a file with what was written to it, one shard per step, then append the checksums of its blocks.

        Raises:
            UserError: the disk returned different bytes.
        """
        path, blocks = self._path(name), BlockChecksums(self._row_bytes)
        with path.open("r+b") as stream:
            for count, checksum in self._file(name).shards:
                data = stream.read(count * self._row_bytes)
                if zlib.crc32(data) != checksum:
                    reason = f"the disk returned different bytes than were written to {path}"
                    remedy = f"Remove {self._staging.folder} and score again on another disk"
                    raise UserError(self._staging.setting, self._staging.output, reason, remedy)
                blocks.feed(data)
                yield
            table = blocks.table()
            stream.truncate()
            stream.write(table)
        self._checksums[name] = zlib.crc32(table)
        yield

    def publish(self, files: list[NewFile]) -> None:
        """Write the manifest, publish the store, and log its contents."""
        publish_store(replace(self._manifest, files=[self._entry(file) for file in files]), self._staging)

    def progress(self) -> dict[str, dict[str, Any]]:
        """Return the fields of `FileProgress` of every file, as JSON values."""
        return {name: asdict(file) for name, file in self._files.items()}

    def _entry(self, new: NewFile) -> FileEntry:
        prefix, sha256 = (new.corpus.prefix, new.corpus.sha256) if new.corpus else ("", {})
        entry = FileEntry(new.name, 0, prefix, sha256)
        return self._file(new.name).complete(entry, self._manifest.columns, self._checksums[new.name])

    def _add_to_journal(self, name: str, values_NC: NDArray[np.float32], checksum: int) -> None:
        clipped = int((values_NC > ENCODINGS[self._manifest.encoding].largest).sum())
        totals = values_NC.sum(0, dtype=np.float64).tolist()
        self._files.setdefault(name, FileProgress()).add(len(values_NC), checksum, totals, clipped)
        self._journal.write({"files": self.progress()})

    def _read_journal(self) -> "dict[str, FileProgress]":
        progress = self._journal.read()
        try:
            files = {} if progress is None else progress["files"]
            return {name: FileProgress(**fields) for name, fields in files.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._journal.unusable(f"its journal cannot be read ({error})") from error

    def _file(self, name: str) -> "FileProgress":
        return self._files.get(name, FileProgress())

    def _path(self, name: str) -> Path:
        return self._staging.ready / f"{name}.scores"


@dataclass
class FileProgress:
    """The finished part of one file.

    shards   rows and CRC-32 of each finished shard
    clipped  number of values above the largest of the encoding
    sums     sum of each column
    totals   sum of each column in each finished shard; earlier versions did not write them
    """

    shards: list[tuple[int, int]] = field(default_factory=list)
    clipped: int = 0
    sums: list[float] = field(default_factory=list)
    totals: list[list[float]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Return the number of rows of the finished shards."""
        return sum(rows for rows, _ in self.shards)

    def add(self, rows: int, checksum: int, totals: list[float], clipped: int) -> None:
        """Add a finished shard."""
        self.shards.append((rows, checksum))
        self.totals.append(totals)
        self.clipped += clipped
        # One shard after another, so that a merge of parts gives the same sums to the last bit.
        self.sums = [before + more for before, more in zip(self.sums or [0.0] * len(totals), totals, strict=True)]

    def complete(self, entry: FileEntry, columns: list[str], checksum: int) -> FileEntry:
        """Return the entry of the file in the manifest, when all shards are finished.

        Args:
            entry: the name and the corpus.
            columns: the names of the columns.
            checksum: CRC-32 of the checksums of all blocks.
        """
        means = {column: total / self.rows for column, total in zip(columns, self.sums, strict=True)}
        return replace(entry, rows=self.rows, checksum=checksum, clipped=self.clipped, mean=means)


def publish_store(manifest: Manifest, staging: Staging) -> None:
    """Write the manifest beside the files in `ready`, publish the store, and log its contents."""
    (staging.ready / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    publish(staging.ready, staging.output)
    for entry in manifest.files:
        means = ", ".join(f"{column} {value:.4f}" for column, value in entry.mean.items())
        clipped = f"; values clipped by {manifest.encoding}: {entry.clipped:,}" if entry.clipped else ""
        logger.info("%s/%s: %d tokens, mean %s nats%s", staging.output, entry.name, entry.rows, means, clipped)
    logger.info("train with: reference.store=%s", staging.output)


def _write_shards(files: list[NewFile], writer: StoreWriter | None, staging: Staging, world: World) -> None:
    """Write the shards that are not on the disk yet."""
    finished: dict[str, tuple[int, int]]
    finished = gather_objects({file.name: writer.finished(file.name) for file in files} if writer else {})[0]
    total = sum(file.source.rows for file in files)
    left = total - sum(rows for _, rows in finished.values())
    if world.is_main:
        if left < total:
            logger.info("resuming after %s of %s tokens", f"{total - left:,}", f"{total:,}")
        shards = sum(file.source.num_shards - finished[file.name][0] for file in files)
        logger.info("scoring %s tokens into %s (shards: %d)", f"{left:,}", staging.output, shards)
    done = 0
    with Meter(left, "tokens", shown=world.is_main) as meter:
        for file in files:
            for number in range(finished[file.name][0], file.source.num_shards):
                values = file.source.values(number, meter.after(done))
                _agree_writing(staging, partial(writer.write, file.name, values) if writer else lambda: None)
                done += len(values.values_NC)
                meter.reach(done)


def _read_back(files: list[NewFile], writer: StoreWriter | None, staging: Staging) -> None:
    """Check every file on the disk. All ranks synchronize at every shard, so that none times out."""
    for file in files:
        steps = writer.read_back(file.name) if writer else repeat(None)
        for _ in range(file.source.num_shards + 1):
            _agree_writing(staging, partial(next, steps))


def _agree_writing(staging: Staging, work: Callable[[], T]) -> T:
    """Return the result of `work`; if it fails on a rank, raise the error on every rank.

    Raises:
        AgreedError: in place of a UserError or an OSError.
    """

    def write() -> T:
        with staging.writing():
            return work()

    return agree(write)
