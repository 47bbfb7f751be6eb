"""The main job, small, on text that is already on this disk: prepare, train a reference, train selectively, export.

General text is the source of the running Python's library; curated text is the mathematics that
the docstrings of sympy and mpmath explain (PyTorch installs both). A tenth of the mathematics is
held out; a part of it is mixed into the general text, so that there is something to find.

    python tools/demo.py --output demo

Took 15 minutes on two CPU cores that ran the tests besides. A stage that is finished is not run again.
"""

import argparse
import ast
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from stages import MODEL, Stages

STEPS = 80
GENERAL_BYTES = 4_000_000


def python_files(folder: Path) -> list[Path]:
    """Sources below a folder in a fixed order, without tests and installed packages."""
    skipped = ("test", "tests", "site-packages", "idlelib")
    files = [path for path in folder.rglob("*.py") if not set(path.relative_to(folder).parts) & set(skipped)]
    return sorted(files)


def docstrings(file: Path) -> str:
    """The explanations in one source file."""
    tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in texts if text and len(text) > 80)


def mathematics() -> Iterator[str]:
    for package in ("mpmath", "sympy"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(f"demo: {package} is not installed, which PyTorch brings along: pip install {package}")
        yield from filter(None, (docstrings(file) for file in python_files(Path(spec.origin).parent)))


def general() -> Iterator[str]:
    budget = GENERAL_BYTES
    # Every seventh file: a part of the library that is not one of its corners.
    for file in python_files(Path(sysconfig.get_paths()["stdlib"]))[::7]:
        text = file.read_text(encoding="utf-8", errors="ignore")
        budget -= len(text)
        if budget < 0:
            return
        if text:
            yield text


def write(path: Path, texts: Iterable[str]) -> Path:
    if not path.exists():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        path.write_text(lines, encoding="utf-8")
    return path


def run_stages(stages: Stages) -> None:
    texts = list(mathematics())
    held_out, curated, mixed = texts[::10], texts[1::2], [t for i, t in enumerate(texts) if i % 10 and i % 2 == 0]
    files = {"general": [*general(), *mixed], "curated": curated, "math": held_out}
    for name, documents in files.items():
        path = write(stages.folder / f"{name}.jsonl", documents)
        stages.prepare(name, path, tokenizer_of=None if name == "general" else "general")
    stages.train("base", "general", STEPS, 2.0e-3, ["math"], model={"config": MODEL}, split="25,75,0")
    stages.export("base")
    stages.train("reference", "curated", STEPS, 1.0e-3, ["math"])
    stages.export("reference")
    reference = {"path": str(stages.folder / "hf-reference")}
    stages.train("clm", "general", STEPS, 8.0e-4, ["math"])
    stages.train("slm", "general", STEPS, 8.0e-4, ["math"], objective="slm", reference=reference)
    stages.export("slm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo", type=Path, help="folder to make; default: %(default)s")
    parser.add_argument("--ranks", default=2, type=int, help="processes a run; default: %(default)s")
    arguments = parser.parse_args()
    stages = Stages(arguments.output, arguments.ranks)
    run_stages(stages)
    sys.stdout.write(
        f"\nHeld-out mathematics:\n\n{stages.table(['base', 'reference', 'clm', 'slm'], ['math'])}\n\n"
        f"The selectively trained model: {stages.folder}/hf-slm\n"
        f"Curves: tensorboard --logdir {stages.folder}\n"
    )


if __name__ == "__main__":
    main()
