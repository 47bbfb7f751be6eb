"""Which characters of a document are learned from: the completion of a prompt, the assistant's turns of a chat."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
