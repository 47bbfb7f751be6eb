"""Where the values of a store come from, a shard at a time: a model, or a file of log-probabilities."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_slm.data.corpus import Corpus, open_tokens
from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.reference.scoring import Shard, Work


class Values(NamedTuple):
    """Rows from `start` on: float32 `[rows, columns]`, in nats."""

    start: int
    values_NC: NDArray[np.float32]


class Source(Protocol):
    """Values of one file, the same on every rank that asks."""

    rows: int
    num_shards: int

    def shard(self, number: int, told: Callable[[int], None]) -> Values:
        """Every rank calls it; `told` hears now and then how many of its rows are done."""


class ModelSource:
    """Runs a model over the work; batch i of a shard belongs to data-parallel rank i mod W.

    Args:
        module: a `CausalLM` as its engine runs it, whole or sharded.
        work: what is to be scored.
        columns: `loss`, and `entropy` where it is wanted.
        world: this process among all.
    """

    def __init__(self, module: nn.Module, work: Work, columns: list[str], world: World) -> None:
        self.rows, self.num_shards = work.rows, work.num_shards
        self._module = module
        self._work = work
        self._columns = columns
        self._world = world

    @torch.no_grad()
    def shard(self, number: int, told: Callable[[int], None]) -> Values:
        shard = self._work.shard(number)
        size, data = shard.stop - shard.start, self._world.data
        # One more row takes what is not to be kept, so that nothing waits for the device.
        value_RC = torch.zeros(size + 1, len(self._columns), device=self._world.device)
        for first in range(0, len(shard.batches), data.size):
            self._run(shard, first + data.rank, value_RC)
            told(min(size, size * (first + data.size) // len(shard.batches)))
        # Each row has one writer, and zero from all others: the sum is exact.
        return Values(shard.start, all_reduce_sum(value_RC[:size], data.group).cpu().numpy())

    def _run(self, shard: Shard, index: int, value_RC: Tensor) -> None:
        """A batch of this rank; beyond the last one it runs for company, since a sharded model needs all ranks."""
        batch, row_BT = shard.batches[min(index, len(shard.batches) - 1)]()
        batch, row_BT = batch.to(self._world.device), row_BT.to(self._world.device)
        found = score_batch(self._module, batch, tuple(self._columns[1:]))
        kept_BT = batch.valid_BT & (index < len(shard.batches))
        row_N = (row_BT - shard.start).masked_fill(~kept_BT, len(value_RC) - 1).flatten()
        value_RC[row_N] = torch.stack([found[name].flatten() for name in self._columns], -1).float()


class ArraySource:
    """Log-probabilities in a .npy file, one a token of the corpus's `.bin`, in nats.

    Raises:
        UserError: it is no such array.
    """

    def __init__(self, path: Path, corpus: Corpus, shard_tokens: int) -> None:
        try:
            self._array = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--import {path} cannot be read as a NumPy array ({error}): save it with np.save."
            ) from error
        if self._array.shape != (corpus.num_tokens,) or not np.issubdtype(self._array.dtype, np.floating):
            raise UserError(
                f"--import {path} holds {self._array.dtype} {list(self._array.shape)}, and {corpus.prefix} has "
                f"{corpus.num_tokens} tokens: give one log-probability for every token of its .bin."
            )
        self.rows = corpus.num_tokens
        self.num_shards = -(-self.rows // shard_tokens)
        self._path = path
        self._shard_tokens = shard_tokens

    def shard(self, number: int, told: Callable[[int], None]) -> Values:
        start = number * self._shard_tokens
        found = np.asarray(self._array[start : start + self._shard_tokens], dtype=np.float32)
        return Values(start, _losses(found, self._path, start))


class LinesSource:
    """Log-probabilities in a .jsonl file: `{"logprobs": [...]}`, a line a document in the order of the corpus.

    Shards are asked for in order.
    """

    def __init__(self, path: Path, corpus: Corpus, shard_tokens: int) -> None:
        self.rows = corpus.num_tokens
        self.num_shards = -(-self.rows // shard_tokens)
        self._path = path
        self._corpus = corpus
        self._shard_tokens = shard_tokens
        self._documents = self._read()
        self._rest = np.empty(0, dtype=np.float32)
        self._position = 0

    def shard(self, number: int, told: Callable[[int], None]) -> Values:
        start, stop = number * self._shard_tokens, min((number + 1) * self._shard_tokens, self.rows)
        parts, have = [], self._position
        for piece in chain([self._rest], self._documents):
            parts.append(piece[max(0, start - have) :])
            have += len(piece)
            if have >= stop:
                break
        if stop == self.rows:
            next(self._documents, None)
        found = np.concatenate(parts)
        self._rest, self._position = found[stop - start :], stop
        return Values(start, _losses(found[: stop - start], self._path, start))

    def _read(self) -> Iterator[NDArray[np.float32]]:
        index = open_tokens(self._corpus).index
        lengths = index.sequence_lengths
        number = 0
        for number, line in enumerate(self._lines(), start=1):
            if number <= len(lengths):
                yield self._document(line, number, int(lengths[number - 1]))
        if number != len(lengths):
            raise UserError(
                f"--import {self._path} has {number} lines, and {self._corpus.prefix} {len(lengths)} documents: give "
                "one line for every document, in their order."
            )

    def _lines(self) -> Iterator[str]:
        try:
            with (gzip.open if self._path.suffix == ".gz" else open)(self._path, "rt", encoding="utf-8") as lines:
                yield from lines
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"--import {self._path} cannot be read ({error}): write it again.") from error

    def _document(self, line: str, number: int, length: int) -> NDArray[np.float32]:
        try:
            found = np.asarray(json.loads(line)["logprobs"], dtype=np.float32)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(
                f'--import {self._path}, line {number}, is not {{"logprobs": [numbers]}} ({error}): mend that line; '
                "a first token is scored after an end-of-document token."
            ) from error
        if found.shape != (length,):
            raise UserError(
                f"--import {self._path}, line {number}, holds {found.size} log-probabilities, and document {number} of "
                f"{self._corpus.prefix} has {length} tokens, its end-of-document token included: give one for each."
            )
        return found


def open_import(path: Path, corpus: Corpus, shard_tokens: int) -> Source:
    """A file of log-probabilities, as its suffix says.

    Raises:
        UserError: it is not there, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"--import {path} is not there: give a .npy or .jsonl file for each corpus of data.train.")
    if path.suffix == ".npy":
        return ArraySource(path, corpus, shard_tokens)
    if path.suffix == ".jsonl" or path.suffixes[-2:] == [".jsonl", ".gz"]:
        return LinesSource(path, corpus, shard_tokens)
    raise UserError(f"--import {path} is neither .npy, .jsonl nor .jsonl.gz: save it as one of them.")


def _losses(logprob_N: NDArray[np.float32], path: Path, start: int) -> NDArray[np.float32]:
    """Losses `[N, 1]` of log-probabilities."""
    wrong = np.flatnonzero(~np.isfinite(logprob_N) | (logprob_N > 1e-3))
    if len(wrong):
        raise UserError(
            f"--import {path} gives {logprob_N[wrong[0]]} for token {start + wrong[0]}, which is no log-probability: "
            "give natural logarithms, each finite and at most 0."
        )
    return -logprob_N[:, None]
