"""How far an attempt at preparing is: read again after a kill, so that finished inputs are not encoded twice."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.files import write_durably

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
