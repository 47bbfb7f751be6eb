"""Documents as they stand in jsonl and text files, plain or gzipped."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_slm.errors import UserError

_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_CHUNK_BYTES, _CHUNK_DOCUMENTS = 1_000_000, 256  # a chunk ends at either


class RawDocument(NamedTuple):
    """One undecoded document, and where it was read."""

    file: str
    line: int  # from 1; 0: the whole file is the document
    content: bytes

    @property
    def place(self) -> str:
        """How an error message names it: FILE:LINE, or FILE."""
        return f"{self.file}:{self.line}" if self.line else self.file


class Chunk(NamedTuple):
    """Consecutive documents, and how many bytes of the input files are read once they are."""

    documents: list[RawDocument]
    position: int


def checked_input(path: Path) -> Path:
    """Return ``path``; raise UserError if no file is there."""
    if not path.is_file():
        raise UserError(f"--input {path} is not a file: give jsonl or text files, plain or .gz")
    return path


def read_documents(path: Path) -> Iterator[tuple[RawDocument, int]]:
    """Yield the file's documents, each with the bytes of the file read so far.

    Raises:
        UserError: the file cannot be read, or is not the gzip file that its name says.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    zipped = suffixes[-1:] == [".gz"]
    by_line = bool(_JSON_LINES & set(suffixes[:-1] if zipped else suffixes[-1:]))
    try:
        with path.open("rb") as file, gzip.open(file) if zipped else contextlib.nullcontext(file) as stream:
            if not by_line:
                yield RawDocument(str(path), 0, stream.read()), file.tell()
                return
            for number, line in enumerate(stream, 1):
                yield RawDocument(str(path), number, line), file.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--input {path} cannot be read ({error}): fetch or write it again") from error


def read_chunks(paths: list[Path]) -> Iterator[Chunk]:
    """Yield the documents of all files, in order, in pieces of about one megabyte."""
    documents: list[RawDocument] = []
    size = done = 0
    for path in paths:
        for document, position in read_documents(path):
            documents.append(document)
            size += len(document.content)
            if size >= _CHUNK_BYTES or len(documents) >= _CHUNK_DOCUMENTS:
                yield Chunk(documents, done + position)
                documents, size = [], 0
        done += path.stat().st_size
    if documents:
        yield Chunk(documents, done)


def decode_text(document: RawDocument, json_key: str) -> str:
    """Return the document's text; empty for a blank line.

    Raises:
        UserError: it is not UTF-8, or its line is not a JSON object with text under ``json_key``.
    """
    try:
        text = document.content.decode("utf-8-sig")
        if document.line:
            text = _json_text(text, json_key, document.place) if text.strip() else ""
        text.encode()  # fails where JSON spells half a character
    except UnicodeError as error:
        raise UserError(f"{document.place} is not valid UTF-8 ({error}): convert it, or remove it") from error
    return text


def _json_text(line: str, json_key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({error}): correct the line, or remove it") from error
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object: give one object a line, its text under {json_key!r}")
    if json_key not in record:
        raise UserError(f"{place} has no key {json_key!r}: choose one of {sorted(record)} with --json-key")
    if not isinstance(record[json_key], str):
        raise UserError(f"{place} has no text under {json_key!r}: correct the line, or choose another --json-key")
    return record[json_key]
