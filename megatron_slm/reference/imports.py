"""Import of log-probabilities that were computed elsewhere, as the values of a store."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.corpus import Corpus, open_documents
from megatron_slm.errors import UserError
from megatron_slm.reference.scoring import Source, Values

OPTION = "--import"


def open_import(path: Path, corpus: Corpus, shard_tokens: int) -> Source:
    """Open the log-probabilities of one corpus; the suffix of the file decides its format.

    Args:
        path: a .npy, .jsonl or .jsonl.gz file.
        corpus: the corpus whose tokens they belong to.
        shard_tokens: rows per shard.

    Raises:
        UserError: the file does not exist, its suffix is unknown, or its array does not have one value per token.
    """
    if not path.is_file():
        raise UserError(OPTION, path, "it is not a file", "Give a .npy or .jsonl file for each corpus of data.train")
    if path.suffix == ".npy":
        return ArraySource(path, corpus, shard_tokens)
    if path.suffix == ".jsonl" or path.suffixes[-2:] == [".jsonl", ".gz"]:
        return LinesSource(path, corpus, shard_tokens)
    raise UserError(OPTION, path, "its suffix is not .npy, .jsonl or .jsonl.gz", "Save it in one of these formats")


class ArraySource:
    """Log-probabilities in a .npy file, one per token of the corpus's `.bin`, in nats."""

    def __init__(self, path: Path, corpus: Corpus, shard_tokens: int) -> None:
        try:
            self._array = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            reason = f"it cannot be read as a NumPy array ({error})"
            raise UserError(OPTION, path, reason, "Save it with numpy.save") from error
        if self._array.shape != (corpus.num_tokens,) or not np.issubdtype(self._array.dtype, np.floating):
            found = f"{self._array.dtype} values of shape {list(self._array.shape)}"
            reason = f"it holds {found}, and {corpus.prefix} has {corpus.num_tokens} tokens"
            remedy = f"Give one floating-point log-probability per token of {corpus.prefix}.bin"
            raise UserError(OPTION, path, reason, remedy)
        self.rows = corpus.num_tokens
        self.num_shards = -(-self.rows // shard_tokens)
        self._path = path
        self._shard_tokens = shard_tokens

    def values(self, number: int, report: Callable[[int], None]) -> Values:
        start = number * self._shard_tokens
        logprob_N = np.asarray(self._array[start : start + self._shard_tokens], dtype=np.float32)
        return Values(start, _losses(logprob_N, self._path, start))


class LinesSource:
    """Log-probabilities in a .jsonl file: a line `{"logprobs": [...]}` per document, in the corpus's order.

    Shards must be read in order, beginning with any of them.
    """

    def __init__(self, path: Path, corpus: Corpus, shard_tokens: int) -> None:
        self.rows = corpus.num_tokens
        self.num_shards = -(-self.rows // shard_tokens)
        self._path = path
        self._corpus = corpus
        self._shard_tokens = shard_tokens
        self._documents = self._read()
        self._rest = np.empty(0, dtype=np.float32)  # the end of the last document, which belongs to the next shard
        self._position = 0

    def values(self, number: int, report: Callable[[int], None]) -> Values:
        start, stop = number * self._shard_tokens, min((number + 1) * self._shard_tokens, self.rows)
        pieces, have = [], self._position
        for piece in chain([self._rest], self._documents):
            pieces.append(piece[max(0, start - have) :])
            have += len(piece)
            if have >= stop:
                break
        if stop == self.rows:
            next(self._documents, None)  # makes `_read` compare the number of lines with that of documents
        logprob_N = np.concatenate(pieces)
        self._rest, self._position = logprob_N[stop - start :], stop
        return Values(start, _losses(logprob_N[: stop - start], self._path, start))

    def _read(self) -> Iterator[NDArray[np.float32]]:
        lengths = open_documents(self._corpus).length_D
        number = 0
        for number, line in enumerate(self._lines(), start=1):
            if number <= len(lengths):
                yield self._document(line, number, int(lengths[number - 1]))
        if number != len(lengths):
            reason = f"it has {number} lines, and {self._corpus.prefix} has {len(lengths)} documents"
            raise UserError(OPTION, self._path, reason, "Give one line per document, in the corpus's order")

    def _lines(self) -> Iterator[str]:
        try:
            with (gzip.open if self._path.suffix == ".gz" else open)(self._path, "rt", encoding="utf-8") as lines:
                yield from lines
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(OPTION, self._path, f"it cannot be read ({error})", "Write the file again") from error

    def _document(self, line: str, number: int, length: int) -> NDArray[np.float32]:
        try:
            logprob_N = np.asarray(json.loads(line)["logprobs"], dtype=np.float32)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            reason = f'line {number} is not {{"logprobs": [numbers]}} ({error})'
            remedy = "Correct the line. Score the first token of a document after an end-of-document token"
            raise UserError(OPTION, self._path, reason, remedy) from error
        if logprob_N.shape != (length,):
            has = f"document {number} of {self._corpus.prefix} has {length} tokens, including its end-of-document token"
            reason = f"line {number} holds {logprob_N.size} log-probabilities, and {has}"
            raise UserError(OPTION, self._path, reason, "Give one log-probability per token")
        return logprob_N


def _losses(logprob_N: NDArray[np.float32], path: Path, start: int) -> NDArray[np.float32]:
    """Return the losses, float32 `[N, 1]`, of log-probabilities `[N]` that begin with token `start`.

    Raises:
        UserError: a value is not finite, or exceeds 0 by more than round-off.
    """
    wrong = np.flatnonzero(~np.isfinite(logprob_N) | (logprob_N > 1e-3))
    if len(wrong):
        reason = f"its value for token {start + wrong[0]} is {logprob_N[wrong[0]]}, which is not a log-probability"
        raise UserError(OPTION, path, reason, "Give natural logarithms, all finite and at most 0")
    return -logprob_N[:, None]
