"""Unfinished corpora: tokens and lengths are appended to files, so that memory does not grow with a corpus."""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.corpus import MASK, Corpus, Tally, add_tally, describe, file_sha256, write_index
from megatron_slm.errors import UserError
from megatron_slm.io.files import sync, sync_tree
from megatron_slm.io.staging import Journal, Staging
from megatron_slm.prepare.contamination import REPORT_SUFFIX, ContaminationReport
from megatron_slm.prepare.documents import Fields
from megatron_slm.prepare.encoding import Encoded

logger = logging.getLogger(__name__)

PARTS = (".bin", ".idx", MASK, ".tokenizer")
DESCRIPTION = ".json"  # published last, when all other parts are in place
MAX_GROUPS = 1000
_COMMIT_SHARE = 0.05  # of the time may be spent on commits
_NAME_CHARACTERS = 50  # of a value in a file name, whose limit is 255 bytes


def refuse_existing(output: Path, parts: tuple[str, ...] = (DESCRIPTION, *PARTS), setting: str = "--output") -> None:
    """Raise a UserError if a file of the corpus to make exists.

    Args:
        output: PREFIX of the corpus.
        parts: suffixes to look for.
        setting: the option that names the corpus.

    Raises:
        UserError: a file with one of these suffixes exists.
    """
    for part in (f"{output}{suffix}" for suffix in parts):
        if os.path.lexists(part):
            raise UserError(setting, output, f"{part} already exists", "Remove it, or choose another prefix")


def write_description(corpus: Corpus) -> None:
    """Write PREFIX.json beside the staged parts of a corpus."""
    Path(f"{corpus.prefix}{DESCRIPTION}").write_text(describe(corpus) + "\n", encoding="utf-8")


def make_at_once(
    staging: Staging, settings: dict[str, Any], refuse: Callable[[], None], make: Callable[[Path], None]
) -> None:
    """Make and publish corpora whose unfinished work is not kept; after a kill, only the publishing is resumed.

    Args:
        staging: the staging folder, not yet open.
        settings: the settings that decide the result, by option.
        refuse: a function that raises an error if the place of the output is taken.
        make: a function that writes the files to publish to a folder.

    Raises:
        UserError: the place of the output is taken, or a file cannot be written.
    """
    with staging.open():
        if not staging.journal.exists():
            refuse()
        journal = Journal(staging, settings)
        if journal.read() is None:
            refuse()
            staging.clear()
            make(staging.ready)
            sync_tree(staging.ready)
            journal.write({"complete": True})
        staging.publish_beside(last=DESCRIPTION)


class StagedCorpus:
    """An unfinished corpus: NAME.bin, a file of lengths, and NAME.mask if only answers count.

    Args:
        ready: the folder of the files to publish; the file of lengths is beside it.
        name: the basename of the corpus.
        dtype: dtype of the tokens, "uint16" or "int32".
        masked: True if only some tokens count.
        counts: the counts that an earlier attempt committed; the files are truncated to them.
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
        """Append documents; separate calls may append their tokens (with the mask) and their lengths."""
        blocks = [(self._bin, tokens.astype(self.dtype)), (self._lengths, lengths.astype(np.int32))]
        if self._mask:
            values = np.zeros(0, np.uint8) if mask is None else mask.astype(np.uint8)
            assert len(values) == len(tokens)
            blocks.append((self._mask, values))
        for path, block in blocks:
            with path.open("ab") as stream:  # not kept open: there may be a thousand corpora
                stream.write(block.data)
        self.counts["documents"] += len(lengths)
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += num_bytes

    def add_labels(self, sources: Tally, licenses: Tally) -> None:
        """Add the counts by source and by license of the documents that were appended."""
        add_tally(self.counts["sources"], sources)
        add_tally(self.counts["licenses"], licenses)

    def sync(self) -> None:
        """Flush the files to the disk."""
        for path in filter(None, (self._bin, self._lengths, self._mask)):
            sync(path)

    def finish(self, tokenizer: Path, described: dict[str, Any], skipped: int) -> Corpus:
        """Write the index, copy the tokenizer, and return the description.

        Args:
            tokenizer: the folder of the tokenizer.
            described: its description, from ``describe_tokenizer``.
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
            reason = f"{path} is shorter than the journal records"
            raise UserError("unfinished work", self._folder, reason, "Remove that folder to start again")
        os.truncate(path, size)


@dataclass
class Progress:
    """The progress of a preparation. Staged files that are longer are truncated to it.

    finished  for each encoded input: its name, then its stamp
    corpora   name and counts of each corpus, by value of --by
    skipped   documents that could not be read
    complete  all files are made, and some may already be published
    """

    finished: list[list[Any]] = field(default_factory=list)
    corpora: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: int = 0
    complete: bool = False


def read_progress(journal: Journal) -> Progress | None:
    """Return the progress in a journal; None if there is none.

    Raises:
        UserError: the journal cannot be read, or records finished work with other settings.
    """
    found = journal.read()
    try:
        return None if found is None else Progress(**found)
    except TypeError as error:
        raise journal.unusable(f"its journal cannot be read ({error})") from error


