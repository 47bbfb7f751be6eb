"""The house as its plan draws it: who imports whom, how long things are, what may not occur."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_slm"
LEAVES = {
    *("errors", "settings", "io", "types", "signals", "launcher", "dist", "backend", "liveness", "torch_internals"),
    "devices",
}
CORE = {"data", "models", "reference", "selection", "training"}
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "settings": {"errors"},
    "io": {"errors"},
    "launcher": {"errors"},
    "dist": {"errors", "launcher", "torch_internals"},
    "torch_internals": set(),
    # What a rank does, and what the others hear of it.
    "liveness": {"dist", "errors", "settings"},
    "devices": {"errors"},
    "backend": {"dist", "errors", "torch_internals"},
    # Torch alone, and pydantic for its settings: for anyone's training loop.
    "selection": {"errors", "settings"},
    # Declares what scores read, what heads compute and what stores hold.
    "signals": {"selection", "types"},
    # Pages and charts of plain values, for any part that shows something.
    "reporting": set(),
    # Figures from the files of runs: no model.
    "analysis": {"config", "data", "errors", "io", "reporting"},
    "data": LEAVES - {"backend"},
    "prepare": LEAVES - {"backend"} | {"data"},
    "models": LEAVES | {"selection"},
    "reference": LEAVES | {"data", "models"},
    "training": LEAVES | CORE | {"reporting"},
    "config_file": {"errors"},
    "config": {"errors", "settings", "config_file"} | CORE,
    "run_directory": {"config", "dist", "errors", "io", "training"},
    # Estimates of plain numbers; it knows the sizes of models, but no configuration.
    "planning": {"devices", "errors", "io", "selection", "training"},
    "build": LEAVES | CORE | {"config", "run_directory", "planning", "reporting"},
    "device_check": LEAVES | CORE | {"build"},
    # Before a model is loaded: the ranks, their hosts and files alone.
    "doctor": {"dist", "errors", "launcher"},
    "demo": LEAVES | {"data", "prepare", "models", "selection", "reporting"},
    # One file per verb, on top of all parts.
    "commands": LEAVES
    | CORE
    | {"config", "config_file", "run_directory", "prepare", "build", "planning", "demo", "device_check", "doctor"}
    | {"analysis", "reporting"},
    "__main__": {"errors", "launcher", "__init__"},
    "__init__": {"selection", "errors", "training", "commands"},
}
HEAVY = ("torch", "transformers", "deepspeed", "megatron.core", "numpy", "sentencepiece", "tokenizers")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The first level of the house that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield f"{node.module}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_data_flows_one_way(path: Path) -> None:
    for name in imports(path):
        if name.split(".")[0] != "megatron_slm":
            continue
        imported = name.split(".")[1] if "." in name else "__init__"
        assert imported == part(path) or imported in MAY_IMPORT[part(path)], f"{part(path)} imports {name}"


def test_deepspeed_is_imported_in_its_backend_alone() -> None:
    importers = {path for path in sources() if any(name.split(".")[0] == "deepspeed" for name in imports(path))}
    assert importers == {PACKAGE / "backend" / name for name in ("deepspeed.py", "deepspeed_internals.py")}


def test_only_commands_build_objects_from_a_configuration() -> None:
    importers = {
        part(path) for path in sources() if any(name.startswith("megatron_slm.build") for name in imports(path))
    }
    assert importers == {"commands", "build", "device_check"}


def test_settings_import_nothing_heavy() -> None:
    program = f"import megatron_slm.config, sys; print([n for n in {HEAVY} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_selection_core_needs_torch_alone() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); from megatron_slm.selection import select_tokens;"
        "new = {n.split('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(n for n in new if n not in ('torch', 'megatron_slm')))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_no_function_is_longer_than_sixty_lines_and_no_file_than_four_hundred() -> None:
    long = [f"{p}:{f.name}" for p in sources() for f in functions(p) if (f.end_lineno or 0) - f.lineno >= 60]
    assert not long
    assert not [str(path) for path in sources() if path.read_text().count("\n") > 400]


def test_every_argument_has_a_type() -> None:
    bare = [
        f"{path}:{function.name}:{argument.arg}"
        for path in sources()
        for function in functions(path)
        for argument in [*function.args.args, *function.args.kwonlyargs, *function.args.posonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert not bare


def test_nothing_prints_or_names_a_device_by_hand() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") != "print", path
                assert getattr(node.func, "attr", "") != "cuda", path


def test_every_public_function_says_what_it_does() -> None:
    silent = [
        f"{path}:{node.name}"
        for path in sources()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if ast.get_docstring(node) is None
    ]
    assert not silent
