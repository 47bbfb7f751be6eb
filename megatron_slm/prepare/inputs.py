"""Inputs: files and Hugging Face datasets, read as documents in chunks."""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_slm.errors import UserError, first_line, refuse_missing_folder
from megatron_slm.prepare.decompress import SUFFIXES, decompressed, make_fsspec_strict
from megatron_slm.prepare.documents import Fields, RawDocument

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_TEXT = {".txt", ".text", ".md"}
_TABLES = {".parquet"}
_BUFFER_BYTES = 1 << 20
_CHUNK_BYTES, _CHUNK_DOCUMENTS = 1_000_000, 256  # a chunk ends at either

# Characters that fsspec reads as a pattern or as a chain of URLs (datasets 5.2), and replacements that sort alike.
_PLAIN = {"*": "+", "?": ">", "[": "^", "\\": "_", "]": "`", "::": ":;"}
_SPECIAL = re.compile("|".join(map(re.escape, _PLAIN)))


class DamagedError(UserError):
    """An error for an input with damaged content, for example a truncated file."""


class Input(Protocol):
    """One shard of the input; after a kill, a shard is encoded again from its beginning, or not at all."""

    @property
    def name(self) -> str:
        """Return the name in errors and in the journal."""

    def stamp(self) -> list[int]:
        """Return the size in bytes and the time of the last change; an empty list if they are unknown."""

    def read(self, fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
        """Yield the documents, each with the bytes read so far; columns that ``fields`` does not need are skipped."""


class Chunk(NamedTuple):
    """Consecutive documents."""

    documents: list[RawDocument]
    position: int  # bytes of all inputs up to the end of the last document
    finished: int | None  # number of completely read inputs; None if the chunk ends inside one


@dataclass(frozen=True)
class InputFile:
    """A file, whose suffix decides its kind. ``option`` is the option that names it."""

    path: Path
    option: str = "--input"

    @property
    def name(self) -> str:
        """Return the path as it was given."""
        return str(self.path)

    def stamp(self) -> list[int]:
        """Return the size in bytes, and the time of the last change in nanoseconds.

        Raises:
            UserError: the file does not exist, for example because it is a dangling link.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return [status.st_size, status.st_mtime_ns]

    def read(self, fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
        """Yield the documents, each with the bytes of the file read so far.

        Raises:
            DamagedError: the file is truncated, or not of the kind that its suffix names.
            UserError: the file cannot be read.
        """
        kind, compression = _kind(self.path)
        try:
            with self.path.open("rb") as file, decompressed(file, compression) if compression else file as stream:
                if kind in _TABLES:
                    yield from self._rows(stream, fields)
                elif kind in _JSON_LINES:
                    for number, line in enumerate(stream, 1):
                        yield RawDocument(self.name, number, line), file.tell()
                else:
                    yield RawDocument(self.name, 0, stream.read()), file.tell()
        except (OSError, EOFError) as error:
            raise self._unreadable(error) from error

    def _rows(self, stream: IO[bytes], fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
        """Yield the rows of a parquet file, decoding a few at a time."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with _seekable(stream) as seekable, ParquetFile(seekable, pre_buffer=False) as table:
                columns = _columns(self.name, table.schema_arrow.names, fields) if fields else None
                number, size, rows = 0, self.path.stat().st_size, max(1, table.metadata.num_rows)
                for batch in table.iter_batches(batch_size=_CHUNK_DOCUMENTS, columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield RawDocument(self.name, number, row), size * number // rows
        except (ArrowException, UnicodeError) as error:
            reason = f"it is not a valid parquet file ({first_line(error)})"
            raise DamagedError(self.option, self.name, reason, "Fetch or write it again") from error

    def _unreadable(self, error: Exception) -> UserError:
        # An OSError with errno comes from the operating system, any other error from the content.
        kind = UserError if isinstance(error, OSError) and error.errno is not None else DamagedError
        return kind(self.option, self.name, f"it cannot be read ({error})", "Fetch or write it again")


@dataclass(frozen=True)
class DatasetShard:
    """One shard of a Hugging Face dataset, streamed."""

    dataset: "IterableDataset"
    title: str
    index: int
    shards: int
    links: "tempfile.TemporaryDirectory[str] | None" = None
    """Links to the files of the dataset under plain names; they must exist as long as this object."""

    @property
    def name(self) -> str:
        """Return the dataset's name and the shard's number."""
        return f"{self.title} shard {self.index + 1} of {self.shards}"

    def stamp(self) -> list[int]:
        """Return an empty list: nothing is known before the shard is read."""
        return []

    def read(self, fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
        """Yield the rows, each with the bytes of text so far.

        Raises:
            UserError: the rows cannot be fetched or parsed.
        """
        columns: list[str] = []
        done = 0
        try:
            for number, row in enumerate(self.dataset.shard(self.shards, self.index), 1):
                columns = columns or (_columns(self.title, list(row), fields) if fields else list(row))
                record = {key: row[key] for key in columns if key in row}
                done += _size(record)
                yield RawDocument(self.name, number, record), done
        except UserError:
            raise
        except Exception as error:  # the errors of each format's reader
            reason = f"it cannot be read ({first_line(error)})"
            raise UserError("--dataset", self.name, reason, "Fetch its files again") from error


def find_files(names: list[str], option: str = "--input") -> list[Input]:
    """Return the named files, and for each folder all files below it with a known suffix, sorted.

    Raises:
        UserError: a path does not exist, or a folder holds no file with a known suffix.
    """
    return [InputFile(path, option) for name in names for path in _files_at(Path(name), option)]


def find_dataset(name: str, config: str | None, split: str) -> list[Input]:
    """Return the shards of a Hugging Face dataset: a hub name, or a local folder.

    Raises:
        UserError: the dataset, its configuration or its split is not found, or the hub cannot be reached.
    """
    from datasets import load_dataset

    refuse_missing_folder("--dataset", name)
    make_fsspec_strict()
    links = link_plain_names(Path(name)) if Path(name).is_dir() else None
    try:
        dataset = load_dataset(links.name if links else name, config, split=split, streaming=True)
    except ConnectionError as error:
        remedy = "Check the name and the connection, or fetch its files and give them with --input"
        raise UserError("--dataset", name, f"it cannot be reached ({first_line(error)})", remedy) from error
    except Exception as error:  # the errors of each format's reader, or of a dataset that comes with code
        reason = f"its split '{split}' cannot be opened ({first_line(error)})"
        remedy = "Check the name, --dataset-config and --dataset-split"
        raise UserError("--dataset", name, reason, remedy) from error
    title = ":".join(filter(None, (name, config, split)))
    return [DatasetShard(dataset, title, index, dataset.num_shards, links) for index in range(dataset.num_shards)]


def read_documents(source: Input, fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
    """Yield the documents of an input; a ``DamagedError`` becomes a last document that stands for the rest."""
    position = 0
    try:
        for document, position in source.read(fields):
            yield document, position
    except DamagedError as error:
        yield RawDocument(source.name, 0, error), position


def read_chunks(inputs: Iterable[Input], fields: Fields, finished: int = 0) -> Iterator[Chunk]:
    """Yield the documents of the inputs, in order, in chunks of about one megabyte.

    Unless an input is small, its end also ends a chunk, so that the input can be recorded as finished.

    Args:
        inputs: the inputs to read.
        fields: the keys of the records.
        finished: number of inputs before these.
    """
    documents: list[RawDocument] = []
    size = done = 0
    for source in inputs:
        position = 0
        for document, position in read_documents(source, fields):
            documents.append(document)
            size += _size(document.content)
            if size >= _CHUNK_BYTES or len(documents) >= _CHUNK_DOCUMENTS:
                yield Chunk(documents, done + position, None)
                documents, size = [], 0
        done += position
        finished += 1
        if size >= _CHUNK_BYTES // 8 or not documents:
            yield Chunk(documents, done, finished)
            documents, size = [], 0
    if documents:
        yield Chunk(documents, done, finished)


def _files_at(path: Path, option: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        remedy = "Give jsonl, text or parquet files, plain, .gz or .zst"
        raise UserError(option, path, "it is not a file or folder", remedy)
    try:
        found = sorted(_walk(path))
    except OSError as error:
        raise UserError(option, path, f"it cannot be read ({error})", "Allow this user to read it") from error
    known = [below for below in found if _kind(below)[0] in _JSON_LINES | _TEXT | _TABLES]
    if not known:
        suffixes = " ".join(sorted(_JSON_LINES | _TEXT | _TABLES))
        remedy = f"Give files with one of the suffixes {suffixes}, each also with .gz or .zst"
        raise UserError(option, path, "it holds no file of a known kind", remedy)
    if len(known) < len(found):
        logger.info("%s: %d files with other suffixes are skipped", path, len(found) - len(known))
    return known


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, except hidden ones, such as staging folders and the caches of tools."""
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (path for path in (Path(root, name) for name in folders) if path.is_symlink()):
            logger.warning("%s is a link to a folder and is not followed. Name it as an input to read it.", link)
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> tuple[str, str | None]:
    """Return the suffix that gives the kind of a file, and its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = SUFFIXES.get(suffixes[-1]) if suffixes else None
    kinds = suffixes[:-1] if compression else suffixes[-1:]
    return (kinds[-1] if kinds else ""), compression


@contextlib.contextmanager
def _seekable(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as unpacked:  # a parquet file is read from its end
        shutil.copyfileobj(stream, unpacked, _BUFFER_BYTES)
        yield unpacked


def _columns(title: str, names: list[str], fields: Fields) -> list[str]:
    for option, column in fields.needed().items():
        if not {column, column.partition(".")[0]} & set(names):
            raise UserError(option, column, f"{title} has no such column", f"Choose one of {sorted(names)}")
    needed = fields.columns()
    return [name for name in names if name in needed]


def _size(content: bytes | dict[str, Any] | UserError) -> int:
    if isinstance(content, bytes):
        return len(content)
    if isinstance(content, UserError):
        return 0
    return sum(len(value) for value in content.values() if isinstance(value, str))


def link_plain_names(folder: Path) -> "tempfile.TemporaryDirectory[str] | None":
    """Return a new folder of links to all files below ``folder`` under plain names; None if all names are plain.

    `datasets` reads special names as patterns or URLs. The links keep the order of the files, and are removed with the
    returned object.
    """
    found = [Path(root, name) for root, below, names in os.walk(folder) for name in (*names, *_links(root, below))]
    if not any(_SPECIAL.search(str(path)) for path in (folder.resolve(), *found)):
        return None
    plain = tempfile.TemporaryDirectory(prefix="dataset-")
    for path in sorted(found):
        link = Path(plain.name, _SPECIAL.sub(lambda match: _PLAIN[match[0]], str(path.relative_to(folder))))
        link.parent.mkdir(parents=True, exist_ok=True)
        _free(link).symlink_to(path.resolve())
    return plain


def _links(root: str, folders: list[str]) -> list[str]:
    return [name for name in folders if Path(root, name).is_symlink()]


def _free(path: Path) -> Path:
    """Return the path or, if it is taken, a free one with a number in front, which keeps the suffix."""
    number, free = 1, path
    while free.is_symlink():
        number += 1
        free = path.with_name(f"{number}-{path.name}")
    return free
