"""Documents, tokens and bytes counted by a label, for as many labels as can be read by eye."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_slm.data.tokenizer import TokenizerIdentity, chosen_end_token, load_tokenizer, tokenizer_identity
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


MAX_LABELS = 1000
OTHER = "other"  # all labels after the first MAX_LABELS together

Counts = dict[str, int]  # "documents", "tokens" (end tokens included), "bytes" (of text)
Tally = dict[str, Counts]  # by label, in the order in which they were first seen


def counts(documents: int, tokens: int, num_bytes: int) -> Counts:
    """Name the three counts."""
    return {"documents": documents, "tokens": tokens, "bytes": num_bytes}


def add_label(tally: Tally, label: str, more: Counts) -> None:
    """Add to a label's counts; where there are too many, a new one is counted under ``other``."""
    if label not in tally and len(tally) >= MAX_LABELS:
        label = OTHER
    before = tally.get(label, counts(0, 0, 0))
    tally[label] = {key: before[key] + more[key] for key in before}


def add_tally(tally: Tally, more: Tally) -> None:
    """Add the counts of all labels of ``more``, in their order."""
    for label, count in more.items():
        add_label(tally, label, count)


_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {4: "int32", 8: "uint16"}  # Megatron's codes
_BLOCK = 1 << 18  # sequences


class Index(NamedTuple):
    """What the header of an index says."""

    dtype: str
    sequences: int
    boundaries: int  # documents + 1

    @property
    def item_size(self) -> int:
        """Bytes a token."""
        return np.dtype(self.dtype).itemsize


def read_index(path: Path, remedy: str) -> Index:
    """Read the header.

    Raises:
        UserError: it is not an index of tokens, or cut inside its header; the sentence ends with ``remedy``.
    """
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is cut short: {remedy}")
    magic, version, code, sequences, boundaries = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise UserError(f"{path} is not an index of tokens: {remedy}")
    return Index(_DTYPES[code], sequences, boundaries)


def index_size(index: Index) -> int:
    """Bytes of the whole file."""
    return _HEADER.size + (4 + 8) * index.sequences + 8 * index.boundaries


