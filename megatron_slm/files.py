"""Files that are whole or not there, also after the machine went down."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
