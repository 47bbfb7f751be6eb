"""metrics.jsonl: one record a logged step, for any script to read."""

import json
from pathlib import Path
from typing import IO

from megatron_slm.errors import UserError
from megatron_slm.files import write_durably
from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


class JsonLines(Callback):
    """Appends on rank 0; a record has left this process before the next step begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def on_train_start(self, state: RunState) -> None:
        cut_back(self._path, state.step)
        self._file = self._path.open("a", encoding="utf-8")

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.record is not None and self._file is not None:
            self._file.write(json.dumps(finite(state.record)) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def cut_back(path: Path, step: int) -> None:
    """Drop what a killed run wrote after the checkpoint at `step`, a torn last line too.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or _step(line, path) > step:
            break
        kept.append(line)
    write_durably(path, "".join(kept))


def _step(line: str, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds a line that is no record: put the file back, or move it away.") from error


def finite(record: dict[str, float | int | None]) -> dict[str, float | int | None]:
    """JSON knows no NaN and no infinity: null."""
    return {key: value if value is None or abs(value) < float("inf") else None for key, value in record.items()}
