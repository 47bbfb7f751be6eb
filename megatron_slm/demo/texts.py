"""The demo's corpora: real text that every machine with PyTorch has on its disk.

The mathematics comes from the docstrings of sympy and mpmath, which are installed with PyTorch. The general text comes
from the sources of Python's library and of the other installed packages, and from licences. The hash of its name
decides how a file is used, so the same installed packages give the same texts.

`python -m megatron_slm.demo.texts FOLDER GENERAL CURATED HELD_OUT` makes all corpora in one process, because starting a
process takes longer than preparing a corpus.
"""

import ast
import hashlib
import json
import logging
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megatron_slm.errors import UserError
from megatron_slm.prepare.contamination import word_ngrams

GENERAL = ("stdlib", "packages", "licences", "mathematics")
"""The sources of the noisy blend; selection should find the mathematics in it."""
HELD_OUT = ("held_out_mathematics", "held_out_general")
MATHEMATICS = ("mpmath", "sympy")
VOCABULARY = 2048
COUNTS = "texts.json"

_OWN = "megatron_slm"
_SKIPPED = {"test", "tests", "testing", "idlelib", "site-packages", "dist-packages"}
_INSTALLED = ("site-packages", "dist-packages")
_LICENCES = ("licen", "copying", "notice", "metadata")
_GENERAL_HELD_OUT = 0.05  # of the files
_LONGEST_DOCUMENT, _LONGEST_HELD_OUT = 16_000, 3_000  # characters of general text: many files, a little of each
_HEADING = re.compile(r"\A(?:\s*#.*\n)+")
_SHORTEST_DOCSTRING = 80  # characters
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Sizes:
    """Upper limits in bytes: the general text, divided by `WEIGHTS`; the curated text; each held-out set."""

    general: int = 8_000_000
    curated: int = 1_800_000
    held_out: int = 40_000


WEIGHTS = {"stdlib": 0.4, "packages": 0.35, "licences": 0.1, "mathematics": 0.15}
"""The share of each source in the general text."""


class SourceFile(NamedTuple):
    """A source of text; its name is the same on every machine, and decides how the file is used."""

    path: Path
    name: str

    @property
    def draw(self) -> float:
        """A number in [0, 1) that depends on the name only."""
        return _uniform(self.name)


