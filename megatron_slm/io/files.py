"""Files and folders that appear whole or not at all, locks, and checks of paths before anything is written.

Everything that must survive a kill is written in the same way: under another name in the same folder, flushed, then
renamed by `publish`. The rename itself is durable once the folder is flushed.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_slm.errors import UserError

logger = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk."""
    for inner in path.rglob("*") if path.is_dir() else ():
        sync(inner)
    sync(path)


def publish(staged: Path, target: Path, *, replace: bool = False, flush: bool = True) -> None:
    """Give a finished file or folder its final name, durably.

    A file is replaced atomically. A folder that is replaced is missing for an instant, because no portable system call
    exchanges two folders.

    Args:
        staged: the finished file or folder, on the same file system as `target`.
        target: its final name.
        replace: replace what exists at `target`.
        flush: flush `staged` first; False if the caller has done so.

    Raises:
        OSError: the rename failed, or something exists at `target` and may not be replaced.
    """
    if flush:
        sync_tree(staged)
    if replace and target.is_dir():
        shutil.rmtree(target)
    elif not replace and os.path.lexists(target):
        raise FileExistsError(f"{target} already exists")
    os.replace(staged, target)
    sync(target.parent)


def write_durably(path: Path, text: str) -> None:
    """Write a text file and flush it; an existing file is replaced atomically.

    Raises:
        OSError: the file cannot be written; an existing one is unchanged.
    """
    staged = path.with_name(path.name + ".new")
    staged.write_text(text, encoding="utf-8")
    publish(staged, path, replace=True)


@contextmanager
def whole_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder to write to, which becomes `folder` when the block ends.

    If the block raises an error, `folder` does not change. After a kill, it is complete, unchanged, or, if it was to be
    replaced, missing.

    Args:
        folder: the folder to make.
        replace: replace an existing folder.

    Raises:
        OSError: the folder cannot be written, or exists and may not be replaced.
    """
    staged = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(staged, ignore_errors=True)  # left by a process that was killed
    staged.mkdir(parents=True)
    try:
        yield staged
        publish(staged, folder, replace=replace)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


@contextmanager
def hold(path: Path, busy: UserError | None = None) -> Iterator[None]:
    """Hold an exclusive lock, which is released at the end of the block or of this process.

    On a file system without locks, log a warning and hold none.

    Args:
        path: an existing folder, or a file, which is created if it does not exist.
        busy: the error to raise if another process holds the lock; None to wait for it.

    Raises:
        UserError: `busy`.
        OSError: the file cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if busy is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            assert busy is not None
            raise busy from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s). Make sure that no other process uses it.", path, error)
        yield
    finally:
        os.close(handle)


def dangling_link(path: Path) -> str | None:
    """Return the target of a symbolic link if the target does not exist; None for any other path."""
    return os.readlink(path) if path.is_symlink() and not path.exists() else None


def refuse_taken(setting: str, path: Path) -> None:
    """Raise a UserError if a path that a command is to create is a file, a folder or a dangling link.

    Raises:
        UserError: the path is taken.
    """
    if target := dangling_link(path):
        raise UserError(setting, path, f"it is a link to {target}, which does not exist", "Remove the link")
    if path.exists():
        raise UserError(setting, path, "it already exists", "Remove it, or choose a path that does not exist")
