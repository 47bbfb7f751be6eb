"""A prepared corpus: PREFIX.bin and PREFIX.idx (Megatron's format), PREFIX.json, PREFIX.tokenizer/.

Where only answers count there is PREFIX.mask too: a byte a token of the .bin, 1 where it counts.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_slm.data.index import index_size, read_index
from megatron_slm.data.tally import Tally
from megatron_slm.data.tokenizer import TokenizerIdentity, chosen_end_token, load_tokenizer, tokenizer_identity
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

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
