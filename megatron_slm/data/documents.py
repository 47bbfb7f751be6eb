"""What a document says: its text, the value it is sorted by, its source and its licence."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_slm.errors import UserError

_LICENSE_KEYS = ("license", "licence")
_LABEL_CHARACTERS = 200  # of a source or a licence: enough for a name, and memory stays bounded


@dataclass(frozen=True)
class Fields:
    """Where a record holds what is read of it; ``meta.source`` is ``source`` of the object under ``meta``."""

    text: str = "text"
    by: str | None = None  # one corpus for each of its values
    source: str = "source"  # counted in PREFIX.json; also looked for under ``meta``

    def columns(self) -> set[str]:
        """The top-level columns of a table that may be needed."""
        names = {self.text, self.by or self.text, self.source, "meta", *_LICENSE_KEYS}
        return names | {name.partition(".")[0] for name in names}


class RawDocument(NamedTuple):
    """One document as it was read, and where."""

    file: str
    line: int  # line or row, from 1; 0: the whole file is the document
    content: bytes | dict[str, Any]  # bytes: plain text (line 0) or JSON; dict: a row of a table

    @property
    def place(self) -> str:
        """How an error message names it: FILE:LINE, or FILE."""
        return f"{self.file}:{self.line}" if self.line else self.file


class Document(NamedTuple):
    """The parts of a record that count."""

    text: str
    group: str = ""  # its value of the field ``by``
    source: str | None = None
    license: str | None = None


def decode_document(raw: RawDocument, fields: Fields) -> Document:
    """Return what a document says; a blank line has no text.

    Raises:
        UserError: it is not UTF-8 or not a JSON object, or it lacks a text or a value to sort by.
    """
    record = decode_record(raw, fields.text)
    if record is None:
        return Document("")
    text = lookup(record, fields.text)
    if text is None and fields.text not in record:
        raise UserError(f"{raw.place} has no key {fields.text!r}: choose one of {sorted(record)} with --json-key")
    if not isinstance(text, str):
        raise UserError(f"{raw.place} has no text under {fields.text!r}: correct it, or choose another --json-key")
    _refuse_half_characters(raw, text)
    group = _group(raw, record, fields.by) if fields.by and text else ""
    return Document(text, group, _label(record, fields.source), _label(record, *_LICENSE_KEYS))


def decode_record(raw: RawDocument, text_key: str) -> dict[str, Any] | None:
    """Return the document as a record; None for a blank line. A text file is its text under ``text_key``.

    Raises:
        UserError: it is not UTF-8, or its line is not a JSON object.
    """
    if isinstance(raw.content, dict):
        return raw.content
    try:
        text = raw.content.decode("utf-8-sig")
    except UnicodeError as error:
        raise _not_utf8(raw, error) from error
    if not raw.line:
        return {text_key: text}
    return _json_object(text, raw) if text.strip() else None


def lookup(record: dict[str, Any], path: str) -> Any:
    """Return the value at a key or a dotted path such as ``meta.source``; None where there is none."""
    if path in record:
        return record[path]
    head, _, rest = path.partition(".")
    inner = record.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, dict) else None


def _json_object(line: str, raw: RawDocument) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{raw.place} is not valid JSON ({error}): correct the line, or remove it") from error
    if not isinstance(record, dict):
        raise UserError(f"{raw.place} is not a JSON object: give one object a line, its text under a key")
    return record


def _refuse_half_characters(raw: RawDocument, text: str) -> None:
    try:
        text.encode()  # fails where JSON spells half a character
    except UnicodeError as error:
        raise _not_utf8(raw, error) from error


def _not_utf8(raw: RawDocument, error: UnicodeError) -> UserError:
    return UserError(f"{raw.place} is not valid UTF-8 ({error}): convert it, or remove it")


def _group(raw: RawDocument, record: dict[str, Any], by: str) -> str:
    value = lookup(record, by)
    if value is None or isinstance(value, dict | list):
        raise UserError(f"{raw.place} has no single value under {by!r}: correct it, or choose another field with --by")
    return str(value).encode(errors="replace").decode()


def _label(record: dict[str, Any], *keys: str) -> str | None:
    for key in (*keys, *(f"meta.{key}" for key in keys)):
        value = lookup(record, key)
        if value is not None and not isinstance(value, dict | list):
            return str(value)[:_LABEL_CHARACTERS].encode(errors="replace").decode()
    return None
