"""What a user can mend."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A sentence for the person who runs the command: the setting, its value, and the remedy.

    Commands print it without a traceback and end with exit status 2. Anything else that
    is raised is a defect of this package and keeps its traceback.
    """


class AgreedError(UserError):
    """A user's error that every rank raises: rank 0 alone says it."""


def agreed(work: Callable[[], T]) -> T:
    """Do what every rank does on the same files, so that every rank finds the same error.

    Raises:
        AgreedError: instead of a user's error.
    """
    try:
        return work()
    except UserError as error:
        raise AgreedError(str(error)) from error


def refuse_missing_folder(setting: str, path: str) -> None:
    """Say at once that a folder is not there, instead of asking the hub for it: that can take a minute to fail.

    `a/b` may be a name on the hub; it is a path where the folder `a` is here.

    Raises:
        UserError: the path can only be local, and nothing is there.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if "/" in path and not Path(path).exists() and (looks_local or Path(path).parent.is_dir()):
        raise UserError(f"{setting} is '{path}', and nothing is there: check the path.")
