"""Records of a run: the lines of its `metrics.jsonl`."""

import json
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def read_records(metrics: Path) -> Records:
    """Return all records of a run, in order."""
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def last_record(metrics: Path) -> dict[str, Any] | None:
    """Return the newest complete record of a run that may be writing, or None if there is none yet."""
    if not metrics.exists():
        return None
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    complete: Records = [json.loads(line) for line in lines[-2:] if line.endswith("\n")]
    return complete[-1] if complete else None


def complete_records(path: Path) -> Records:
    """Return all complete records of a file that a run may be writing; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
