"""Errors that the user can correct, as data: the setting, its value, the reason and the remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """An error that the user can correct.

    Commands print it as one sentence, without a traceback, and exit with status 2. Any other exception is a defect
    of this package and keeps its traceback. It is a ValueError, so that pydantic reports the errors that settings
    classes raise; config.py adds the name of the group.

    Attributes:
        setting: the setting, option, environment variable or argument, such as `data.seq_length` or `--output`.
        value: its value; None if it is not set.
        reason: why the value does not work, as it follows "but": "the model supports at most 2048 positions".
        remedy: what to do, as a sentence without its period: "Use 2048 or less".
        others: further errors that were found at the same time.
    """

    def __init__(self, setting: str, value: object, reason: str, remedy: str, *others: "UserError") -> None:
        # A rank sends its error to the others, which build it again from these arguments.
        super().__init__(setting, value, reason, remedy, *others)
        self.setting = setting
        self.value = value
        self.reason = reason
        self.remedy = remedy
        self.others = others

    def __str__(self) -> str:
        return "\n".join(self.sentences())

    def sentences(self) -> list[str]:
        """Return one sentence per error, this one first."""
        return [self._sentence(), *(sentence for other in self.others for sentence in other.sentences())]

    def _sentence(self) -> str:
        state = "is not set" if self.value is None else f"is {_shown(self.value)}"
        return f"{self.setting} {state}, but {self.reason}. {self.remedy}{'' if self.remedy.endswith('?') else '.'}"


class LostRanksError(RuntimeError):
    """The end of this rank because others are lost, or did not come to a collective operation.

    Nothing is wrong with the configuration, and the run resumes from its last checkpoint when it is started again. So
    the exit status differs from that of a user error.

    Args:
        found: the ranks, their hosts and phases, as a sentence without its period.
    """

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found

    def __str__(self) -> str:
        return (
            f"a collective operation failed: {self.found}. The run resumes from its last checkpoint when its launcher "
            "restarts it, or when you start it again."
        )


class AgreedError(UserError):
    """A user error that every rank raises; only rank 0 prints it."""


@dataclass
class Mistakes:
    """The user errors of several checks, collected so that all of them are reported at once."""

    errors: list[UserError] = field(default_factory=list)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep a UserError that the block raises, and continue after the block."""
        try:
            yield
        except UserError as error:
            if error.args not in [other.args for other in self.errors]:
                self.errors.append(error)

    def raise_any(self) -> None:
        """Raise the errors that were kept, if any, as one UserError."""
        if self.errors:
            first, *others = self.errors
            raise UserError(*first.args, *others)


def agreed(work: Callable[[], T]) -> T:
    """Return the result of work that every rank does on the same files, so that its user errors are the same.

    Raises:
        AgreedError: in place of a UserError.
    """
    try:
        return work()
    except UserError as error:
        raise AgreedError(*error.args) from error


def refuse_missing_folder(setting: str, path: str) -> None:
    """Raise a UserError if a path can only be local and does not exist.

    A request to the hub for such a path can take a minute to fail. `a/b` may be a name on the hub; it is a local path
    if the folder `a` exists.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if "/" in path and not Path(path).exists() and (looks_local or Path(path).parent.is_dir()):
        raise UserError(setting, path, "the path does not exist", "Check the path")


def first_line(error: BaseException) -> str:
    """Return the first line of the message of a library's error."""
    return str(error).strip().partition("\n")[0]


def _shown(value: Any) -> str:
    """Return a value as a sentence shows it: text without quotes, unless its ends could not be seen."""
    if isinstance(value, str):
        return value if value and value == value.strip() else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