class StagedCorpora:
    """The unfinished corpora of one preparation, one for each value of --by.

    Args:
        staging: the open staging folder.
        journal: the journal in it.
        progress: the progress of an earlier attempt.
        dtype: dtype of the tokens.
        fields: the keys of the records.
        skip_bad: number of documents that may be skipped.
        report: the report that collects evaluation n-grams; None if there are no evaluation files.

    Attributes:
        by_value: the corpora by value of --by, in the order of their first documents.
    """

    def __init__(
        self,
        staging: Staging,
        journal: Journal,
        progress: Progress,
        dtype: str,
        fields: Fields,
        skip_bad: int,
        report: ContaminationReport | None = None,
    ) -> None:
        self.progress = progress
        self._staging, self._journal, self._dtype, self._report = staging, journal, dtype, report
        self._fields, self._skip_bad = fields, skip_bad
        self.by_value: dict[str, StagedCorpus] = {}
        for group, state in progress.corpora.items():
            self._open(group, state["name"], state["counts"])
        self._remove_unknown()
        self._dirty: set[str] = set()
        self._next_commit = 0.0

    def add(self, encoded: Encoded) -> None:
        """Append an encoded chunk.

        Raises:
            UserError: there are too many bad documents, or too many values of the field ``by``.
        """
        for error in encoded.bad:
            self._skip(error)
        for value, group in encoded.groups.items():
            corpus = self.by_value.get(value) or self._open(value, self._new_name(value))
            mask = group.masks[0] if group.masks else None
            corpus.append(group.pieces[0], np.array(group.lengths), group.num_bytes, mask)
            corpus.add_labels(group.sources, group.licenses)
            self._dirty.add(value)
        if self._report and encoded.found is not None:
            self._report.add(encoded.found)

    def commit(self, finished: list[list[Any]]) -> None:
        """Call ``commit_now``, unless the last call was so recent that commits would take much of the time."""
        begin = time.monotonic()
        if begin < self._next_commit:
            return
        self.commit_now(finished)
        end = time.monotonic()
        self._next_commit = end + (end - begin) / _COMMIT_SHARE

    def commit_now(self, finished: list[list[Any]]) -> None:
        """Record in the journal that the inputs ``finished`` are encoded."""
        for value in self._dirty:
            self.by_value[value].sync()
        sync(self._staging.ready)  # the names of new files too
        self._dirty.clear()
        if self._report:
            self._report.save()
        self.progress.finished = finished
        self.progress.corpora = {
            value: {"name": corpus.prefix.name, "counts": corpus.counts} for value, corpus in self.by_value.items()
        }
        self._journal.write(asdict(self.progress))

    def finish(self, tokenizer: Path, described: dict[str, Any]) -> None:
        """Complete the files to publish, and record it in the journal; see ``StagedCorpus.finish``."""
        ready = self._staging.ready
        for staged in self.by_value.values():
            write_description(staged.finish(tokenizer, described, self.progress.skipped))
        if self._report:
            self._report.write(ready / f"{self._staging.output.name}{REPORT_SUFFIX}")
        sync_tree(ready)
        self.progress.complete = True
        self._journal.write(asdict(self.progress))

    def _open(self, value: str, name: str, counts: dict[str, Any] | None = None) -> StagedCorpus:
        refuse_existing(self._staging.output.with_name(name))
        self.by_value[value] = StagedCorpus(self._staging.ready, name, self._dtype, self._fields.masked, counts)
        return self.by_value[value]

    def _new_name(self, value: str) -> str:
        if self._fields.by is None:
            return self._staging.output.name
        if len(self.by_value) == MAX_GROUPS:
            reason = f"it has more than {MAX_GROUPS:,} values"
            raise UserError("--by", self._fields.by, reason, "Choose a field with fewer values")
        return safe_name(self._staging.output.name, value, [c.prefix.name for c in self.by_value.values()])

    def _skip(self, error: UserError) -> None:
        if self.progress.skipped == self._skip_bad:
            also = f"raise --skip-bad above {self._skip_bad}" if self._skip_bad else "skip it with --skip-bad"
            raise UserError(error.setting, error.value, error.reason, f"{error.remedy}, or {also}")
        self.progress.skipped += 1
        logger.warning("skipped: %s", error)

    def _remove_unknown(self) -> None:
        """Remove the files that an earlier attempt created after it last wrote its journal."""
        known = {corpus.prefix.name for corpus in self.by_value.values()}
        for path in self._staging.ready.iterdir():
            if path.suffix in (".bin", MASK) and path.stem not in known:
                path.unlink()


def safe_name(output: str, value: str, taken: list[str]) -> str:
    """Return OUTPUT-VALUE as a file name that differs from those in ``taken`` on any file system."""
    label = re.sub(r"[^\w.-]+", "-", value).strip(".-")[:_NAME_CHARACTERS] or "unnamed"
    name = f"{output}-{label}"
    number = 1
    while name.casefold() in {other.casefold() for other in taken}:
        number += 1
        name = f"{output}-{label}-{number}"
    return name
