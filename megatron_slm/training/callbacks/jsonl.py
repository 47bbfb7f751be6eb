"""metrics.jsonl: one record a logged step, for any script to read."""

import json
from pathlib import Path
from typing import IO

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


class JsonLines(Callback):
    """Appends on rank 0; a record has left this process before the next step begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def on_train_start(self, state: RunState) -> None:
        self._file = self._path.open("a", encoding="utf-8")

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.record is not None and self._file is not None:
            self._file.write(json.dumps(finite(state.record)) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def finite(record: dict[str, float | int | None]) -> dict[str, float | int | None]:
    """JSON knows no NaN and no infinity: null."""
    return {key: value if value is None or abs(value) < float("inf") else None for key, value in record.items()}
