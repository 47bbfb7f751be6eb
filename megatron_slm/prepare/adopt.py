"""Adoption of an existing Megatron .bin/.idx pair as a corpus, in place: it gets a description and its tokenizer."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_slm.data.corpus import (
    Corpus,
    Index,
    describe_tokenizer,
    file_sha256,
    index_size,
    open_corpus,
    read_boundaries,
    read_index,
    read_lengths,
    read_pointers,
)
from megatron_slm.data.tokenizer import largest_id, load_tokenizer, save_tokenizer, tokenizer_identity
from megatron_slm.errors import UserError
from megatron_slm.io.progress import Meter
from megatron_slm.io.staging import Staging
from megatron_slm.prepare.staged import make_at_once, refuse_existing, write_description

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

_REMEDY = "Give a .bin/.idx pair as Megatron's preprocess_data.py writes it"
_BLOCK_TOKENS = 1 << 20


class Scan(NamedTuple):
    """The counts of one pass: tokens, UTF-8 bytes of their text, and documents that end with the end token."""

    num_tokens: int
    num_bytes: int
    ended: int


def adopt_corpus(prefix: str, tokenizer: str, end_token: str | None = None) -> Corpus:
    """Write PREFIX.json and PREFIX.tokenizer for an existing PREFIX.bin and PREFIX.idx, which are only read.

    ``num_bytes`` is counted by decoding every document.

    Args:
        prefix: PREFIX of the pair.
        tokenizer, end_token: see ``load_tokenizer``.

    Raises:
        UserError: the pair is missing or damaged, an id is not in the tokenizer, a document has several sequences, or
            the pair is already a prepared corpus.
    """
    output = Path(prefix)
    index = _checked_index(output)
    loaded = load_tokenizer(tokenizer, end_token)
    identity = tokenizer_identity(loaded)
    settings = {"--adopt": str(output), "--tokenizer": [identity.fingerprint, identity.probe]}
    make_at_once(
        Staging(output, "--adopt", "preparing"),
        settings,
        refuse=lambda: _refuse_described(output),
        make=lambda ready: _stage(output, index, loaded, ready),
    )
    corpus = open_corpus(str(output))
    logger.info(
        "%s: %d documents, %d tokens, %d bytes of text when decoded",
        prefix, corpus.num_documents, corpus.num_tokens, corpus.num_bytes,
    )  # fmt: skip
    return corpus


def _refuse_described(output: Path) -> None:
    if Path(f"{output}.json").exists():
        raise UserError("--adopt", output, f"it is already a prepared corpus ({output}.json exists)", "Use --verify")
    refuse_existing(output, (".tokenizer",), "--adopt")


def _checked_index(prefix: Path) -> Index:
    """Return the header of PREFIX.idx; its documents must have one sequence each and fill PREFIX.bin without gaps."""
    path, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for part in (path, tokens):
        if not part.is_file():
            raise _unsuitable(prefix, f"{part} is missing")
    index = read_index(path, "--adopt", prefix, _REMEDY)
    if path.stat().st_size != index_size(index):
        raise _unsuitable(prefix, f"{path} has {path.stat().st_size} bytes instead of {index_size(index)}")
    _refuse_several_sequences(prefix, index)
    place = 0
    for lengths, pointers in zip(read_lengths(path, index), read_pointers(path, index), strict=True):
        starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * index.item_size + place
        if (lengths < 0).any() or (pointers != starts).any():
            raise _unsuitable(prefix, f"{path} does not point to documents that follow each other")
        place += int(lengths.sum(dtype=np.int64)) * index.item_size
    if tokens.stat().st_size != place or not place:
        raise _unsuitable(prefix, f"{tokens} has {tokens.stat().st_size} bytes, and {path} describes {place}")
    return index


def _unsuitable(prefix: Path, reason: str) -> UserError:
    return UserError("--adopt", prefix, reason, _REMEDY)


def _refuse_several_sequences(prefix: Path, index: Index) -> None:
    path, expected = Path(f"{prefix}.idx"), 0
    single = index.boundaries == index.sequences + 1
    for boundaries in read_boundaries(path, index) if single else ():
        single = single and bool((boundaries == np.arange(expected, expected + len(boundaries))).all())
        expected += len(boundaries)
    if not single:
        reason = f"{path} holds {index.sequences} sequences in {index.boundaries - 1} documents"
        remedy = "Write it with one sequence per document (without --split-sentences)"
        raise UserError("--adopt", prefix, reason, remedy)


def _stage(prefix: Path, index: Index, tokenizer: "PreTrainedTokenizerFast", ready: Path) -> None:
    scan = _scan(prefix, index, tokenizer)
    share = scan.ended / index.sequences
    if share < 1:
        logger.warning(
            "only %.1f %% of the documents end with %r (id %d); nothing marks the end of the others",
            100 * share, tokenizer.eos_token, tokenizer.eos_token_id,
        )  # fmt: skip
    save_tokenizer(tokenizer, ready / f"{prefix.name}.tokenizer")
    corpus = Corpus(
        prefix=str(ready / prefix.name),
        name=prefix.name,
        num_documents=index.sequences,
        num_tokens=scan.num_tokens,
        num_bytes=scan.num_bytes,
        sha256={suffix: file_sha256(Path(f"{prefix}{suffix}")) for suffix in (".bin", ".idx")},
        **describe_tokenizer(tokenizer),
    )
    write_description(corpus)


def _scan(prefix: Path, index: Index, tokenizer: "PreTrainedTokenizerFast") -> Scan:
    limit, end_id = largest_id(tokenizer), tokenizer.eos_token_id
    total = Path(f"{prefix}.bin").stat().st_size // index.item_size
    logger.info("counting the bytes of text by decoding %d tokens", total)
    num_tokens = num_bytes = ended = 0
    with Meter(total, "tokens") as meter:
        for tokens, lengths in _documents(prefix, index):
            wrong = tokens[(tokens < 0) | (tokens > limit)]
            if len(wrong):
                has = f"--tokenizer {tokenizer.name_or_path} has the ids 0 to {limit}"
                reason = f"it holds the id {wrong[0]}, and {has}"
                raise UserError("--adopt", prefix, reason, "Give the tokenizer that it was made with")
            ends = np.cumsum(lengths, dtype=np.int64)[lengths > 0] - 1
            ended += int((tokens[ends] == end_id).sum())
            num_tokens += len(tokens)
            num_bytes += _decoded_bytes(tokenizer, tokens, lengths)
            meter.reach(num_tokens)
    return Scan(num_tokens, num_bytes, ended)


def _documents(prefix: Path, index: Index) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the tokens and lengths of whole documents, about a million tokens at a time."""
    with open(f"{prefix}.bin", "rb") as stream:
        for lengths in read_lengths(Path(f"{prefix}.idx"), index):
            part = (np.cumsum(lengths, dtype=np.int64) - lengths) // _BLOCK_TOKENS
            for some in np.split(lengths, np.flatnonzero(np.diff(part)) + 1):
                yield np.fromfile(stream, index.dtype, int(some.sum(dtype=np.int64))), some


def _decoded_bytes(tokenizer: "PreTrainedTokenizerFast", tokens: np.ndarray, lengths: np.ndarray) -> int:
    documents = [document.tolist() for document in np.split(tokens, np.cumsum(lengths)[:-1])]
    texts = tokenizer.backend_tokenizer.decode_batch(documents, skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts)
