"""Documents to tokens, as each worker does it."""

import functools
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_slm.data.contamination import hash_ngrams
from megatron_slm.data.documents import Document, Fields, RawDocument, decode_document
from megatron_slm.data.tally import Tally, add_label, counts
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WINDOW, _OVERLAP = 65_536, 4_096  # characters; longer documents are encoded window by window


@dataclass(frozen=True)
class Encoding:
    """How workers turn documents into tokens."""

    tokenizer_file: str
    end_id: int
    dtype: str
    fields: Fields
    evaluation_file: str | None = None  # .npy of the sorted n-grams to look for


@dataclass
class Group:
    """Documents of one corpus as tokens, end tokens included."""

    pieces: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_bytes: int = 0  # of their text in UTF-8
    sources: Tally = field(default_factory=dict)
    licenses: Tally = field(default_factory=dict)

    def add(self, document: Document, pieces: list[np.ndarray]) -> None:
        """Append a document."""
        count = counts(1, sum(map(len, pieces)), len(document.text.encode()))
        self.pieces += pieces
        self.lengths.append(count["tokens"])
        self.num_bytes += count["bytes"]
        for tally, label in ((self.sources, document.source), (self.licenses, document.license)):
            if label is not None:
                add_label(tally, label, count)


class Encoded(NamedTuple):
    """A chunk, encoded."""

    groups: dict[str, Group]  # by the value of the field ``by``; "" without one
    bad: list[str]  # a sentence for each document that could not be read
    found: np.ndarray | None  # places of the n-grams of ``evaluation_file`` that occur


def encode_documents(encoding: Encoding, raw: list[RawDocument]) -> Encoded:
    """Encode documents; those without text or tokens are left out."""
    bad: list[str] = []
    documents = list(_decoded(raw, encoding.fields, bad))
    end = np.array([encoding.end_id], dtype=encoding.dtype)
    groups: dict[str, Group] = {}
    for document, parts in zip(documents, _encode(load_encoder(encoding.tokenizer_file), documents), strict=True):
        if any(map(len, parts)):
            pieces = [*(np.asarray(part, dtype=encoding.dtype) for part in parts), end]
            groups.setdefault(document.group, Group()).add(document, pieces)
    for group in groups.values():
        group.pieces = [np.concatenate(group.pieces)]
    return Encoded(groups, bad, _found(encoding.evaluation_file, documents) if encoding.evaluation_file else None)


@functools.lru_cache(maxsize=1)
def load_encoder(tokenizer_file: str) -> "Tokenizer":
    """Load a tokenizer.json for text alone: nothing is cut, padded, or read as a special token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # an end token spelled out in a text does not end a document
    return tokenizer


def _decoded(raw: list[RawDocument], fields: Fields, bad: list[str]) -> Iterator[Document]:
    for one in raw:
        try:
            yield decode_document(one, fields)
        except UserError as error:
            bad.append(str(error))


def _encode(tokenizer: "Tokenizer", documents: list[Document]) -> Iterator[list[list[int] | array]]:
    texts = [document.text for document in documents]
    short = [text for text in texts if len(text) <= _WINDOW]
    encoded = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    for text in texts:
        yield [next(encoded).ids] if len(text) <= _WINDOW else [*_encode_long(tokenizer, text)]


def _encode_long(tokenizer: "Tokenizer", text: str) -> list[array]:
    """Encode a long text in overlapping windows: the ids of one pass, without its memory.

    Where two windows disagree on the tokens that begin just after their seam, the text has no
    place to cut, and it is encoded in one pass after all.
    """
    parts: list[array] = []
    expected: list[tuple[int, int]] | None = None  # (first character, id) after the seam, as the last window saw it
    for start in range(0, len(text), _WINDOW):
        low = max(0, start - _OVERLAP)
        encoding = tokenizer.encode(text[low : start + _WINDOW + _OVERLAP], add_special_tokens=False)
        ids, begins = encoding.ids, [low + begin for begin, _ in encoding.offsets]
        first, last = bisect_left(begins, start), bisect_left(begins, start + _WINDOW)
        if expected is not None and expected != _after(begins, ids, first, start):
            return [array("i", tokenizer.encode(text, add_special_tokens=False).ids)]
        expected = _after(begins, ids, last, start + _WINDOW)
        parts.append(array("i", ids[first:last]))  # a ninth of a list's memory
    return parts


def _after(begins: list[int], ids: list[int], first: int, seam: int) -> list[tuple[int, int]]:
    last = bisect_left(begins, seam + _OVERLAP // 2)
    return list(zip(begins[first:last], ids[first:last], strict=True))


def _found(evaluation_file: str, documents: list[Document]) -> np.ndarray:
    evaluation = _evaluation(evaluation_file)
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hash_ngrams(document.text) for document in documents)])
    places = np.searchsorted(evaluation, hashes).clip(max=len(evaluation) - 1)
    return np.unique(places[evaluation[places] == hashes])


@functools.lru_cache(maxsize=1)
def _evaluation(path: str) -> np.ndarray:
    return np.load(Path(path), mmap_mode="r", allow_pickle=False)
