"""A prepared corpus: documents as tokens, and the files that describe them.

PREFIX.bin PREFIX.idx   the tokens and the index of documents, in Megatron's format
PREFIX.json             the description: counts, sources, licenses, checksums
PREFIX.tokenizer/       the tokenizer
PREFIX.mask             a byte per token, 1 if it counts toward the loss; only if some tokens do not
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_slm.data.tokenizer import TokenizerIdentity, chosen_end_token, load_tokenizer, tokenizer_identity
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 2
"""Version 1 lacks tokenizer_probe and end_token; its earliest files also lack sources, licenses and skipped."""
MASK = ".mask"
MAX_LABELS = 1000
AGAIN = "Prepare it again with megatron-slm prepare"

_OTHER = "other"  # counts all labels after the first MAX_LABELS
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {4: "int32", 8: "uint16"}  # Megatron's codes
_BLOCK = 1 << 18  # sequences

Counts = dict[str, int]  # "documents", "tokens" (end tokens included), "bytes" (of text)
Tally = dict[str, Counts]  # by label, in the order of their first occurrence


def counts(documents: int, tokens: int, num_bytes: int) -> Counts:
    """Return the three counts by name."""
    return {"documents": documents, "tokens": tokens, "bytes": num_bytes}


def add_label(tally: Tally, label: str, more: Counts) -> None:
    """Add ``more`` to the counts of a label. After MAX_LABELS labels, new ones count as ``other``."""
    if label not in tally and len(tally) >= MAX_LABELS:
        label = _OTHER
    before = tally.get(label, counts(0, 0, 0))
    tally[label] = {key: before[key] + more[key] for key in before}


def add_tally(tally: Tally, more: Tally) -> None:
    """Add the counts of all labels of ``more``, in their order."""
    for label, count in more.items():
        add_label(tally, label, count)


class Index(NamedTuple):
    """The header of an index."""

    dtype: str
    sequences: int
    boundaries: int  # documents + 1

    @property
    def item_size(self) -> int:
        """Return the bytes per token."""
        return np.dtype(self.dtype).itemsize


def read_index(path: Path, setting: str, value: object, remedy: str = AGAIN) -> Index:
    """Read the header of an index.

    Args:
        path: path of the index.
        setting, value, remedy: fields of a UserError.

    Raises:
        UserError: the file is not an index of tokens, or its header is truncated.
    """
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise UserError(setting, value, f"{path} is truncated", remedy)
    magic, version, code, sequences, boundaries = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise UserError(setting, value, f"{path} is not an index of tokens", remedy)
    return Index(_DTYPES[code], sequences, boundaries)


def index_size(index: Index) -> int:
    """Return the size of the index file, in bytes."""
    return _HEADER.size + (4 + 8) * index.sequences + 8 * index.boundaries


def read_lengths(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the length of each sequence, int32 in tokens, a block at a time."""
    yield from _blocks(path, np.dtype(np.int32), _HEADER.size, index.sequences)