def read_lengths(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the tokens of the sequences, int32, a block at a time."""
    yield from _blocks(path, np.dtype(np.int32), _HEADER.size, index.sequences)


def read_pointers(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the places of the sequences in the .bin, int64 bytes, a block at a time."""
    yield from _blocks(path, np.dtype(np.int64), _HEADER.size + 4 * index.sequences, index.sequences)


def read_boundaries(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the number of the first sequence of each document, int64, and one more, a block at a time."""
    yield from _blocks(path, np.dtype(np.int64), _HEADER.size + (4 + 8) * index.sequences, index.boundaries)


def write_index(path: Path, dtype: str, lengths: Path) -> None:
    """Write the index of documents that follow each other in a .bin.

    Args:
        dtype: of the tokens, "uint16" or "int32".
        lengths: a file of int32, the tokens of each document.
    """
    documents = lengths.stat().st_size // 4
    index = Index(dtype, documents, documents + 1)
    code = next(code for code, name in _DTYPES.items() if name == dtype)
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, index.sequences, index.boundaries))
        _write_blocks(stream, lengths, lambda block, first, place: block)
        _write_blocks(stream, lengths, lambda block, first, place: (place + _starts(block)) * index.item_size)
        _write_blocks(stream, lengths, lambda block, first, place: first + np.arange(len(block)))
        stream.write(np.int64(documents).tobytes())


def _write_blocks(stream: IO[bytes], lengths: Path, column: Callable[[np.ndarray, int, int], np.ndarray]) -> None:
    """Write ``column(block, number of its first document, tokens before it)`` for each block of lengths."""
    first = place = 0
    for block in _blocks(lengths, np.dtype(np.int32), 0, lengths.stat().st_size // 4):
        stream.write(column(block, first, place).tobytes())
        first += len(block)
        place += int(block.sum(dtype=np.int64))


def _starts(block: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(block, dtype=np.int64) - block
    return starts


def _blocks(path: Path, dtype: np.dtype, offset: int, count: int) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        stream.seek(offset)
        for done in range(0, count, _BLOCK):
            yield np.fromfile(stream, dtype, min(_BLOCK, count - done))


FORMAT_VERSION = 2
"""Version 1 lacks tokenizer_probe and end_token, and the first files of it also sources, licenses and skipped."""
MASK = ".mask"
_AGAIN = "prepare it again with megatron-slm prepare"


@dataclass(frozen=True)
class Corpus:
    """What PREFIX.json says of a corpus. ``num_bytes`` counts the UTF-8 bytes of its text, as far as it counts."""

    prefix: str
    name: str  # the prefix's basename
    num_documents: int
    num_tokens: int  # end-of-document tokens included
    num_bytes: int
    tokenizer_fingerprint: str
    sha256: dict[str, str]  # ".bin", ".idx" and, where only answers count, ".mask" -> hex
    format_version: int = FORMAT_VERSION
    sources: Tally = field(default_factory=dict)  # where its records name one
    licenses: Tally = field(default_factory=dict)
    skipped: int = 0  # documents that could not be read, in the whole input
    tokenizer_probe: str = ""  # hash of the ids of fixed texts; empty in version 1
    end_token: str | None = None  # chosen with --end-token; None: the tokenizer's own

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """Which tokenizer its tokens are of."""
        return TokenizerIdentity(self.tokenizer_fingerprint, self.tokenizer_probe)

    @property
    def masked(self) -> bool:
        """Whether only some of its tokens count."""
        return MASK in self.sha256


def open_corpus(prefix: str) -> Corpus:
    """Read PREFIX.json and check that the files it speaks of have the sizes it implies.

    Raises:
        UserError: a file is missing, of another version, of another size or not an index.
    """
    corpus = _read_description(prefix)
    for suffix in (".bin", ".idx", *([MASK] if corpus.masked else [])):
        if not Path(prefix + suffix).is_file():
            raise UserError(f"{prefix}{suffix} is missing: {_AGAIN}")
    if not corpus_tokenizer_path(corpus).is_dir():
        raise UserError(f"{corpus_tokenizer_path(corpus)} is missing: {_AGAIN}")
    if corpus.num_tokens <= 0 or corpus.num_documents <= 0:
        raise UserError(f"{prefix}.json describes an empty corpus: prepare it from text")
    item_size = _check_index(corpus)
    _check_size(Path(prefix + ".bin"), corpus.num_tokens * item_size)
    if corpus.masked:
        _check_size(Path(prefix + MASK), corpus.num_tokens)
    return corpus


def describe(corpus: Corpus) -> str:
    """Return the text of PREFIX.json."""
    return json.dumps({key: value for key, value in asdict(corpus).items() if key not in ("prefix", "name")}, indent=2)


def verify_checksums(corpus: Corpus) -> None:
    """Read the whole corpus and compare it with the checksums of PREFIX.json.

    Raises:
        UserError: a file has changed since it was written.
    """
    for suffix, expected in corpus.sha256.items():
        if file_sha256(Path(corpus.prefix + suffix)) != expected:
            raise UserError(f"{corpus.prefix}{suffix} has changed since it was written (its sha256 differs): {_AGAIN}")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_tokens(corpus: Corpus) -> "IndexedDataset":
    """Map the tokens into memory; ``[i]`` is document i, ``.bin_reader`` reads at any offset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(corpus.prefix, multimodal=False, mmap=True)


def count_tokens(corpus: Corpus, documents: "NDArray[np.bool_]") -> int:
    """Tokens in some of the documents, bool `[num_documents]`."""
    index = open_tokens(corpus).index  # held, for it takes its arrays with it when it goes
    return int(index.sequence_lengths[documents].sum(dtype=np.int64))


def open_mask(corpus: Corpus) -> "NDArray[np.uint8] | None":
    """Map the mask into memory, uint8 `[num_tokens]`, 1 where a token counts; None where all do."""
    return np.memmap(corpus.prefix + MASK, dtype=np.uint8, mode="r") if corpus.masked else None


def corpus_tokenizer_path(corpus: Corpus) -> Path:
    """Return the folder of the tokenizer that the corpus carries."""
    return Path(corpus.prefix + ".tokenizer")


def load_corpus_tokenizer(corpus: Corpus) -> "PreTrainedTokenizerFast":
    """Load the tokenizer that the corpus carries.

    Raises:
        UserError: it is not the one that the corpus was prepared with.
    """
    folder = corpus_tokenizer_path(corpus)
    tokenizer = load_tokenizer(str(folder))
    difference = corpus.tokenizer.difference(tokenizer_identity(tokenizer))
    if difference:
        raise UserError(
            f"{folder} is not the tokenizer that {corpus.prefix} was prepared with ({difference}): prepare it again"
        )
    return tokenizer


def describe_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Return the fields of ``Corpus`` that speak of its tokenizer."""
    identity = tokenizer_identity(tokenizer)
    return {
        "tokenizer_fingerprint": identity.fingerprint,
        "tokenizer_probe": identity.probe,
        "end_token": chosen_end_token(tokenizer),
    }


def unique_names(prefixes: list[str]) -> list[str]:
    """Return the basenames of ``prefixes``; one already taken gets the next free suffix -2, -3, ..."""
    names: list[str] = []
    for prefix in prefixes:
        name = base = Path(prefix).name
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _read_description(prefix: str) -> Corpus:
    path = Path(prefix + ".json")
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise UserError(f"{path} has format version {version}, this program reads 1 to {FORMAT_VERSION}: {_AGAIN}")
        if not {".bin", ".idx"} <= fields["sha256"].keys():
            raise UserError(f"{path} does not hold the sha256 of both .bin and .idx: {_AGAIN}")
        return Corpus(prefix=prefix, name=Path(prefix).name, **fields)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so {prefix} is no prepared corpus: check the path, or make it with "
            "megatron-slm prepare"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_AGAIN}") from error


def _check_index(corpus: Corpus) -> int:
    """Check PREFIX.idx against its own header and PREFIX.json; return the bytes a token."""
    path = Path(corpus.prefix + ".idx")
    index = read_index(path, _AGAIN)
    if (index.sequences, index.boundaries) != (corpus.num_documents, corpus.num_documents + 1):
        raise UserError(f"{path} counts {index.sequences} documents and PREFIX.json {corpus.num_documents}: {_AGAIN}")
    _check_size(path, index_size(index))
    return index.item_size


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: {_AGAIN}")
