"""Links to the files of a folder, under names that `datasets` reads as names and not as patterns or URLs."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_slm.errors import UserError, refuse_missing_folder
from megatron_slm.prepare.decompress import SUFFIXES, decompressed, make_fsspec_strict
from megatron_slm.prepare.documents import Damage, Fields, RawDocument

if TYPE_CHECKING:
    from datasets import IterableDataset


# What fsspec reads as a pattern, or as a chain of URLs (datasets 5.2), and characters that sort as these do.
_PLAIN = {"*": "+", "?": ">", "[": "^", "\\": "_", "]": "`", "::": ":;"}
_SPECIAL = re.compile("|".join(map(re.escape, _PLAIN)))


def link_plain_names(folder: Path) -> "tempfile.TemporaryDirectory[str] | None":
    """Return a new folder of links to all files below ``folder``, or None if no name there is special.

    The files keep their order. The links are removed with the object that is returned.
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
    """Return the path, or where it is taken another one; the number comes first, for suffixes say what a file holds."""
    number, free = 1, path
    while free.is_symlink():
        number += 1
        free = path.with_name(f"{number}-{path.name}")
    return free


logger = logging.getLogger(__name__)

_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_TEXT = {".txt", ".text", ".md"}
_TABLES = {".parquet"}
_BUFFER_BYTES = 1 << 20
_CHUNK_BYTES, _CHUNK_DOCUMENTS = 1_000_000, 256  # a chunk ends at either


class DamagedError(UserError):
    """An input whose content is damaged, for instance because it was cut."""


