"""Where a corpus or a store is made before it is there: a locked folder beside it, moved into place when complete.

.NAME.preparing/progress.json    how far it is; kept, with all else, where a restart can go on
                tokenizer/       what the corpora will carry
                ready/           the files as they will be named, moved beside the folder at the end
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.data.corpus import MASK, Corpus, describe
from megatron_slm.errors import UserError
from megatron_slm.files import sync, write_durably

logger = logging.getLogger(__name__)

READY, TOKENIZER = "ready", "tokenizer"
PARTS = (".bin", ".idx", MASK, ".tokenizer")  # .json comes last: it makes the others a corpus


@contextlib.contextmanager
def staging(output: Path, setting: str = "--output", doing: str = "preparing") -> Iterator[Path]:
    """Yield the folder to work in, locked while this process lives; it goes unless a restart can use it.

    Args:
        output: what is made beside the folder.
        setting: that named it, for messages.
        doing: the end of the folder's name.

    Raises:
        UserError: another process works on ``output``, or nothing can be written there.
    """
    if not output.name:
        raise UserError(f"{setting} {output} names no file: give one such as data/corpus")
    folder = output.with_name(f".{output.name}.{doing}")
    with writing(f"{setting} {output}"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, f"{setting} {output}")
            with _kept_if_useful(folder):
                yield folder
        finally:
            os.close(handle)


def refuse_existing(output: Path, parts: tuple[str, ...] = PARTS, description: str = ".json") -> None:
    """Refuse to make a corpus where something is.

    Raises:
        UserError: a corpus, or a file of one of its names, exists.
    """
    if description and os.path.lexists(f"{output}{description}"):
        raise UserError(f"--output {output} exists ({output}{description}): choose another, or remove it first")
    for part in (f"{output}{suffix}" for suffix in parts):
        if os.path.lexists(part):
            raise UserError(f"--output {output} would overwrite {part}: choose another, or remove it first")


def clear(folder: Path) -> Path:
    """Empty a staging folder; return its new folder of what will be published."""
    for leftover in sorted(folder.iterdir()):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    ready = folder / READY
    ready.mkdir()
    return ready


def write_description(corpus: Corpus) -> None:
    """Write PREFIX.json beside the staged parts of ``corpus``."""
    Path(f"{corpus.prefix}.json").write_text(describe(corpus) + "\n", encoding="utf-8")


def sync_all(ready: Path) -> None:
    """Flush everything that is ready."""
    for path in [*ready.rglob("*"), ready]:
        sync(path)


def publish(folder: Path, parent: Path) -> None:
    """Move what is ready into place, descriptions last; after a kill it goes on with what is left.

    Raises:
        UserError: something has appeared in its place meanwhile.
    """
    ready = sorted((folder / READY).iterdir(), key=lambda path: (path.suffix == ".json", path.name))
    for path in ready:
        if os.path.lexists(parent / path.name):
            raise UserError(f"--output would overwrite {parent / path.name}: remove it and give the command again")
    for path in ready:
        if path.suffix == ".json":
            sync(parent)  # a corpus is there when its description is
        os.replace(path, parent / path.name)
    sync(parent)


@contextlib.contextmanager
def writing(output: str) -> Iterator[None]:
    """Say of an error of the operating system that ``output`` cannot be written.

    Raises:
        UserError: instead of it.
    """
    try:
        yield
    except OSError as error:  # whoever reads has named its own errors
        raise UserError(
            f"{output} cannot be written ({error}): make room or choose another place, and give the command again"
        ) from error


@contextlib.contextmanager
def _kept_if_useful(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if (folder / JOURNAL).exists():
            if not isinstance(error, UserError):  # which has its own remedy
                logger.info("what is finished is kept in %s: the same command goes on from there", folder)
        else:
            shutil.rmtree(folder)
        raise
    (folder / JOURNAL).unlink(missing_ok=True)  # first, so that it never speaks of what is gone
    shutil.rmtree(folder, ignore_errors=True)  # NFS keeps names of files that are still mapped


def _lock(handle: int, output: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output} is being made by another process: wait for it") from None
    except OSError as error:
        logger.warning("no locks here (%s): see that nothing else makes %s", error, output)


JOURNAL = "progress.json"


@dataclass
class Progress:
    """What progress.json says. The staged files may be longer than it knows: they are cut back to it."""

    settings: dict[str, Any]  # by option: what decides the bytes of the result
    finished: list[list[Any]] = field(default_factory=list)  # of each input: its name, then its stamp
    corpora: dict[str, dict[str, Any]] = field(default_factory=dict)  # by value of --by: name and counts
    skipped: int = 0
    complete: bool = False  # everything is made, and may be partly in place already


def load_progress(folder: Path, settings: dict[str, Any]) -> Progress | None:
    """Return how far the attempt in ``folder`` is; None where there is none that is worth anything.

    Raises:
        UserError: finished inputs of an attempt with other settings are there.
    """
    path = folder / JOURNAL
    try:
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove {folder} to begin afresh") from error
    differing = [
        _difference(option, progress.settings.get(option), settings.get(option))
        for option in {**progress.settings, **settings}
        if progress.settings.get(option) != settings.get(option)
    ]
    if not differing:
        return progress
    if not progress.finished and not progress.complete:
        return None
    raise UserError(
        f"{folder} holds {len(progress.finished)} finished inputs of an attempt that was not completed: "
        f"{'; '.join(differing)}; give what was given then, or remove that folder to begin afresh"
    )


def save_progress(folder: Path, progress: Progress) -> None:
    """Replace progress.json, durably."""
    write_durably(folder / JOURNAL, json.dumps(asdict(progress)))


def refuse_changed_inputs(folder: Path, progress: Progress, inputs: list[list[Any]]) -> None:
    """Refuse to go on where an input changed after it was encoded.

    Args:
        inputs: of each input of now, its name and its stamp.
    """
    for before, now in zip(progress.finished, inputs, strict=False):
        if before != now:
            raise UserError(f"{before[0]} has changed since it was encoded: remove {folder} to begin afresh")


def _difference(option: str, before: Any, now: Any) -> str:
    """Of long lists only the entries that one of them lacks, if any does."""
    if isinstance(before, list) and isinstance(now, list):
        gone, new = ([x for x in one if x not in other] for one, other in ((before, now), (now, before)))
        if gone or new:
            before, now = gone, new
    return f"{option} was {_shown(before)} and is {_shown(now)}"


def _shown(value: Any) -> str:
    """Of long texts the end too, where paths differ."""
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:40]} ... {text[-110:]}"
