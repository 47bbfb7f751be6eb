"""Small texts to prepare, and readers of the prepared corpora."""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.data.corpus import Corpus

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

PROSE = "the slope of a line is rise over run so if x = 3 then y = 12.5 and f(x) is the area under a curve"
WORDS = PROSE.split()


def sentence(number: int, length: int = 40) -> str:
    return " ".join(WORDS[(number * k + k * k + number) % len(WORDS)] for k in range(length))


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    content = "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def encode_here(chunks: Iterable[Any], encoding: Any, workers: int, total_bytes: int) -> Iterator[Any]:
    """Return the same as `encode_chunks` without starting processes, each of which takes a second."""
    from megatron_slm.prepare.encoding import encode_documents

    return ((encode_documents(encoding, chunk.documents), chunk) for chunk in chunks)


def open_tokens(corpus: Corpus) -> "IndexedDataset":
    """Open a corpus with megatron-core's own reader; ``[i]`` is document i."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(corpus.prefix, multimodal=False, mmap=True)


def contents(prefix: Path) -> dict[str, bytes]:
    parts = [path for s in (".bin", ".idx", ".json", ".mask") if (path := Path(f"{prefix}{s}")).exists()]
    parts += sorted(Path(f"{prefix}.tokenizer").iterdir())
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in parts}
