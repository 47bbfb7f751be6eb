"""Real text that is on every disk where PyTorch is installed: mathematics, and everything else.

The mathematics is what the docstrings of sympy and mpmath explain, which PyTorch installs. The rest is
the sources of the running Python's library and of the other installed packages, and licences.
Files are dealt by the hash of their names, so the same installed packages give the same texts.
"""

import ast
import hashlib
import json
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
"""Entries of the noisy blend; the last one is what there is to find in it."""
HELD_OUT = ("held_out_mathematics", "held_out_general")
MATHEMATICS = ("mpmath", "sympy")

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
    """Bytes of text, at most: each general source in proportion to its weight, the curated text, each held-out set."""

    general: int = 8_000_000
    curated: int = 1_800_000
    held_out: int = 40_000


WEIGHTS = {"stdlib": 0.4, "packages": 0.35, "licences": 0.1, "mathematics": 0.15}
"""Shares of the general text."""


class SourceFile(NamedTuple):
    """A file that text is taken from; its name, the same on every machine, decides what it is used for."""

    path: Path
    name: str

    @property
    def draw(self) -> float:
        return _uniform(self.name)


def write_texts(folder: Path, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Write NAME.jsonl for `curated`, each of `GENERAL` and each of `HELD_OUT`.

    Held-out documents that share 13 consecutive words with any training document are dropped.

    Returns:
        For each name its `documents` and `bytes`, and for held-out ones how many were `dropped`.

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
        counts[name] = _write(folder, name, _take(kept, sizes.held_out)) | {"dropped": len(texts) - len(kept)}
    return counts


def _training(
    mathematics: list[SourceFile], general: dict[str, list[SourceFile]], sizes: Sizes
) -> dict[str, list[str]]:
    """Of the mathematics, half of the files are curated and two fifths are in the noisy blend."""
    curated = [file for file in mathematics if 0.1 <= file.draw < 0.6]
    mixed = [file for file in mathematics if file.draw >= 0.6]
    texts = {"curated": _take(_explanations(curated), sizes.curated)}
    for name, files in general.items():
        found = _contents([file for file in files if file.draw >= _GENERAL_HELD_OUT], _LONGEST_DOCUMENT)
        texts[name] = _take(found, int(sizes.general * WEIGHTS[name]))
    return texts | {"mathematics": _take(_explanations(mixed), int(sizes.general * WEIGHTS["mathematics"]))}


def _held_out(
    mathematics: list[SourceFile], general: dict[str, list[SourceFile]], sizes: Sizes
) -> dict[str, list[str]]:
    """More than is needed, in an order that no file dominates: what overlaps is dropped from it."""
    explained = _explanations([file for file in mathematics if file.draw < 0.1])
    held_out = [file for files in general.values() for file in files if file.draw < _GENERAL_HELD_OUT]
    texts = (sorted(found, key=_uniform) for found in (explained, _contents(held_out, _LONGEST_HELD_OUT)))
    return {name: _take(found, 2 * sizes.held_out) for name, found in zip(HELD_OUT, texts, strict=True)}


def _write(folder: Path, name: str, texts: list[str]) -> dict[str, int]:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}


def _shared_ngrams(training: Iterable[str], held_out: Iterable[str]) -> set[int]:
    """Runs of 13 words that are in both; the training text is passed by once, not held."""
    wanted = set().union(*map(word_ngrams, held_out))
    return set().union(*(word_ngrams(text) & wanted for text in training))


def _take(documents: Iterable[str], limit: int) -> list[str]:
    """Documents up to the first that would exceed `limit` bytes."""
    taken: list[str] = []
    for text in documents:
        limit -= len(text.encode())
        if limit < 0:
            break
        taken.append(text)
    return taken


def _contents(files: Iterable[SourceFile], longest: int) -> Iterator[str]:
    """The beginning of each file, without the comments that head a source: they are licences again."""
    for file in sorted(files, key=lambda file: file.draw):
        content = file.path.read_bytes()[: 2 * longest] if file.path.is_file() else b""
        text = _HEADING.sub("", content.decode("utf-8", errors="ignore"))[:longest].strip()
        if text:
            yield text


def _explanations(files: Iterable[SourceFile]) -> Iterator[str]:
    """Docstrings: a document for each module, and one for each definition in it with those of its methods."""
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
    """An empty module where it is no Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings of other people's sources
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _mathematics_files() -> list[SourceFile]:
    return [file for package in MATHEMATICS for file in _python_files(_package_folder(package), package)]


def _uniform(text: str) -> float:
    """In [0, 1), a function of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} is not installed, whose docstrings the demo trains on: pip install {package}.")
    return Path(spec.origin).parent


def _general_files() -> dict[str, list[SourceFile]]:
    """Files of every general source but the mathematics."""
    installed = [*_installed_files()]
    return {
        "stdlib": _python_files(Path(sysconfig.get_paths()["stdlib"]), "stdlib"),
        "packages": [file for file in installed if file.path.suffix == ".py"],
        "licences": [file for file in installed if file.path.name.lower().startswith(_LICENCES)],
    }


def _installed_files() -> Iterator[SourceFile]:
    """What the installed packages recorded, without the mathematics, tests, and this package."""
    # Other entries come and go while a program runs: setuptools adds the packages that it carries.
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
