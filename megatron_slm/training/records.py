"""The records of a run, a line of JSON each with its step: metrics.jsonl and spikes.jsonl, parted where it goes on."""

import json
from pathlib import Path

from megatron_slm.errors import UserError
from megatron_slm.files import write_durably


def split_records(path: Path, step: int) -> tuple[str, str]:
    """The records up to a step, and all that follows from the first later one on, a torn last line too.

    Raises:
        UserError: the file holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        later = (not line.endswith("\n") or int(json.loads(line)["step"]) > step for line in lines)
        kept = next((number for number, is_later in enumerate(later) if is_later), len(lines))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds a line that is no record: put the file back, or move it away.") from error
    return "".join(lines[:kept]), "".join(lines[kept:])


def cut_back(path: Path, step: int) -> None:
    """Drop what a killed run wrote after the checkpoint at `step`.

    Raises:
        UserError: the file holds something else.
    """
    if path.exists():
        write_durably(path, split_records(path, step)[0])
