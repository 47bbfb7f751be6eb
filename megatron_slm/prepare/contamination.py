"""Contamination: the n-grams of words that evaluation files share with the input, as 64-bit hashes."""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_slm.errors import UserError
from megatron_slm.io.files import publish
from megatron_slm.prepare.documents import RawDocument, decode_record
from megatron_slm.prepare.inputs import find_files

logger = logging.getLogger(__name__)

NGRAM_WORDS = 13  # as GPT-3 and most later models count overlaps with evaluation sets
_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost
OPTION = "--contamination"
REPORT_SUFFIX = ".contamination.json"
MARKS = "found.npy"  # in the staging folder
_FORMAT_VERSION = 1
_WORST = 20


def word_ngrams(text: str, n: int = NGRAM_WORDS) -> set[int]:
    """Return the distinct n-grams of ``text`` as 64-bit hashes; an empty set if it has fewer than ``n`` words.

    Words are runs of letters and digits, lower-cased; punctuation and spacing do not matter. The same text gives the
    same numbers in every process and on every machine.
    """
    return set(hash_ngrams(text, n).tolist())


def hash_ngrams(text: str, n: int = NGRAM_WORDS) -> np.ndarray:
    """Return the hashes of the n-grams of ``text`` in order, uint64 `[max(0, words - n + 1)]`."""
    words = _WORD.findall(text.lower())
    word_hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes = hashes * _FACTOR + word_hashes[place : place + count]
    return hashes


@functools.lru_cache(maxsize=2**18)  # text repeats its words
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class EvaluationDocument(NamedTuple):
    """An evaluation document and its distinct n-grams, uint64."""

    raw: RawDocument
    ngrams: np.ndarray


class ContaminationReport:
    """The n-grams of evaluation files, each with a mark if it occurs in the input. No other n-grams are held in memory.

    Args:
        names: jsonl, text or parquet files, or folders; all strings of a record are searched.

    Raises:
        UserError: a file cannot be read, or no string has ``NGRAM_WORDS`` words or more.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._ngrams = np.unique(_joined(document.ngrams for document in _read(names)))
        if not len(self._ngrams):
            reason = f"it holds no text of {NGRAM_WORDS} words or more"
            raise UserError(OPTION, " ".join(names), reason, "Give files with longer texts")
        self._found = np.zeros(len(self._ngrams), bool)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the n-grams to look for."""
        return hashlib.sha256(self._ngrams.tobytes()).hexdigest()

    def begin(self, folder: Path) -> str:
        """Load the marks from a staging folder, if it has any, and write the file of n-grams that workers read."""
        self._marks = folder / MARKS
        if self._marks.exists():
            self._found = np.load(self._marks, allow_pickle=False)
        np.save(folder / "evaluation.npy", self._ngrams)
        return str(folder / "evaluation.npy")

    def add(self, places: np.ndarray) -> None:
        """Mark the n-grams at these indices as found."""
        self._found[places] = True

    def add_marks(self, path: Path) -> None:
        """Add the marks that `save` has written for another part of the input."""
        self._found |= np.load(path, allow_pickle=False)

    def save(self) -> None:
        """Save the marks durably. They may be ahead of the journal, because encoding a document again repeats them."""
        aside = self._marks.with_name("found.new.npy")
        np.save(aside, self._found)
        publish(aside, self._marks, replace=True)  # durable, because a resume does not read finished inputs again

    def write(self, path: Path) -> None:
        """Write the report."""
        report = self._report()
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        worst = report["worst"][0] if report["worst"] else None
        logger.info(
            "contamination: %d of %d evaluation documents share a run of %d words with the corpus (%d of %d runs)%s",
            report["num_contaminated"], report["num_documents"], NGRAM_WORDS, report["num_found"], report["num_ngrams"],
            f"; most in {worst['file']}:{worst['line']}, {worst['found']} of {worst['ngrams']}" if worst else "",
        )  # fmt: skip

    def _report(self) -> dict[str, Any]:
        documents = [self._counted(document) for document in _read(self._names)]
        contaminated = [document for document in documents if document["found"]]
        return {
            "format_version": _FORMAT_VERSION,
            "ngram_words": NGRAM_WORDS,
            "num_documents": len(documents),
            "num_too_short": sum(not document["ngrams"] for document in documents),
            "num_contaminated": len(contaminated),
            "num_ngrams": sum(document["ngrams"] for document in documents),
            "num_found": sum(document["found"] for document in documents),
            "worst": sorted(contaminated, key=lambda one: -one["found"] / one["ngrams"])[:_WORST],
            "documents": documents,
        }

    def _counted(self, document: EvaluationDocument) -> dict[str, Any]:
        places = np.searchsorted(self._ngrams, document.ngrams)
        found = int(self._found[places].sum())
        return {"file": document.raw.file, "line": document.raw.line, "ngrams": len(places), "found": found}


def _read(names: list[str]) -> Iterator[EvaluationDocument]:
    for source in find_files(names, OPTION):
        for raw, _ in source.read(None):
            record = decode_record(raw, "text")
            yield EvaluationDocument(raw, np.unique(_joined(map(hash_ngrams, _strings(record)))))


def _joined(hashes: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
