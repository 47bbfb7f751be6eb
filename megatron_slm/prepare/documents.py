"""Which characters of a document are learned from: the completion of a prompt, the assistant's turns of a chat."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

Span = tuple[int, int]  # half-open, in characters


class Answered(NamedTuple):
    """A text, and the spans of it that count, in order and apart."""

    text: str
    spans: tuple[Span, ...]


def join_completion(prompt: str, separator: str, completion: str, place: str) -> Answered:
    """Return prompt, separator and completion as one text, of which the completion counts.

    Raises:
        UserError: nothing is answered.
    """
    if not completion.strip():
        raise UserError(f"{place} has an empty answer: give one, or remove the record")
    before = prompt + separator
    return Answered(before + completion, ((len(before), len(before) + len(completion)),))


def render_chat(tokenizer: "PreTrainedTokenizerFast", messages: Any, place: str) -> Answered:
    """Return a chat as the tokenizer's template writes it; what each turn of the assistant adds to it counts.

    That is what follows when the turns before are rendered with ``add_generation_prompt``: what the
    model will have to write, the end of its turn included.

    Raises:
        UserError: it is no list of messages, the assistant says nothing, or the template refuses it
            or changes what it wrote before.
    """
    turns = _checked(messages, place)
    text = _rendered(tokenizer, turns, place)
    spans = []
    for number in (index for index, turn in enumerate(turns) if turn["role"] == "assistant"):
        before = _rendered(tokenizer, turns[:number], place, add_generation_prompt=True)
        after = _rendered(tokenizer, turns[: number + 1], place)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"{place} is no chat whose answers can be found: the chat template changes what it wrote before "
                f"message {number + 1}; give a tokenizer whose template only appends"
            )
        spans.append((len(before), len(after)))
    return Answered(text, tuple(spans))


def token_mask(begins: Sequence[int], spans: tuple[Span, ...]) -> np.ndarray:
    """uint8: 1 for each token whose first character lies in a span."""
    begin_N = np.asarray(begins, dtype=np.int64)
    mask_N = np.zeros(len(begin_N), dtype=bool)
    for first, last in spans:
        mask_N |= (begin_N >= first) & (begin_N < last)
    return mask_N.astype(np.uint8)


def _checked(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise UserError(f'{place} has no list of messages, each {{"role": ..., "content": ...}}: correct it')
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        roles = sorted({message["role"] for message in messages})
        raise UserError(f"{place} has no message of the role 'assistant', only of {roles}: nothing would be learned")
    if any(not _says_something(turn) for turn in answers):
        raise UserError(f"{place} has an empty answer of the assistant: give one, or remove the record")
    # Parquet fills in keys that other messages have; templates ask whether a key is there.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _says_something(turn: dict[str, Any]) -> bool:
    content = turn.get("content")
    return bool(turn.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


def _rendered(
    tokenizer: "PreTrainedTokenizerFast",
    turns: list[dict[str, Any]],
    place: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template is a program of the tokenizer's author
        raise UserError(f"{place} is refused by the tokenizer's chat template ({error}): correct it") from error


Format = Literal["text", "prompt-completion", "messages"]

_LICENSE_KEYS = ("license", "licence")
_LABEL_CHARACTERS = 200  # of a source or a licence: enough for a name, and memory stays bounded


@dataclass(frozen=True)
class Fields:
    """Where a record holds what is read of it; ``meta.source`` is ``source`` of the object under ``meta``."""

    text: str = "text"
    by: str | None = None  # one corpus for each of its values
    source: str = "source"  # counted in PREFIX.json; also looked for under ``meta``
    format: Format = "text"  # which of text, prompt and completion, and messages is read
    prompt: str = "prompt"
    completion: str = "completion"
    separator: str = ""  # written between prompt and completion
    messages: str = "messages"

    @property
    def masked(self) -> bool:
        """Whether only answers count."""
        return self.format != "text"

    def needed(self) -> dict[str, str]:
        """The fields that every record must have, by the option that names each."""
        needed = {
            "text": {"--json-key": self.text},
            "prompt-completion": {"--prompt-key": self.prompt, "--completion-key": self.completion},
            "messages": {"--messages-key": self.messages},
        }[self.format]
        return needed | ({} if self.by is None else {"--by": self.by})

    def columns(self) -> set[str]:
        """The top-level columns of a table that may be needed."""
        names = {*self.needed().values(), self.source, "meta", *_LICENSE_KEYS}
        return names | {name.partition(".")[0] for name in names}


class Damage(str):
    """A sentence in place of the documents that could not be read because their file is damaged."""


class RawDocument(NamedTuple):
    """One document as it was read, and where."""

    file: str
    line: int  # line or row, from 1; 0: the whole file is the document
    content: bytes | dict[str, Any] | Damage  # bytes: plain text (line 0) or JSON; dict: a row of a table

    @property
    def place(self) -> str:
        """How an error message names it: FILE:LINE, or FILE."""
        return f"{self.file}:{self.line}" if self.line else self.file


class Document(NamedTuple):
    """The parts of a record that are used."""

    text: str
    group: str = ""  # its value of the field ``by``
    source: str | None = None
    license: str | None = None
    spans: tuple[Span, ...] | None = None  # characters that count; None: all of them


def decode_document(raw: RawDocument, fields: Fields, tokenizer: "PreTrainedTokenizerFast | None" = None) -> Document:
    """Return what a document says; a blank line has no text.

    Args:
        raw: as it was read.
        fields: where it holds what.
        tokenizer: whose chat template writes messages as text; other formats need none.

    Raises:
        UserError: it is not UTF-8 or not a JSON object, or it lacks a text, an answer or a value to sort by.
    """
    record = decode_record(raw, fields.text)
    if record is None:
        return Document("")
    if fields.masked:
        text, spans = _answered(raw, record, fields, tokenizer)
    else:
        text, spans = _string(raw, record, "--json-key", fields.text), None
    _refuse_half_characters(raw, text)
    group = _group(raw, record, fields.by) if fields.by and text else ""
    return Document(text, group, _label(record, fields.source), _label(record, *_LICENSE_KEYS), spans)


def decode_record(raw: RawDocument, text_key: str) -> dict[str, Any] | None:
    """Return the document as a record; None for a blank line. A text file is its text under ``text_key``.

    Raises:
        UserError: it is not UTF-8, its line is not a JSON object, or it stands for damage.
    """
    if isinstance(raw.content, Damage):
        raise UserError(raw.content)
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


def _answered(
    raw: RawDocument, record: dict[str, Any], fields: Fields, tokenizer: "PreTrainedTokenizerFast | None"
) -> Answered:
    if not raw.line:
        raise UserError(f"{raw.place} is plain text, without an answer in it: give jsonl or parquet to --format")
    if fields.format == "messages":
        assert tokenizer is not None
        messages = _value(raw, record, "--messages-key", fields.messages)
        if messages is None:
            raise UserError(
                f"{raw.place} has no messages under {fields.messages!r}, but null: correct it, or remove it"
            )
        return render_chat(tokenizer, messages, raw.place)
    prompt = _string(raw, record, "--prompt-key", fields.prompt)
    completion = _string(raw, record, "--completion-key", fields.completion)
    return join_completion(prompt, fields.separator, completion, raw.place)


def _value(raw: RawDocument, record: dict[str, Any], option: str, key: str) -> Any:
    lack = _lack(record, key)
    if lack is None:
        return lookup(record, key)
    if lack.keys:
        raise UserError(f"{raw.place} has {lack.cause}: choose one of {lack.keys} with {option}")
    raise UserError(f"{raw.place} has {lack.cause}, and {option} is {key!r}: correct it, or choose another {option}")


def _string(raw: RawDocument, record: dict[str, Any], option: str, key: str) -> str:
    value = _value(raw, record, option, key)
    if not isinstance(value, str):
        found = _in_words(value)
        raise UserError(f"{raw.place} has no text under {key!r}, but {found}: correct it, or choose another {option}")
    return value


class _Lack(NamedTuple):
    """Why a record has no value at a path."""

    cause: str
    keys: list[str]  # the paths that it has instead


def _lack(record: dict[str, Any], path: str, above: str = "") -> _Lack | None:
    """Return why ``lookup`` finds nothing at a path, or None if the path is there, though its value may be null."""
    if path in record:
        return None
    head, _, rest = path.partition(".")
    if not rest or head not in record:
        under = f" under {above.removesuffix('.')!r}" if above else ""
        return _Lack(f"no key {path!r}{under}", sorted(above + key for key in record))
    inner = record[head]
    if isinstance(inner, dict):
        return _lack(inner, rest, f"{above}{head}.")
    return _Lack(f"{_in_words(inner)} under {above + head!r}", [])


def _in_words(value: Any) -> str:
    """Return what a value of JSON is called."""
    words = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else words.get(type(value), f"a {type(value).__name__}")


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
        lack = _lack(record, by)
        found = f"but {_in_words(value)}" if lack is None else f"because it has {lack.cause}"
        raise UserError(
            f"{raw.place} has no single value under {by!r}, {found}: correct it, or choose another field with --by"
        )
    return str(value).encode(errors="replace").decode()


def _label(record: dict[str, Any], *keys: str) -> str | None:
    for key in (*keys, *(f"meta.{key}" for key in keys)):
        value = lookup(record, key)
        if value is not None and not isinstance(value, dict | list):
            return str(value)[:_LABEL_CHARACTERS].encode(errors="replace").decode()
    return None
