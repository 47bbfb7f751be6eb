"""Checks of a path before anything is written to it."""

import os
from pathlib import Path

from megatron_slm.errors import UserError


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