def read_pointers(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the offset of each sequence in the .bin, int64 in bytes, a block at a time."""
    yield from _blocks(path, np.dtype(np.int64), _HEADER.size + 4 * index.sequences, index.sequences)


def read_boundaries(path: Path, index: Index) -> Iterator[np.ndarray]:
    """Yield the first sequence of each document, and finally the number of sequences, int64, a block at a time."""
    yield from _blocks(path, np.dtype(np.int64), _HEADER.size + (4 + 8) * index.sequences, index.boundaries)


def write_index(path: Path, dtype: str, lengths: Path) -> None:
    """Write the index of a .bin whose documents are contiguous and have one sequence each.

    Args:
        path: path of the index.
        dtype: dtype of the tokens, "uint16" or "int32".
        lengths: a file of int32, the number of tokens of each document.
    """
    documents = lengths.stat().st_size // 4
    code = next(code for code, name in _DTYPES.items() if name == dtype)
    with path.open("wb") as stream, lengths.open("rb") as column:
        stream.write(_HEADER.pack(_MAGIC, 1, code, documents, documents + 1))
        shutil.copyfileobj(column, stream)
        start = 0
        for length_D in _blocks(lengths, np.dtype(np.int32), 0, documents):
            end_D = start + np.cumsum(length_D, dtype=np.int64)
            stream.write(((end_D - length_D) * np.dtype(dtype).itemsize).tobytes())
            start = int(end_D[-1])
        for first in range(0, documents + 1, _BLOCK):
            stream.write(np.arange(first, min(first + _BLOCK, documents + 1), dtype=np.int64).tobytes())


def _blocks(path: Path, dtype: np.dtype, offset: int, count: int) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        stream.seek(offset)
        for done in range(0, count, _BLOCK):
            yield np.fromfile(stream, dtype, min(_BLOCK, count - done))


@dataclass(frozen=True)
class Corpus:
    """The description of a corpus, PREFIX.json."""

    prefix: str
    name: str  # the prefix's basename
    num_documents: int
    num_tokens: int  # end-of-document tokens included
    num_bytes: int  # of the text that counts toward the loss, in UTF-8
    tokenizer_fingerprint: str
    sha256: dict[str, str]  # in hex, by suffix: ".bin", ".idx" and, if only some tokens count, ".mask"
    format_version: int = FORMAT_VERSION
    sources: Tally = field(default_factory=dict)  # of the records that name one
    licenses: Tally = field(default_factory=dict)
    skipped: int = 0  # documents of the whole input that could not be read
    tokenizer_probe: str = ""  # hash of the ids of fixed texts; empty in version 1
    end_token: str | None = None  # chosen with --end-token; None for the tokenizer's own

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """Return the identity of the tokenizer that made the tokens."""
        return TokenizerIdentity(self.tokenizer_fingerprint, self.tokenizer_probe)

    @property
    def masked(self) -> bool:
        """Return True if only some tokens count toward the loss."""
        return MASK in self.sha256


class Documents(NamedTuple):
    """The documents of a corpus, mapped from its index.

    dtype      dtype of the tokens
    length_D   int32 `[D]`, number of tokens of each, including its end token
    pointer_D  int64 `[D]`, offset of each in the .bin, in bytes
    """

    dtype: np.dtype
    length_D: "NDArray[np.int32]"
    pointer_D: "NDArray[np.int64]"

    def starts(self, documents: slice = slice(None)) -> "NDArray[np.int64]":
        """Return the offset of the first token of each document, int64 in tokens."""
        return self.pointer_D[documents] // self.dtype.itemsize

    def between(self, first: int, last: int) -> slice:
        """Return a slice of the documents that have tokens at offsets `first` to `last - 1`."""
        low = int(np.searchsorted(self.pointer_D, first * self.dtype.itemsize, "right")) - 1
        return slice(low, int(np.searchsorted(self.pointer_D, last * self.dtype.itemsize, "left")))


def open_corpus(prefix: str, setting: str = "corpus") -> Corpus:
    """Read PREFIX.json and check the existence and the sizes of all files of the corpus.

    Args:
        prefix: PREFIX of the corpus.
        setting: the setting or option that names it, for errors.

    Raises:
        UserError: the corpus is empty, or a file is missing or has an unsupported version or the wrong size.
    """
    corpus = _read_description(prefix, setting)
    for suffix in (".bin", ".idx", *([MASK] if corpus.masked else [])):
        if not Path(prefix + suffix).is_file():
            raise UserError(setting, prefix, f"{prefix}{suffix} is missing", AGAIN)
    if not corpus_tokenizer_path(corpus).is_dir():
        raise UserError(setting, prefix, f"{corpus_tokenizer_path(corpus)} is missing", AGAIN)
    if corpus.num_tokens <= 0 or corpus.num_documents <= 0:
        raise UserError(setting, prefix, "the corpus is empty", "Prepare it from files that hold text")
    item_size = _check_index(corpus, setting)
    _check_size(corpus, ".bin", corpus.num_tokens * item_size, setting)
    if corpus.masked:
        _check_size(corpus, MASK, corpus.num_tokens, setting)
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
            raise changed(corpus, suffix)


def changed(corpus: Corpus, suffix: str) -> UserError:
    """Return the error for a file whose checksum differs from that in PREFIX.json."""
    reason = f"{corpus.prefix}{suffix} has changed since it was written (its SHA-256 differs)"
    return UserError("corpus", corpus.prefix, reason, AGAIN)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_documents(corpus: Corpus) -> Documents:
    """Map the index of the documents into memory.

    Raises:
        UserError: PREFIX.idx is not an index of tokens.
    """
    path = Path(f"{corpus.prefix}.idx")
    index = read_index(path, "corpus", corpus.prefix)
    return Documents(
        dtype=np.dtype(index.dtype),
        length_D=np.memmap(path, np.int32, "r", _HEADER.size, (index.sequences,)),
        pointer_D=np.memmap(path, np.int64, "r", _HEADER.size + 4 * index.sequences, (index.sequences,)),
    )


def map_tokens(corpus: Corpus) -> "NDArray[np.integer]":
    """Map the tokens into memory, uint16 or int32 `[num_tokens]`.

    Raises:
        UserError: PREFIX.idx is not an index of tokens.
    """
    index = read_index(Path(f"{corpus.prefix}.idx"), "corpus", corpus.prefix)
    return np.memmap(f"{corpus.prefix}.bin", dtype=index.dtype, mode="r")


def open_mask(corpus: Corpus) -> "NDArray[np.uint8] | None":
    """Map the mask into memory, uint8 `[num_tokens]`, 1 for tokens that count toward the loss; None if all do."""
    return np.memmap(corpus.prefix + MASK, dtype=np.uint8, mode="r") if corpus.masked else None


def count_tokens(corpus: Corpus, documents: "NDArray[np.bool_]") -> int:
    """Return the number of tokens of the documents that a mask, bool `[num_documents]`, selects."""
    return int(open_documents(corpus).length_D[documents].sum(dtype=np.int64))


def corpus_tokenizer_path(corpus: Corpus) -> Path:
    """Return the folder of the corpus's tokenizer."""
    return Path(corpus.prefix + ".tokenizer")


def load_corpus_tokenizer(corpus: Corpus) -> "PreTrainedTokenizerFast":
    """Load the corpus's tokenizer.

    Raises:
        UserError: PREFIX.tokenizer is not the tokenizer that the corpus was prepared with.
    """
    folder = corpus_tokenizer_path(corpus)
    tokenizer = load_tokenizer(str(folder))
    difference = corpus.tokenizer.difference(tokenizer_identity(tokenizer))
    if difference:
        reason = f"{folder} is not the tokenizer that it was prepared with ({difference})"
        raise UserError("corpus", corpus.prefix, reason, AGAIN)
    return tokenizer


def describe_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Return the fields of ``Corpus`` that describe its tokenizer."""
    identity = tokenizer_identity(tokenizer)
    return {
        "tokenizer_fingerprint": identity.fingerprint,
        "tokenizer_probe": identity.probe,
        "end_token": chosen_end_token(tokenizer),
    }


def unique_names(prefixes: list[str]) -> list[str]:
    """Return the basenames of ``prefixes``, with the next free suffix -2, -3, ... for repeated ones."""
    names: list[str] = []
    for prefix in prefixes:
        name = base = Path(prefix).name
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _read_description(prefix: str, setting: str) -> Corpus:
    path = Path(prefix + ".json")
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        supported = version in range(1, FORMAT_VERSION + 1)
        if supported:
            corpus = Corpus(prefix=prefix, name=Path(prefix).name, **fields)
            if {".bin", ".idx"} <= corpus.sha256.keys():
                return corpus
    except FileNotFoundError:
        reason = f"{path} is missing, so it is not a prepared corpus"
        remedy = "Check the path, or make the corpus with megatron-slm prepare"
        raise UserError(setting, prefix, reason, remedy) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(setting, prefix, f"{path} cannot be read ({error})", AGAIN) from error
    if supported:
        raise UserError(setting, prefix, f"{path} lacks the SHA-256 of .bin or .idx", AGAIN)
    reason = f"{path} has format version {version}, and this program reads versions 1 to {FORMAT_VERSION}"
    raise UserError(setting, prefix, reason, AGAIN)


def _check_index(corpus: Corpus, setting: str) -> int:
    """Check PREFIX.idx against its own header and PREFIX.json; return the bytes per token."""
    path = Path(corpus.prefix + ".idx")
    index = read_index(path, setting, corpus.prefix)
    if (index.sequences, index.boundaries) != (corpus.num_documents, corpus.num_documents + 1):
        reason = f"{path} has {index.sequences} documents, and {corpus.prefix}.json records {corpus.num_documents}"
        raise UserError(setting, corpus.prefix, reason, AGAIN)
    _check_size(corpus, ".idx", index_size(index), setting)
    return index.item_size


def _check_size(corpus: Corpus, suffix: str, expected: int, setting: str) -> None:
    path = Path(corpus.prefix + suffix)
    size = path.stat().st_size
    if size != expected:
        raise UserError(setting, corpus.prefix, f"{path} has {size} bytes instead of {expected}", AGAIN)
