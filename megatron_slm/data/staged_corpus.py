"""A corpus in the making: tokens and lengths appended to files, so that memory does not grow with them."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.corpus import MASK, Corpus, file_sha256
from megatron_slm.data.index import write_index
from megatron_slm.data.tally import Tally, add_tally
from megatron_slm.errors import UserError
from megatron_slm.files import sync


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
