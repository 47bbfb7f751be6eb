"""Unfinished output: a locked staging folder beside the output, with a journal of the work that is done.

.NAME.DOING/progress.json    the journal; after a failure, a folder without one is removed
            ready/           the files to publish: each entry beside the output, or the whole folder as the output
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.io.files import hold, publish, write_durably

logger = logging.getLogger(__name__)

JOURNAL = "progress.json"


class Staging:
    """The staging folder of one output. Nothing is written before `open`.

    Args:
        output: the file, folder or prefix to make.
        setting: the setting or option that names the output, for errors.
        doing: the end of the folder's name, such as "preparing".

    Attributes:
        folder: the staging folder, beside the output.
        ready: the folder of the files to publish.
        journal: the path of the journal.
    """

    def __init__(self, output: Path, setting: str, doing: str) -> None:
        self.output = output
        self.setting = setting
        self.folder = output.with_name(f".{output.name}.{doing}") if output.name else output
        self.ready = self.folder / "ready"
        self.journal = self.folder / JOURNAL

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Create and lock the folder. Remove it at the end, unless the block fails and a restart can resume from it.

        Raises:
            UserError: another process makes the same output, or it cannot be written.
        """
        if not self.output.name:
            raise UserError(self.setting, self.output, "it does not end in a name", "Append one")
        busy = UserError(self.setting, self.output, "another process is writing it", "Wait until that process ends")
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with hold(self.folder, busy), self._removed_if_useless():
                yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError into an error that names the output.

        Raises:
            UserError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:  # from a write: readers raise a UserError instead
            reason = f"it cannot be written ({error})"
            remedy = "Free disk space or choose another path, then run the command again"
            raise UserError(self.setting, self.output, reason, remedy) from error

    def clear(self) -> None:
        """Empty the folder, and create `ready`."""
        for leftover in sorted(self.folder.iterdir()):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        self.ready.mkdir()

    def publish_beside(self, last: str) -> None:
        """Move every entry of `ready` to its place beside the output; after a kill, a new call moves the rest.

        Args:
            last: suffix of the entries to move last, because their presence means that all others are in place.

        Raises:
            UserError: the place of an entry is taken; nothing is moved.
        """
        entries = sorted(self.ready.iterdir(), key=lambda path: (path.suffix == last, path.name))
        for entry in entries:
            if os.path.lexists(self.output.with_name(entry.name)):
                reason = f"{self.output.with_name(entry.name)} already exists"
                raise UserError(self.setting, self.output, reason, "Remove it and run the command again")
        for entry in entries:
            publish(entry, self.output.with_name(entry.name), flush=False)

    @contextlib.contextmanager
    def _removed_if_useless(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not self.journal.exists():
                shutil.rmtree(self.folder)
            elif not isinstance(error, UserError):  # a UserError has its own remedy
                logger.info("Finished work is kept in %s. The same command resumes from there.", self.folder)
            raise
        self.journal.unlink(missing_ok=True)  # first: a journal must never describe files that are gone
        shutil.rmtree(self.folder, ignore_errors=True)  # NFS keeps the names of files that are still mapped


class Journal:
    """The journal of unfinished work: the settings that decide its result, and its progress.

    Args:
        staging: the open staging folder.
        settings: the JSON values that decide the bytes of the result, by setting or option.
    """

    def __init__(self, staging: Staging, settings: Mapping[str, Any]) -> None:
        self._staging = staging
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists, as in `read`

    def read(self) -> dict[str, Any] | None:
        """Return the progress that was last written; None if there is none.

        Progress with other settings counts as none if nothing is finished, that is, if all its values are empty.

        Raises:
            UserError: the journal cannot be read, or records finished work with other settings.
        """
        staging = self._staging
        try:
            progress = json.loads(staging.journal.read_text(encoding="utf-8"))
            # Older journals of megatron-slm score have the key `identity`.
            settings = progress.pop("settings" if "settings" in progress else "identity")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, AttributeError) as error:
            raise self.unusable(f"the journal {staging.journal} cannot be read ({error})") from error
        found = differences(settings, self._settings)
        if found and any(progress.values()):
            raise UserError(
                staging.setting,
                staging.output,
                f"{staging.folder} holds unfinished work with other settings: {'; '.join(found)}",
                f"Set them back to resume it, or remove {staging.folder} to start again",
            )
        return None if found else progress

    def write(self, progress: Mapping[str, Any]) -> None:
        """Replace the journal durably."""
        write_durably(self._staging.journal, json.dumps({"settings": self._settings, **progress}))

    def remove(self) -> None:
        """Remove the journal, so that a restart begins again."""
        self._staging.journal.unlink(missing_ok=True)

    def unusable(self, reason: str) -> UserError:
        """Return the error for unfinished work that cannot be resumed."""
        staging = self._staging
        return UserError(staging.setting, staging.output, reason, f"Remove {staging.folder} to start again")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each setting whose JSON value differs; a setting that is absent counts as null."""
    return [
        _difference(name, before.get(name), now.get(name))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe how a setting differs; of two lists, show only the entries that the other lacks, if there are any."""
    if isinstance(before, list) and isinstance(now, list):
        gone, new = _without(before, now), _without(now, before)
        if gone or new:
            before, now = gone, new
    return f"{name} was {_shortened(before)} and is {_shortened(now)}"


def _without(entries: list[Any], others: list[Any]) -> list[Any]:
    """Return the entries that are not among the others; compared as text, because there may be many."""
    known = {json.dumps(other) for other in others}
    return [entry for entry in entries if json.dumps(entry) not in known]


def _shortened(value: Any) -> str:
    """Return a value as JSON; of long text, only the beginning and the end, where paths differ."""
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:40]} ... {text[-110:]}"
