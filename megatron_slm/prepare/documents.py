"""Documents: the text of a record, and the spans of its characters that count toward the loss.

Of a prompt with its completion, only the completion counts; of a chat, only the assistant's turns.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]  # half-open, in characters
Format = Literal["text", "prompt-completion", "messages"]

_LICENSE_KEYS = ("license", "licence")
_LABEL_CHARACTERS = 200  # of a source or a license: enough for a name, and a bound on memory


class Answered(NamedTuple):
    """A text, and its spans that count toward the loss, in order and disjoint."""

    text: str
    spans: tuple[Span, ...]


def join_completion(prompt: str, separator: str, completion: str, place: str) -> Answered:
    """Return prompt, separator and completion as one text; only the completion counts.

    Raises:
        UserError: the completion is empty.
    """
    if not completion.strip():
        raise bad_document(place, "its answer is empty", "Add an answer, or remove the record")
    before = prompt + separator
    return Answered(before + completion, ((len(before), len(before) + len(completion)),))


def render_chat(tokenizer: "PreTrainedTokenizerFast", messages: Any, place: str) -> Answered:
    """Render a chat with the tokenizer's template; only the assistant's turns count.

    A turn is the text after the earlier turns and the generation prompt (``add_generation_prompt``). It is the text
    that the model has to write, including the end of the turn.

    Raises:
        UserError: ``messages`` is not a list of messages, an answer of the assistant is missing or empty, or the
            template fails or changes earlier turns.
    """
    turns = _check_messages(messages, place)
    text = _render(tokenizer, turns, place)
    spans = []
    for number in (index for index, turn in enumerate(turns) if turn["role"] == "assistant"):
        before = _render(tokenizer, turns[:number], place, add_generation_prompt=True)
        after = _render(tokenizer, turns[: number + 1], place)
        if not (after.startswith(before) and text.startswith(after)):
            reason = f"the chat template changes earlier text at message {number + 1}, so its answers cannot be found"
            raise bad_document(place, reason, "Give a tokenizer whose template only appends")
        spans.append((len(before), len(after)))
    return Answered(text, tuple(spans))


def token_mask(begins: Sequence[int], spans: tuple[Span, ...]) -> np.ndarray:
    """Return uint8 `[len(begins)]`, 1 for each token whose first character lies in a span."""
    begin_N = np.asarray(begins, dtype=np.int64)
    mask_N = np.zeros(len(begin_N), dtype=bool)
    for first, last in spans:
        mask_N |= (begin_N >= first) & (begin_N < last)
    return mask_N.astype(np.uint8)


def bad_document(place: str, reason: str, remedy: str) -> UserError:
    """Return the error for a document that cannot be used.

    Args:
        place: FILE:LINE, or FILE.
        reason: why it cannot be used.
        remedy: what to do, other than --skip-bad.
    """
    return UserError("document", place, reason, remedy)


def _check_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise bad_document(place, "it is not a list of messages", 'Give a list of {"role": ..., "content": ...}')
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        roles = sorted({message["role"] for message in messages})
        reason = f"it has no message with the role 'assistant', only {roles}"
        raise bad_document(place, reason, "Add an answer, or remove the record")
    if any(not _has_content(turn) for turn in answers):
        raise bad_document(place, "an answer of the assistant is empty", "Add an answer, or remove the record")
    # Parquet adds the keys of other messages, with null; templates test for the presence of keys.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _has_content(turn: dict[str, Any]) -> bool:
    content = turn.get("content")
    return bool(turn.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


def _render(
    tokenizer: "PreTrainedTokenizerFast",
    turns: list[dict[str, Any]],
    place: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template is a program of the tokenizer's author
        raise bad_document(place, f"the tokenizer's chat template rejects it ({error})", "Correct it") from error


@dataclass(frozen=True)
class Fields:
    """The keys of a record's parts; ``meta.source`` is the key ``source`` of the object under ``meta``."""

    text: str = "text"
    by: str | None = None  # one corpus is made for each of its values
    source: str = "source"  # counted in PREFIX.json; also looked for under ``meta``
    format: Format = "text"  # decides which of these keys are read
    prompt: str = "prompt"
    completion: str = "completion"
    separator: str = ""  # written between prompt and completion
    messages: str = "messages"

    @property
    def masked(self) -> bool:
        """Return True if only answers count toward the loss."""
        return self.format != "text"

    def needed(self) -> dict[str, str]:
        """Return the keys that every record must have, by option."""
        needed = {
            "text": {"--json-key": self.text},
            "prompt-completion": {"--prompt-key": self.prompt, "--completion-key": self.completion},
            "messages": {"--messages-key": self.messages},
        }[self.format]
        return needed | ({} if self.by is None else {"--by": self.by})

    def columns(self) -> set[str]:
        """Return the top-level columns of a table that may be needed."""
        names = {*self.needed().values(), self.source, "meta", *_LICENSE_KEYS}
        return names | {name.partition(".")[0] for name in names}


