"""Whether this machine and the named folder will do, asked before anything is written."""

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
    """Refuse what would fail after minutes.

    Raises:
        UserError: Python, memory or disk do not suffice.
    """
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    check_python(sys.version_info[:2])
    check_space(psutil.virtual_memory().available / 2**30, shutil.disk_usage(there).free / 2**30, there)


def check_python(version: tuple[int, ...]) -> None:
    """Raises:
    UserError: it is none that this package's libraries support.
    """
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        low, high, found = (".".join(map(str, one)) for one in (*PYTHONS, version))
        raise UserError(f"This is Python {found}: install Python {low} to {high} and run the demo with it.")


def check_space(memory: float, disk: float, folder: Path) -> None:
    """Args:
        memory: available, in GiB.
        disk: free at `folder`, in GiB.

    Raises:
        UserError: either is too small.
    """
    if memory < MEMORY_GIB:
        raise UserError(
            f"{memory:.1f} GiB of memory are available and the demo needs {MEMORY_GIB:g}: close other programs first."
        )
    if disk < DISK_GIB:
        raise UserError(
            f"--output is on a disk with {disk:.1f} GiB free ({folder}) and the demo needs {DISK_GIB:g}: "
            "free some, or name a folder on another disk."
        )


def check_ranks(ranks: int, samples: int) -> None:
    """Raises:
    UserError: the samples of a step cannot be dealt to so many ranks evenly.
    """
    if ranks < 1 or samples % ranks:
        possible = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
        raise UserError(f"--ranks is {ranks}, and a step has {samples} samples: use one of {possible}.")


def check_folder(folder: Path, options: dict[str, Any]) -> None:
    """A new or empty folder, or one where a demo of the same options stands.

    Raises:
        UserError: it holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output is {folder}, which is a file: name a folder, or a path where nothing is.")
    if (folder / MARK).exists():
        if (found := _read_options(folder)) not in (None, options):
            raise UserError(
                f"--output is {folder}, a demo of other options ({_shown(found)}): name another folder, or remove it."
            )
    elif any(folder.iterdir()):
        raise UserError(f"--output is {folder}, which holds something else than a demo: name another folder.")


@contextlib.contextmanager
def hold_folder(folder: Path, options: dict[str, Any]) -> Iterator[None]:
    """Make the folder, say in it what it is, and keep others out while this process lives.

    Raises:
        UserError: it cannot be made, or another demo runs in it.
    """
    busy = UserError("--output", folder, "another demo is running there", "Wait until it has ended, or choose another")
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
    """None where a start was killed while it wrote them: nothing was made yet."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8"))
    except ValueError:
        return None


def _shown(options: Any) -> str:
    named = options.items() if isinstance(options, dict) else ()
    return ", ".join(f"{name}: {value}" for name, value in named) or "not readable"
