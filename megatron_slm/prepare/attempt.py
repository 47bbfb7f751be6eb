"""A corpus in the making: tokens and lengths appended to files, so that memory does not grow with them."""

import logging
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.corpus import MASK, Corpus, Tally, add_tally, file_sha256, write_index
from megatron_slm.data.staging import (
    JOURNAL,
    READY,
    Progress,
    refuse_existing,
    save_progress,
    sync_all,
    write_description,
)
from megatron_slm.errors import UserError
from megatron_slm.files import sync
from megatron_slm.prepare.contamination import REPORT_SUFFIX, ContaminationReport
from megatron_slm.prepare.documents import Fields
from megatron_slm.prepare.encoding import Encoded


class StagedCorpus:
    """Appends to NAME.bin, to a file of lengths, and to NAME.mask if it has one; ``counts`` says how far they are.

    Args:
        ready: the folder of the files to publish; the lengths lie beside it.
        name: the basename of the prefix.
        dtype: of the tokens, "uint16" or "int32".
        masked: whether only some tokens count.
        counts: what an earlier attempt had committed; what it wrote after that is cut off.
    """

    def __init__(
        self, ready: Path, name: str, dtype: str, masked: bool = False, counts: dict[str, Any] | None = None
    ) -> None:
        self.prefix = ready / name
        self.dtype = dtype
        self.counts = counts or {"documents": 0, "tokens": 0, "bytes": 0, "sources": {}, "licenses": {}}
        self._bin = ready / f"{name}.bin"
        self._mask = ready / f"{name}{MASK}" if masked else None
        self._folder = ready.parent
        self._lengths = self._folder / f"{name}.lengths"
        self._cut(self._bin, self.counts["tokens"] * np.dtype(dtype).itemsize)
        self._cut(self._lengths, self.counts["documents"] * 4)
        if self._mask:
            self._cut(self._mask, self.counts["tokens"])

    def append(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int, mask: np.ndarray | None = None) -> None:
        """Append documents; tokens, with their mask, and lengths may also come one after the other."""
        blocks = [(self._bin, tokens.astype(self.dtype)), (self._lengths, lengths.astype(np.int32))]
        if self._mask:
            values = np.zeros(0, np.uint8) if mask is None else mask.astype(np.uint8)
            assert len(values) == len(tokens)
            blocks.append((self._mask, values))
        for path, block in blocks:
            with path.open("ab") as stream:  # not held open: there may be a thousand corpora
                stream.write(block.data)
        self.counts["documents"] += len(lengths)
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += num_bytes

    def add_labels(self, sources: Tally, licenses: Tally) -> None:
        """Count what is known of the documents appended."""
        add_tally(self.counts["sources"], sources)
        add_tally(self.counts["licenses"], licenses)

    def sync(self) -> None:
        """Flush what was appended to the disk."""
        for path in filter(None, (self._bin, self._lengths, self._mask)):
            sync(path)

    def finish(self, tokenizer: Path, described: dict[str, Any], skipped: int) -> Corpus:
        """Write the index and copy the tokenizer; return the description.

        Args:
            tokenizer: its folder.
            described: what ``describe_tokenizer`` returns for it.
            skipped: documents that could not be read.
        """
        index = Path(f"{self.prefix}.idx")
        write_index(index, self.dtype, self._lengths)
        shutil.copytree(tokenizer, f"{self.prefix}.tokenizer", dirs_exist_ok=True)
        return Corpus(
            prefix=str(self.prefix),
            name=self.prefix.name,
            num_documents=self.counts["documents"],
            num_tokens=self.counts["tokens"],
            num_bytes=self.counts["bytes"],
            sha256={path.suffix: file_sha256(path) for path in filter(None, (self._bin, index, self._mask))},
            sources=self.counts["sources"],
            licenses=self.counts["licenses"],
            skipped=skipped,
            **described,
        )

    def _cut(self, path: Path, size: int) -> None:
        path.touch()
        if path.stat().st_size < size:
            raise UserError(f"{path} is shorter than when it was left: remove {self._folder} to begin afresh")
        os.truncate(path, size)


logger = logging.getLogger(__name__)

MAX_GROUPS = 1000
_COMMIT_SHARE = 0.05  # of the time
_NAME_CHARACTERS = 50  # of a value in a file name, whose limit is 255 bytes


@dataclass(frozen=True)
class Options:
    """How inputs become corpora.

    tokenizer    what ``load_tokenizer`` takes; or None
    end_token    the piece that ends documents; None: the tokenizer's own
    train_size   the vocabulary size of a tokenizer to train on the inputs first; or None
    fields       where a record holds its text, and what it is sorted by
    skip_bad     documents that may be left out because they cannot be read
    evaluation   evaluation files whose 13-grams are looked for; a report is written
    workers      processes that encode; the result is the same with any number
    """

    tokenizer: str | None = None
    train_size: int | None = None
    fields: Fields = field(default_factory=Fields)
    skip_bad: int = 0
    evaluation: tuple[str, ...] = ()
    workers: int = 1
    end_token: str | None = None


