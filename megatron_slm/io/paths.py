"""Paths in settings: expanded when a configuration is read, and checked before anything is written to them."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from megatron_slm.errors import UserError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expand_path(path: str) -> str:
    """Return a path with `~`, `$VAR` and `${VAR}` replaced, as a shell would.

    Raises:
        ValueError: the path is empty, or names a variable or a user that does not exist.
    """
    if not path.strip():
        raise ValueError("is empty. Name a path")
    for found in _VARIABLE.finditer(path):
        name = found[1] or found[2]
        if name not in os.environ:
            raise ValueError(
                f"is '{path}', but the environment variable {name} is not set. Set it, or write the path out"
            )
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise ValueError(
            f"is '{path}', but {Path(path).parts[0]} is no user here. Write the path out, or begin it with ./"
        )
    return expanded


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, or a name on the Hugging Face hub, expanded when a configuration is read."""


def dangling_link(path: Path) -> str | None:
    """Return the target of a symbolic link if the target does not exist; None for any other path."""
    return os.readlink(path) if path.is_symlink() and not path.exists() else None


def refuse_taken(setting: str, path: Path) -> None:
    """Raise an error if a file, a folder or a dangling link exists where a command is to create something.

    Raises:
        UserError: the path is taken.
    """
    if target := dangling_link(path):
        raise UserError(setting, path, f"it is a link to {target}, which does not exist", "Remove the link")
    if path.exists():
        raise UserError(setting, path, "it already exists", "Remove it, or choose a path that does not exist")
