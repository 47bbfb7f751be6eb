"""Links to the files of a folder, under names that `datasets` reads as names and not as patterns or URLs."""

import os
import re
import tempfile
from pathlib import Path

# What fsspec reads as a pattern, or as a chain of URLs (datasets 5.2), and characters that sort as these do.
_PLAIN = {"*": "+", "?": ">", "[": "^", "\\": "_", "]": "`", "::": ":;"}
_SPECIAL = re.compile("|".join(map(re.escape, _PLAIN)))


def link_plain_names(folder: Path) -> "tempfile.TemporaryDirectory[str] | None":
    """Return a new folder of links to all files below ``folder``, or None if no name there is special.

    The files keep their order. The links are removed with the object that is returned.
    """
    found = [Path(root, name) for root, below, names in os.walk(folder) for name in (*names, *_links(root, below))]
    if not any(_SPECIAL.search(str(path)) for path in (folder.resolve(), *found)):
        return None
    plain = tempfile.TemporaryDirectory(prefix="dataset-")
    for path in sorted(found):
        link = Path(plain.name, _SPECIAL.sub(lambda match: _PLAIN[match[0]], str(path.relative_to(folder))))
        link.parent.mkdir(parents=True, exist_ok=True)
        _free(link).symlink_to(path.resolve())
    return plain


def _links(root: str, folders: list[str]) -> list[str]:
    return [name for name in folders if Path(root, name).is_symlink()]


def _free(path: Path) -> Path:
    """Return the path, or where it is taken another one; the number comes first, for suffixes say what a file holds."""
    number, free = 1, path
    while free.is_symlink():
        number += 1
        free = path.with_name(f"{number}-{path.name}")
    return free