def make_corpora(folder: Path, sizes: Sizes) -> None:
    """Write the texts, train a tokenizer on the general ones, and prepare a corpus from each.

    Raises:
        UserError: sympy or mpmath is not installed, or a corpus cannot be prepared.
    """
    from megatron_slm.data.sentencepiece_model import train_tokenizer
    from megatron_slm.prepare.prepare import prepare_corpus

    folder.mkdir(parents=True, exist_ok=True)
    counts = write_texts(folder, sizes)
    model = folder / "tokenizer.model"
    train_tokenizer(_read_texts(folder, GENERAL), VOCABULARY, model)
    for name in (*GENERAL, "curated", *HELD_OUT):
        prepare_corpus([str(folder / f"{name}.jsonl")], str(folder / name), tokenizer=str(model))
    (folder / COUNTS).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _read_texts(folder: Path, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        for line in (folder / f"{name}.jsonl").open(encoding="utf-8"):
            yield json.loads(line)["text"]


def write_texts(folder: Path, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Write NAME.jsonl for `curated`, each of `GENERAL` and each of `HELD_OUT`.

    Held-out documents that share 13 consecutive words with a training document are dropped.

    Returns:
        For each name the number of `documents` and `bytes`, and for held-out sets how many documents were `dropped`.

    Raises:
        UserError: sympy or mpmath is not installed.
    """
    mathematics, general = _mathematics_files(), _general_files()
    training = _training(mathematics, general, sizes)
    candidates = _held_out(mathematics, general, sizes)
    shared = _shared_ngrams(chain(*training.values()), chain(*candidates.values()))
    counts = {name: _write(folder, name, texts) for name, texts in training.items()}
    for name, texts in candidates.items():
        kept = [text for text in texts if not word_ngrams(text) & shared]
        counts[name] = _write(folder, name, _up_to(kept, sizes.held_out)) | {"dropped": len(texts) - len(kept)}
    return counts


def _training(
    mathematics: list[SourceFile], general: dict[str, list[SourceFile]], sizes: Sizes
) -> dict[str, list[str]]:
    """Return the training texts. Half of the mathematics files are curated, and two fifths are in the noisy blend."""
    curated = [file for file in mathematics if 0.1 <= file.draw < 0.6]
    mixed = [file for file in mathematics if file.draw >= 0.6]
    texts = {"curated": _up_to(_explanations(curated), sizes.curated)}
    for name, files in general.items():
        found = _contents([file for file in files if file.draw >= _GENERAL_HELD_OUT], _LONGEST_DOCUMENT)
        texts[name] = _up_to(found, int(sizes.general * WEIGHTS[name]))
    return texts | {"mathematics": _up_to(_explanations(mixed), int(sizes.general * WEIGHTS["mathematics"]))}


def _held_out(
    mathematics: list[SourceFile], general: dict[str, list[SourceFile]], sizes: Sizes
) -> dict[str, list[str]]:
    """Return candidates, twice as many bytes as needed because some are dropped, in an order that mixes the files."""
    explained = _explanations([file for file in mathematics if file.draw < 0.1])
    held_out = [file for files in general.values() for file in files if file.draw < _GENERAL_HELD_OUT]
    texts = (sorted(found, key=_uniform) for found in (explained, _contents(held_out, _LONGEST_HELD_OUT)))
    return {name: _up_to(found, 2 * sizes.held_out) for name, found in zip(HELD_OUT, texts, strict=True)}


def _write(folder: Path, name: str, texts: list[str]) -> dict[str, int]:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}


def _shared_ngrams(training: Iterable[str], held_out: Iterable[str]) -> set[int]:
    """Return the runs of 13 words that occur in both. The training texts are read once and not kept in memory."""
    wanted = set().union(*map(word_ngrams, held_out))
    return set().union(*(word_ngrams(text) & wanted for text in training))


def _up_to(documents: Iterable[str], limit: int) -> list[str]:
    """Return the documents before the first one that exceeds `limit` bytes in total."""
    chosen: list[str] = []
    for text in documents:
        limit -= len(text.encode())
        if limit < 0:
            break
        chosen.append(text)
    return chosen


def _contents(files: Iterable[SourceFile], longest: int) -> Iterator[str]:
    """Yield the beginning of each file, without the comments at the top of a source, which repeat licences."""
    for file in sorted(files, key=lambda file: file.draw):
        content = file.path.read_bytes()[: 2 * longest] if file.path.is_file() else b""
        text = _HEADING.sub("", content.decode("utf-8", errors="ignore"))[:longest].strip()
        if text:
            yield text


def _explanations(files: Iterable[SourceFile]) -> Iterator[str]:
    """Yield docstrings: a document per module, and one per definition with the docstrings of its methods."""
    for file in sorted(files, key=lambda file: file.draw):
        module = _parse(file.path.read_bytes())
        definitions = [node for node in module.body if isinstance(node, _DOCUMENTED)]
        for group in (_docstrings([module]), *(_docstrings([node, *node.body]) for node in definitions)):
            if group:
                yield "\n\n".join(group).encode("utf-8", errors="ignore").decode()


def _docstrings(nodes: Sequence[ast.AST]) -> list[str]:
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, _DOCUMENTED)]
    return [text for text in texts if text and len(text) > _SHORTEST_DOCSTRING]


def _parse(source: bytes) -> ast.Module:
    """Parse a source; return an empty module if it is not valid in this version of Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third-party sources have invalid escapes
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _mathematics_files() -> list[SourceFile]:
    return [file for package in MATHEMATICS for file in _python_files(_package_folder(package), package)]


def _uniform(text: str) -> float:
    """Return a number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        reason = "it is not installed; the demo trains on its docstrings"
        raise UserError("package", package, reason, f"Install it: pip install {package}")
    return Path(spec.origin).parent


def _general_files() -> dict[str, list[SourceFile]]:
    """Return the files of every general source except the mathematics."""
    installed = list(_installed_files())
    return {
        "stdlib": _python_files(Path(sysconfig.get_paths()["stdlib"]), "stdlib"),
        "packages": [file for file in installed if file.path.suffix == ".py"],
        "licences": [file for file in installed if file.path.name.lower().startswith(_LICENCES)],
    }


def _installed_files() -> Iterator[SourceFile]:
    """Yield the recorded files of the installed packages, except for the mathematics, tests, and this package."""
    # Other entries of sys.path change while a program runs: setuptools adds the packages that it vendors.
    installed = [entry for entry in sys.path if Path(entry).name in _INSTALLED]
    for distribution in metadata.distributions(path=installed):
        if distribution.name in (*MATHEMATICS, _OWN):
            continue
        for file in distribution.files or ():
            if not _SKIPPED & set(file.parts):
                yield SourceFile(Path(str(file.locate())), str(file))


def _python_files(folder: Path, prefix: str) -> list[SourceFile]:
    paths = ((path, path.relative_to(folder)) for path in folder.rglob("*.py"))
    return [SourceFile(path, f"{prefix}/{name}") for path, name in paths if not _SKIPPED & set(name.parts)]


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    make_corpora(Path(sys.argv[1]), Sizes(*map(int, sys.argv[2:])))