class Attempt:
    """The corpora being made.

    Args:
        folder: the staging folder.
        output: the prefix given.
        progress: how far an earlier attempt was.
        dtype: of the tokens.
        options: what was asked for.
        report: where the evaluation n-grams that occur are noted; or None
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        progress: Progress,
        dtype: str,
        options: Options,
        report: ContaminationReport | None = None,
    ) -> None:
        self.progress = progress
        self._folder, self._output, self._dtype, self._report = folder, output, dtype, report
        self._fields, self._skip_bad = options.fields, options.skip_bad
        self._corpora: dict[str, StagedCorpus] = {}
        for group, state in progress.corpora.items():
            self._open(group, state["name"], state["counts"])
        self._remove_unknown()
        self._dirty: set[str] = set()
        self._next_commit = 0.0

    def add(self, encoded: Encoded) -> None:
        """Append a chunk.

        Raises:
            UserError: too many bad documents, or too many values of the field ``by``.
        """
        for sentence in encoded.bad:
            self._skip(sentence)
        for value, group in encoded.groups.items():
            corpus = self._corpora.get(value) or self._open(value, self._new_name(value))
            mask = group.masks[0] if group.masks else None
            corpus.append(group.pieces[0], np.array(group.lengths), group.num_bytes, mask)
            corpus.add_labels(group.sources, group.licenses)
            self._dirty.add(value)
        if self._report and encoded.found is not None:
            self._report.add(encoded.found)

    def commit(self, finished: list[list[Any]]) -> None:
        """Note in the journal that all inputs up to here, ``finished``, are encoded; seldom enough to cost little."""
        begin = time.monotonic()
        if begin < self._next_commit:
            return
        self.commit_now(finished)
        end = time.monotonic()
        self._next_commit = end + (end - begin) / _COMMIT_SHARE

    def commit_now(self, finished: list[list[Any]]) -> None:
        """Note it whatever it costs."""
        for value in self._dirty:
            self._corpora[value].sync()
        sync(self._folder / READY)  # the names of new files too
        self._dirty.clear()
        if self._report:
            self._report.save()
        self.progress.finished = finished
        self.progress.corpora = {
            value: {"name": corpus.prefix.name, "counts": corpus.counts} for value, corpus in self._corpora.items()
        }
        save_progress(self._folder, self.progress)

    def forget(self) -> None:
        """Leave nothing to go on with."""
        (self._folder / JOURNAL).unlink(missing_ok=True)

    def finish(self, tokenizer: Path, described: dict[str, Any]) -> None:
        """Complete all that will be published, and note that it is; the arguments are those of ``StagedCorpus``."""
        ready = self._folder / READY
        for staged in self._corpora.values():
            write_description(staged.finish(tokenizer, described, self.progress.skipped))
        if self._report:
            self._report.write(ready / f"{self._output.name}{REPORT_SUFFIX}")
        sync_all(ready)
        self.progress.complete = True
        save_progress(self._folder, self.progress)

    @property
    def corpora(self) -> list[StagedCorpus]:
        """In the order in which they were first seen."""
        return list(self._corpora.values())

    def _open(self, value: str, name: str, counts: dict[str, Any] | None = None) -> StagedCorpus:
        refuse_existing(self._output.with_name(name))
        ready, masked = self._folder / READY, self._fields.masked
        self._corpora[value] = StagedCorpus(ready, name, self._dtype, masked, counts)
        return self._corpora[value]

    def _new_name(self, value: str) -> str:
        if self._fields.by is None:
            return self._output.name
        if len(self._corpora) == MAX_GROUPS:
            raise UserError(f"--by {self._fields.by} has more than {MAX_GROUPS:,} values: choose a field with fewer")
        return safe_name(self._output.name, value, [c.prefix.name for c in self._corpora.values()])

    def _skip(self, sentence: str) -> None:
        if self.progress.skipped == self._skip_bad:
            also = f" ({self._skip_bad} before it were left out, as many as --skip-bad allows)"
            raise UserError(sentence + (also if self._skip_bad else "; or leave it out with --skip-bad"))
        self.progress.skipped += 1
        logger.warning("left out: %s", sentence)

    def _remove_unknown(self) -> None:
        """Remove what an earlier attempt began after it last wrote its journal."""
        known = {corpus.prefix.name for corpus in self._corpora.values()}
        for path in (self._folder / READY).iterdir():
            if path.suffix in (".bin", MASK) and path.stem not in known:
                path.unlink()


def safe_name(output: str, value: str, taken: list[str]) -> str:
    """Return OUTPUT-VALUE as a file name that no other in ``taken`` has, on any file system."""
    label = re.sub(r"[^\w.-]+", "-", value).strip(".-")[:_NAME_CHARACTERS] or "unnamed"
    name = f"{output}-{label}"
    number = 1
    while name.casefold() in {other.casefold() for other in taken}:
        number += 1
        name = f"{output}-{label}-{number}"
    return name