class Input(Protocol):
    """One shard of the input: what is encoded again, or not at all, after a kill."""

    @property
    def name(self) -> str:
        """How messages and the journal call it."""

    def stamp(self) -> list[int]:
        """What changes when its content does: size in bytes and time of change, as far as they are known."""

    def read(self, fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
        """Yield the documents, each with the bytes read so far; ``fields`` may spare other columns of a table."""


class Chunk(NamedTuple):
    """Consecutive documents."""

    documents: list[RawDocument]
    position: int  # bytes of all inputs that are read once these are
    finished: int | None  # inputs read to their end, where the last of these documents ends one


@dataclass(frozen=True)
class InputFile:
    """A file; its suffix says what it holds. ``option`` is the one that named it."""

    path: Path
    option: str = "--input"

    @property
    def name(self) -> str:
        """The path as it was given."""
        return str(self.path)

    def stamp(self) -> list[int]:
        """Bytes, and nanoseconds of the last change.

        Raises:
            UserError: there is no such file, as where a link leads nowhere.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return [status.st_size, status.st_mtime_ns]

    def read(self, fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
        """Yield the documents, each with the bytes of the file read so far.

        Raises:
            DamagedError: the file is not what its name says, or not whole.
            UserError: it cannot be read.
        """
        kind, compression = _kind(self.path)
        try:
            with self.path.open("rb") as file, _decompressed(file, compression) as stream:
                if kind in _TABLES:
                    yield from self._rows(stream, fields)
                elif kind in _JSON_LINES:
                    for number, line in enumerate(stream, 1):
                        yield RawDocument(self.name, number, line), file.tell()
                else:
                    yield RawDocument(self.name, 0, stream.read()), file.tell()
        except (OSError, EOFError) as error:
            raise self._unreadable(error) from error  # an OSError with a number is the system's, not the file's

    def _rows(self, stream: IO[bytes], fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
        """The rows of a parquet file, decoded a few at a time out of one row group after the other."""
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
            raise DamagedError(
                f"{self.option} {self.path} is no sound parquet file ({_first_line(error)}): write it again"
            ) from error

    def _unreadable(self, error: Exception) -> UserError:
        kind = UserError if isinstance(error, OSError) and error.errno is not None else DamagedError
        return kind(f"{self.option} {self.path} cannot be read ({error}): fetch or write it again")


@dataclass(frozen=True)
class DatasetShard:
    """One shard of a Hugging Face data set, streamed."""

    dataset: "IterableDataset"
    title: str
    index: int
    shards: int
    links: "tempfile.TemporaryDirectory[str] | None" = None
    """The files of the data set under other names, which last as long as this object."""

    @property
    def name(self) -> str:
        """The data set's name and the shard's number."""
        return f"{self.title} shard {self.index + 1} of {self.shards}"

    def stamp(self) -> list[int]:
        """Nothing is known before it is read."""
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
        except Exception as error:  # of the format's own reader: cut .gz files, damaged tables
            raise UserError(f"--dataset {self.name} cannot be read ({_first_line(error)})") from error


def find_files(names: list[str], option: str = "--input") -> list[Input]:
    """Return the files named, and for a folder all files below it with a known suffix, in sorted order.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    return [InputFile(path, option) for name in names for path in _files_at(Path(name), option)]


def find_dataset(name: str, config: str | None, split: str) -> list[Input]:
    """Return the shards of a Hugging Face data set: a hub name, or a local folder.

    Raises:
        UserError: it is not found, its configuration or split is not, or the hub cannot be reached.
    """
    from datasets import load_dataset

    refuse_missing_folder("--dataset", name)
    make_fsspec_strict()
    links = link_plain_names(Path(name)) if Path(name).is_dir() else None
    try:
        dataset = load_dataset(links.name if links else name, config, split=split, streaming=True)
    except ConnectionError as error:
        raise UserError(
            f"--dataset {name} cannot be reached ({_first_line(error)}): check the name and the connection, "
            "or fetch its files and give them with --input"
        ) from error
    except Exception as error:  # of the format's own reader, or that a script would have to run
        raise UserError(
            f"--dataset {name} with split '{split}' cannot be opened ({_first_line(error)}): check the name, "
            "--dataset-config and --dataset-split"
        ) from error
    title = ":".join(filter(None, (name, config, split)))
    return [DatasetShard(dataset, title, index, dataset.num_shards, links) for index in range(dataset.num_shards)]


def read_documents(source: Input, fields: Fields | None) -> Iterator[tuple[RawDocument, int]]:
    """Yield what ``source.read`` does, and in place of a ``DamagedError`` a last document that stands for the rest."""
    position = 0
    try:
        for document, position in source.read(fields):
            yield document, position
    except DamagedError as error:
        yield RawDocument(source.name, 0, Damage(str(error))), position


def read_chunks(inputs: Iterable[Input], fields: Fields, finished: int = 0) -> Iterator[Chunk]:
    """Yield the documents of the inputs, in order, in pieces of about one megabyte.

    An input of some size ends its piece, so that it can be counted as finished.

    Args:
        finished: inputs that came before these.
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
        raise UserError(f"{option} {path} is not a file or folder: give jsonl, text or parquet, plain, .gz or .zst")
    try:
        found = sorted(_walk(path))
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read ({error})") from error
    known = [below for below in found if _kind(below)[0] in _JSON_LINES | _TEXT | _TABLES]
    if not known:
        suffixes = " ".join(sorted(_JSON_LINES | _TEXT | _TABLES))
        raise UserError(f"{option} {path} holds no file that is read ({suffixes}, each also .gz or .zst)")
    if len(known) < len(found):
        logger.info("%s: %d files of other suffixes are left out", path, len(found) - len(known))
    return known


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder. What is hidden is none of the user's texts: work in progress, a tool's copies."""
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (path for path in (Path(root, name) for name in folders) if path.is_symlink()):
            logger.warning("%s is a link to a folder and is not followed: name it too, if it is to be read", link)
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> tuple[str, str | None]:
    """The suffix that says what a file holds, and how it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = SUFFIXES.get(suffixes[-1]) if suffixes else None
    kinds = suffixes[:-1] if compression else suffixes[-1:]
    return (kinds[-1] if kinds else ""), compression


@contextlib.contextmanager
def _decompressed(file: IO[bytes], compression: str | None) -> Iterator[IO[bytes]]:
    if compression is None:
        yield file
        return
    with decompressed(file, compression) as stream:
        yield stream


@contextlib.contextmanager
def _seekable(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as unpacked:  # parquet begins at its end
        while block := stream.read(_BUFFER_BYTES):
            unpacked.write(block)
        yield unpacked


def _columns(title: str, names: list[str], fields: Fields) -> list[str]:
    for option, column in fields.needed().items():
        if not {column, column.partition(".")[0]} & set(names):
            raise UserError(f"{title} has no column {column!r}: choose one of {sorted(names)} with {option}")
    needed = fields.columns()
    return [name for name in names if name in needed]


def _size(content: bytes | dict[str, Any] | Damage) -> int:
    if isinstance(content, bytes | Damage):
        return len(content)
    return sum(len(value) for value in content.values() if isinstance(value, str))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
