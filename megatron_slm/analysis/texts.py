"""The text of observed tokens, and what kind of token each text is."""

import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_slm.data.observed import Observations
from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.reporting.tokens import token_texts

KINDS = ("digits", "words", "punctuation", "markup and symbols", "whitespace", "other scripts", "parts of characters")
_MARKUP = frozenset("<>{}[]\\|/=_^~`#*@&$%+")


def observed_texts(observed: Observations, run_dir: str) -> list[str]:
    """Return the text that each observed token adds to its passage.

    Args:
        observed: of the run.
        run_dir: its run directory, which holds the tokenizer.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(str(Path(run_dir) / "tokenizer"))
    tokens = observed.columns["token"].tolist()
    known: dict[tuple[int, ...], str] = {}
    return [text for rows in passages(observed) for text in token_texts(tokenizer, tokens[rows], known)]


def passages(observed: Observations) -> list[slice]:
    """Return the runs of rows that are consecutive tokens of one document."""
    columns = observed.columns
    starts_N = (
        (np.diff(columns["offset"]) != 1) | (np.diff(columns["document"]) != 0) | (np.diff(columns["corpus"]) != 0)
    )
    edges = [0, *(np.flatnonzero(starts_N) + 1).tolist(), len(observed)]
    return [slice(first, last) for first, last in pairwise(edges)]


def kind_of(text: str) -> str:
    """Return the kind of a token, one of `KINDS`, by its text without outer spaces.

    digits               only digits, and signs within numbers: 12, 3.5
    words                letters of the Latin script, with apostrophes and hyphens
    punctuation          only punctuation marks of prose
    markup and symbols   a mark of code, markup or mathematics, or another symbol
    whitespace           nothing else
    other scripts        letters of another script
    parts of characters  no text of its own: a part of a character that the next tokens complete
    """
    inner = text.strip()
    if not text:
        return "parts of characters"
    if not inner:
        return "whitespace"
    if any(character.isdigit() for character in inner) and all(c.isdigit() or c in ".,-:" for c in inner):
        return "digits"
    letters = [character for character in inner if character.isalpha()]
    if any(not _is_latin(letter) for letter in letters):
        return "other scripts"
    marks = [character for character in inner if not character.isalnum()]
    if any(mark in _MARKUP or unicodedata.category(mark)[0] == "S" for mark in marks):
        return "markup and symbols"
    return "words" if letters else "punctuation"


def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")
