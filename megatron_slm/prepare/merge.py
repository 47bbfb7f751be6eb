"""Merging of corpora that were prepared separately; their checksums are verified as they are read."""

import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_slm.data.corpus import (
    AGAIN,
    Corpus,
    Index,
    changed,
    corpus_tokenizer_path,
    describe_tokenizer,
    file_sha256,
    load_corpus_tokenizer,
    open_corpus,
    open_mask,
    read_index,
    read_lengths,
)
from megatron_slm.data.tokenizer import TokenizerIdentity
from megatron_slm.errors import UserError
from megatron_slm.io.staging import Staging
from megatron_slm.prepare.staged import StagedCorpus, make_at_once, refuse_existing, write_description

logger = logging.getLogger(__name__)

_BLOCK = 1 << 23  # tokens


def merge_corpora(prefixes: list[str], output: str) -> Corpus:
    """Write the documents of several corpora, in the order given, as the corpus ``output``.

    The result equals the corpus of all their inputs together.

    Raises:
        UserError: a corpus is missing, has changed or is given twice; corpora differ in their tokenizer, or only some
            have a mask; or something exists at ``output``.
    """
    parts = open_mergeable([str(Path(prefix)) for prefix in prefixes])
    corpora, prefix = parts.corpora, Path(output)
    skipped = sum(corpus.skipped for corpus in corpora)
    make_at_once(
        Staging(prefix, "--output", "preparing"),
        {"--merge": parts.identity()},
        refuse=lambda: refuse_existing(prefix),
        make=lambda ready: stage_merged(parts, ready, prefix.name, skipped),
    )
    merged = open_corpus(str(prefix))
    logger.info(
        "%s: %d corpora, %d documents, %d tokens", output, len(corpora), merged.num_documents, merged.num_tokens
    )
    return merged


class Mergeable(NamedTuple):
    """Corpora that can be merged: their indices, and the description of their common tokenizer."""

    corpora: list[Corpus]
    indices: list[Index]
    described: dict[str, Any]

    def identity(self) -> list[Any]:
        """Return the prefix and the checksums of each corpus."""
        return [[corpus.prefix, corpus.sha256] for corpus in self.corpora]


def open_mergeable(prefixes: list[str]) -> Mergeable:
    """Open corpora that are to be merged.

    Raises:
        UserError: as `merge_corpora`, except for its output.
    """
    corpora = [open_corpus(prefix, "--merge") for prefix in prefixes]
    indices = [read_index(Path(f"{corpus.prefix}.idx"), "--merge", corpus.prefix) for corpus in corpora]
    described = _describe_common_tokenizer(corpora)
    _refuse_unlike(corpora, indices)
    return Mergeable(corpora, indices, described)


def stage_merged(parts: Mergeable, ready: Path, name: str, skipped: int) -> None:
    """Write the merged corpus to a folder of files to publish.

    Args:
        parts: the corpora, in order.
        ready: the folder.
        name: the basename of the merged corpus.
        skipped: documents of the whole input that could not be read.

    Raises:
        UserError: a corpus has changed since it was written.
    """
    corpora, indices, described = parts
    staged = StagedCorpus(ready, name, indices[0].dtype, corpora[0].masked)
    for corpus, index in zip(corpora, indices, strict=True):
        logger.info("adding %s: %d tokens", corpus.prefix, corpus.num_tokens)
        _append(staged, corpus, index)
    write_description(staged.finish(corpus_tokenizer_path(corpora[0]), described, skipped))


def _describe_common_tokenizer(corpora: list[Corpus]) -> dict[str, Any]:
    """Return the description of the tokenizer, which all corpora must share."""
    described = describe_tokenizer(load_corpus_tokenizer(corpora[0]))
    first = TokenizerIdentity(described["tokenizer_fingerprint"], described["tokenizer_probe"])
    for corpus in corpora[1:]:
        difference = corpus.tokenizer.difference(first)
        if difference:
            raise UserError(
                "--merge",
                corpus.prefix,
                f"it was prepared with a different tokenizer than {corpora[0].prefix} ({difference})",
                "Prepare one of them again with the tokenizer of the other",
            )
    chosen = (corpus.end_token for corpus in corpora if corpus.end_token is not None)
    return described | {"end_token": next(chosen, None)}


def _refuse_unlike(corpora: list[Corpus], indices: list[Index]) -> None:
    seen: set[Path] = set()
    for corpus, index in zip(corpora, indices, strict=True):
        path = Path(f"{corpus.prefix}.bin").resolve()
        if path in seen:
            raise UserError("--merge", corpus.prefix, "it is given twice", "Give it once")
        seen.add(path)
        if corpus.masked != corpora[0].masked:
            reason = f"it has {'a' if corpus.masked else 'no'} mask of answers, unlike {corpora[0].prefix}"
            raise UserError("--merge", corpus.prefix, reason, "Blend them with data.train instead")
        if index.dtype != indices[0].dtype:
            reason = f"its tokens are {index.dtype}, and those of {corpora[0].prefix} are {indices[0].dtype}"
            raise UserError("--merge", corpus.prefix, reason, AGAIN)


def _append(staged: StagedCorpus, corpus: Corpus, index: Index) -> None:
    nothing = np.zeros(0, np.int32)
    mask = open_mask(corpus)
    place, sha256 = 0, hashlib.sha256()
    with open(f"{corpus.prefix}.bin", "rb") as stream:
        while len(tokens := np.fromfile(stream, index.dtype, _BLOCK)):
            sha256.update(tokens.data)
            staged.append(tokens, nothing, 0, None if mask is None else mask[place : place + len(tokens)])
            place += len(tokens)
    for suffix, expected in corpus.sha256.items():
        actual = sha256.hexdigest() if suffix == ".bin" else file_sha256(Path(corpus.prefix + suffix))
        if actual != expected:
            raise changed(corpus, suffix)
    for lengths in read_lengths(Path(f"{corpus.prefix}.idx"), index):
        staged.append(nothing, lengths, 0)
    staged.counts["bytes"] += corpus.num_bytes
    staged.add_labels(corpus.sources, corpus.licenses)
