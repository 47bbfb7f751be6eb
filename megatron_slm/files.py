"""Paths as people write them: expanded when a configuration is read, and refused where something is already."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Return where a symbolic link that leads nowhere points to; None for anything else."""
    return os.readlink(path) if path.is_symlink() and not path.exists() else None


def refuse_taken(setting: str, path: Path) -> None:
    """Refuse to create a file or folder where something is, also a link that leads nowhere.

    Raises:
        UserError: naming `setting`.
    """
    if target := dangling_link(path):
        raise UserError(
            f"{setting} is {path}, a link to {target}, which does not exist. Remove the link, or name another path."
        )
    if path.exists():
        raise UserError(f"{setting} is {path}, which exists. Name a path that does not exist, or remove it first.")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk: a rename is durable once its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a text file and flush it; it replaces an older one at once, or not at all.

    Raises:
        OSError: it cannot be written; an older one is as it was.
    """
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)
    sync(path.parent)


@contextmanager
def whole_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder to write to, which becomes `folder` when the block ends.

    If the block raises, nothing changes. After a kill, `folder` is whole or as it was, or missing if it was there.

    Args:
        folder: to make.
        replace: remove an older one.

    Raises:
        OSError: it cannot be written, or is there and may not be replaced.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        if replace and folder.exists():
            shutil.rmtree(folder)
        elif folder.exists():
            raise FileExistsError(f"{folder} has appeared meanwhile")
        aside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
