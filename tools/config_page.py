"""Write docs/configuration.md: every setting with its type, unit, default and where its name comes from.

    python tools/config_page.py > docs/configuration.md

The settings classes are the one source. Each explains a setting on a line of its docstring:
`name  meaning [unit; origin]`.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from megatron_slm.config import MAY_CHANGE_ON_RESUME, OWNED_DEEPSPEED_KEYS, PASSED_DEEPSPEED_KEYS, Config

LINE = re.compile(r"^(\w+) {2,}(.+?) \[([^;\]]*);? ?([^\]]*)\]$", re.MULTILINE | re.DOTALL)
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "group", list: "list"}
INTRODUCTION = """# Every setting

Written by `python tools/config_page.py > docs/configuration.md`; a test holds it to the code.

One YAML file per run; `a.b=c` on the command line replaces a value. Numbers may be written `80e9`, `80B` or
`80_000_000_000`. In paths, `~`, `$VAR` and `${VAR}` are replaced when the configuration is read, and `config.yaml`
of the run holds the result. A setting that does not exist is an error that names the nearest one. A setting that is
given twice, in the file or on the command line, is an error too. *Origin*: where the name comes from.
A ⟳ marks what may differ when a run is resumed; anything else is refused, and the sentence says what differs.
"""


def groups(kind: type = Config, name: str = "") -> Iterator[tuple[str, type]]:
    """The settings classes, each with the name of its group; the run's own first."""
    yield name, kind
    for field, hint in typing.get_type_hints(kind).items():
        for nested in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            yield from groups(nested, f"{name}{'.' if name else ''}{field}")


def explanations(kind: type) -> dict[str, tuple[str, str, str]]:
    """Meaning, unit and origin of each setting of a class."""
    text = re.sub(r"\n {2,}", " ", inspect.getdoc(kind) or "")
    return {name: (meaning, unit, origin) for name, meaning, unit, origin in LINE.findall(text)}


def type_in_words(hint: Any) -> str:
    """`int | None` as 'whole number'."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(type_in_words(part) for part in typing.get_args(hint) if part is not type(None))
    arguments = [part for part in typing.get_args(hint) if part is not Ellipsis]
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        return f"list of {' and '.join(dict.fromkeys(map(type_in_words, arguments)))}"
    if origin is dict and arguments[1] is str:
        return "group of names and texts"
    return WORDS[origin or hint]


def default_in_words(field: dataclasses.Field[Any]) -> str:
    """The default as it would be written in YAML."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "*required*"
    else:
        value = field.default
    if value is None or value in ({}, [], ()):
        return "-"
    text = str(list(value) if isinstance(value, tuple) else value).replace("'", "")
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def table(name: str, kind: type) -> str:
    """One group as Markdown."""
    hints, explained = typing.get_type_hints(kind), explanations(kind)
    title = (inspect.getdoc(kind) or "").partition("\n")[0]
    lines = [
        f"## {f'`{name}:`' if name else 'The run'}\n\n{title} Declared in `{kind.__module__.replace('.', '/')}.py`.\n",
        "| setting | type | unit | default | meaning | origin |\n|---|---|---|---|---|---|",
    ]
    for field in dataclasses.fields(kind):
        if any(map(dataclasses.is_dataclass, (hints[field.name], *typing.get_args(hints[field.name])))):
            continue
        full = f"{name}.{field.name}".lstrip(".")
        meaning, unit, origin = explained[field.name]
        mark = " ⟳" if full in MAY_CHANGE_ON_RESUME else ""
        cells = (f"`{full}`{mark}", type_in_words(hints[field.name]), unit or "-", default_in_words(field), meaning)
        lines.append("| " + " | ".join((*cells, origin)) + " |")
    return "\n".join(lines)


def deepspeed_keys() -> str:
    """What of `deepspeed:` is passed on, and what to use in place of the rest."""
    passed = ", ".join(f"`{key}`" for key in PASSED_DEEPSPEED_KEYS)
    rows = "\n".join(f"| `{key}` | {ours or 'nothing: leave it out'} |" for key, ours in OWNED_DEEPSPEED_KEYS.items())
    return (
        f"## `deepspeed:`\n\nPassed to DeepSpeed as it is: {passed}. Its documentation explains them.\n\n"
        f"These this system sets itself; they are refused:\n\n| DeepSpeed's key | use instead |\n|---|---|\n{rows}"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    parts = [INTRODUCTION.rstrip(), *(table(name, kind) for name, kind in groups()), deepspeed_keys()]
    sys.stdout.write("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
