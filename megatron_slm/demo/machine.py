"""Checks of the machine and the output folder, before anything is written."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_slm.errors import UserError
from megatron_slm.io.files import hold

PYTHONS = ((3, 11), (3, 13))
MEMORY_GIB, DISK_GIB = 4.0, 1.0
MARK = "demo.json"


def check_machine(folder: Path) -> None:
    """Raise a UserError if the Python version, the memory or the disk space would make the demo fail minutes later."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    check_python(sys.version_info[:2])
    check_space(psutil.virtual_memory().available / 2**30, shutil.disk_usage(existing).free / 2**30, existing)


def check_python(version: tuple[int, ...]) -> None:
    """Raise a UserError if the libraries do not support this version of Python."""
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        low, high, found = (".".join(map(str, one)) for one in (*PYTHONS, version))
        raise UserError(
            "Python", found, f"the libraries support {low} to {high}", "Install one of these and run the demo with it"
        )


def check_space(memory: float, disk: float, folder: Path) -> None:
    """Raise a UserError if memory or disk space is too small.

    Args:
        memory: available, in GiB.
        disk: free at `folder`, in GiB.
        folder: an existing folder on the disk of the output.
    """
    if memory < MEMORY_GIB:
        raise UserError(
            "available memory", f"{memory:.1f} GiB", f"the demo needs {MEMORY_GIB:g} GiB", "Close other programs"
        )
    if disk < DISK_GIB:
        remedy = "Free disk space, or choose an --output on another disk"
        raise UserError("free disk space", f"{disk:.1f} GiB", f"the demo needs {DISK_GIB:g} GiB at {folder}", remedy)


def check_ranks(ranks: int, samples: int) -> None:
    """Raise a UserError if the samples of a step cannot be divided evenly among the ranks."""
    if ranks < 1 or samples % ranks:
        possible = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
        raise UserError("--ranks", ranks, f"it must divide the {samples} samples of a step", f"Use one of {possible}")


def check_folder(folder: Path, options: dict[str, Any]) -> None:
    """Raise a UserError unless the folder is new, empty, or holds a demo with the same options."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError("--output", folder, "it is a file", "Choose a folder, or a path that does not exist")
    if (folder / MARK).exists():
        if (found := _read_options(folder)) not in (None, options):
            reason = f"it holds a demo with other options ({_as_text(found)})"
            raise UserError("--output", folder, reason, "Choose another folder, or remove it")
    elif any(folder.iterdir()):
        raise UserError("--output", folder, "it holds other files", "Choose another folder")


@contextlib.contextmanager
def hold_folder(folder: Path, options: dict[str, Any]) -> Iterator[None]:
    """Create the folder, write its options, and lock it for the life of this process.

    Raises:
        UserError: the folder cannot be created, or another demo runs in it.
    """
    busy = UserError("--output", folder, "another demo is running there", "Wait until it ends, or use another folder")
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(folder / MARK, busy))
            (folder / MARK).write_text(json.dumps(options) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                "--output", folder, f"it cannot be written ({error.strerror})", "Choose another folder"
            ) from error
        yield


def _read_options(folder: Path) -> Any:
    """Return the options of a demo; None if it was killed while it wrote them, before anything else."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8"))
    except ValueError:
        return None


def _as_text(options: Any) -> str:
    named = options.items() if isinstance(options, dict) else ()
    return ", ".join(f"{name}: {value}" for name, value in named) or "unreadable"
