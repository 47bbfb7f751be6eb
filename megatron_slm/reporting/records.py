"""Records of a run: the lines of its `metrics.jsonl`."""

import json
import os
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


class RecordFile:
    """The complete records of a run that may be writing. Each call reads only what is new.

    Args:
        path: the run's `metrics.jsonl`, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: Records = []
        self._end = 0
        self._inode = 0

    def read(self) -> Records:
        """Return all records so far, in order."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            # A resumed run replaces the file by one that ends at its checkpoint.
            if status.st_ino != self._inode or status.st_size < self._end:
                self._records, self._end, self._inode = [], 0, status.st_ino
            file.seek(self._end)
            # The last line may be incomplete; it is read again when it is whole.
            complete = file.read().rpartition(b"\n")[0]
            lines = complete.splitlines()
        self._records += [json.loads(line) for line in lines if line.strip()]
        self._end += len(complete) + bool(lines)
        return self._records


def read_records(metrics: Path) -> Records:
    """Return all complete records of a run, in order."""
    return RecordFile(metrics).read()


def last_record(metrics: Path) -> dict[str, Any] | None:
    """Return the newest complete record of a run that may be writing, or None if there is none yet."""
    records = read_records(metrics)
    return records[-1] if records else None
