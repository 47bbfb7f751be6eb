"""Files that are whole or not there, also after the machine went down."""

import os
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