class RawDocument(NamedTuple):
    """One document as it was read, and its place."""

    file: str
    line: int  # line or row, from 1; 0 if the whole file is the document
    content: bytes | dict[str, Any] | UserError
    """Plain text (line 0), a line of JSON, a row of a table, or an error for the rest of a damaged file."""

    @property
    def place(self) -> str:
        """Return the name of the document in errors: FILE:LINE, or FILE."""
        return f"{self.file}:{self.line}" if self.line else self.file


class Document(NamedTuple):
    """The parts of a record that are used."""

    text: str
    group: str = ""  # the value of its field ``by``
    source: str | None = None
    license: str | None = None
    spans: tuple[Span, ...] | None = None  # characters that count; None if all do


def decode_document(raw: RawDocument, fields: Fields, tokenizer: "PreTrainedTokenizerFast | None" = None) -> Document:
    """Return the parts of a document; a blank line has an empty text.

    Args:
        raw: the document as it was read.
        fields: the keys of the record.
        tokenizer: the tokenizer whose template renders chats; None for other formats.

    Raises:
        UserError: the document is not UTF-8 or not a JSON object, or lacks a text, an answer or a value for --by.
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
    """Return a document as a record, or None for a blank line; the text of a text file gets the key ``text_key``.

    Raises:
        UserError: the document is not UTF-8, its line is not a JSON object, or its file is damaged.
    """
    if isinstance(raw.content, UserError):
        raise raw.content
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
    """Return the value at a key or a dotted path such as ``meta.source``; None if the path does not exist."""
    if path in record:
        return record[path]
    head, _, rest = path.partition(".")
    inner = record.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, dict) else None


def _answered(
    raw: RawDocument, record: dict[str, Any], fields: Fields, tokenizer: "PreTrainedTokenizerFast | None"
) -> Answered:
    if not raw.line:
        raise UserError("--format", fields.format, f"{raw.place} is plain text", "Give jsonl or parquet files")
    if fields.format == "messages":
        assert tokenizer is not None
        messages = _value(raw, record, "--messages-key", fields.messages)
        if messages is None:
            raise bad_document(raw.place, f"{fields.messages!r} is null", "Correct the record, or remove it")
        return render_chat(tokenizer, messages, raw.place)
    prompt = _string(raw, record, "--prompt-key", fields.prompt)
    completion = _string(raw, record, "--completion-key", fields.completion)
    return join_completion(prompt, fields.separator, completion, raw.place)


def _value(raw: RawDocument, record: dict[str, Any], option: str, key: str) -> Any:
    lack = _lack(record, key)
    if lack is None:
        return lookup(record, key)
    remedy = f"Choose one of {lack.keys}" if lack.keys else "Correct the record, or choose another key"
    raise UserError(option, key, f"{raw.place} has {lack.cause}", remedy)


def _string(raw: RawDocument, record: dict[str, Any], option: str, key: str) -> str:
    value = _value(raw, record, option, key)
    if not isinstance(value, str):
        reason = f"{raw.place} has {_in_words(value)} there instead of text"
        raise UserError(option, key, reason, "Correct the record, or choose another key")
    return value


class _Lack(NamedTuple):
    """The cause of a missing value at a path of a record."""

    cause: str
    keys: list[str]  # paths that exist instead


def _lack(record: dict[str, Any], path: str, above: str = "") -> _Lack | None:
    """Return why a record has no value at a path; None if the path exists, even if its value is null."""
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
    """Return the type of a JSON value, in words."""
    words = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else words.get(type(value), f"a {type(value).__name__}")


def _json_object(line: str, raw: RawDocument) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad_document(raw.place, f"it is not valid JSON ({error})", "Correct the line, or remove it") from error
    if not isinstance(record, dict):
        raise bad_document(raw.place, "it is not a JSON object", "Give one object per line, with its text under a key")
    return record


def _refuse_half_characters(raw: RawDocument, text: str) -> None:
    try:
        text.encode()  # fails for half of a surrogate pair, which JSON can spell
    except UnicodeError as error:
        raise _not_utf8(raw, error) from error


def _not_utf8(raw: RawDocument, error: UnicodeError) -> UserError:
    return bad_document(raw.place, f"it is not valid UTF-8 ({error})", "Convert it, or remove it")


def _group(raw: RawDocument, record: dict[str, Any], by: str) -> str:
    value = lookup(record, by)
    if value is None or isinstance(value, dict | list):
        lack = _lack(record, by)
        cause = f"{_in_words(value)} there instead of a single value" if lack is None else lack.cause
        raise UserError("--by", by, f"{raw.place} has {cause}", "Correct the record, or choose another field")
    return str(value).encode(errors="replace").decode()


def _label(record: dict[str, Any], *keys: str) -> str | None:
    for key in (*keys, *(f"meta.{key}" for key in keys)):
        value = lookup(record, key)
        if value is not None and not isinstance(value, dict | list):
            return str(value)[:_LABEL_CHARACTERS].encode(errors="replace").decode()
    return None
