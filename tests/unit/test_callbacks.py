"""The moments of a run: all callbacks fill a record before any reads it, and a checkpoint comes last."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.data.loader import StepLoader
from megatron_slm.training import trainer
from megatron_slm.training.callbacks import Console, JsonLines
from megatron_slm.training.cost import ModelFlops, TokenFlops
from megatron_slm.training.evaluation import Evaluation
from megatron_slm.training.metrics import Accounting, Spikes, StepMetrics, Throughput
from megatron_slm.training.state import Plan, Requests, RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.tensorboard import ExcessHistogram, TensorBoard, open_event_files
from megatron_slm.training.trainer import Callback, Trainer
from tests.steps import result_of_step

STEPS = 6
MODELS = ModelFlops(TokenFlops(1e6, 1e5), 5e5)


class Loader(StepLoader):
    """Reads nothing."""

    def __init__(self) -> None: ...

    def load(self, position: int) -> list[Any]:
        return []

    def end(self, position: int, steps: int = 1) -> int:
        return position + steps


class FixedEvaluator:
    """Returns another loss each time."""

    def __init__(self) -> None:
        self._losses = itertools.count()

    def evaluate(self) -> dict[str, float]:
        return {"eval/math/loss": float(next(self._losses))}


class Own(Callback):
    """Adds to the record, as a user's callback does, and keeps the records that it reads."""

    def __init__(self) -> None:
        self.read: list[dict[str, Any]] = []

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.record is not None:
            state.record["own/selected"] = result.selected_tokens

    def on_record(self, state: RunState, record: dict[str, Any]) -> None:
        self.read.append(dict(record))


class Ticks:
    """A clock that advances by one second each time it is read."""

    def __init__(self) -> None:
        self._seconds = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self._seconds))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(folder: Path, order: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, Any], list[int]]:
    """Train with all callbacks in an order; return the records, what is carried, and the records before each save."""
    folder.mkdir()
    writer = open_event_files(folder / "tensorboard", 0)
    own = Own()
    callbacks: list[Callback] = [
        StepMetrics(["web", "books"], True, (0.1, 0.5)),
        Spikes(folder / "spikes.jsonl", 1.0),
        Accounting(MODELS),
        Throughput(MODELS, 1e12),
        Evaluation(FixedEvaluator()),  # type: ignore[arg-type]
        ExcessHistogram(2, writer),
        own,
        JsonLines(folder / "metrics.jsonl"),
        Console(),
        TensorBoard(writer, "a: 1", ["math"]),
    ]
    before_save: list[int] = []

    def save(state: RunState) -> None:
        before_save.append(len(lines(folder / "metrics.jsonl")))

    state = RunState(Plan(STEPS, 2, 8, log_interval=1, eval_interval=3, save_interval=2))
    loop = Trainer(
        Loader(),
        lambda batches, objective, rate, step, collect: result_of_step(step),  # type: ignore[arg-type]
        learning_rate=lambda tokens: 1e-3,
        objective=lambda tokens: None,  # type: ignore[arg-type,return-value]
        callbacks=[callbacks[index] for index in order],
        save=save,
        max_skipped_updates=1,
        requests=Requests(),
    )
    loop.fit(state)
    assert lines(folder / "metrics.jsonl") == own.read and len(own.read) == STEPS
    return own.read, state.carried, before_save


def test_the_order_of_callbacks_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_order = list(range(10))
    orders = [in_order, in_order[::-1], *(random.Random(seed).sample(in_order, 10) for seed in range(8))]
    found = []
    for number, order in enumerate(orders):
        monkeypatch.setattr(trainer, "time", Ticks())
        found.append(train(tmp_path / str(number), order))
    records, carried, before_save = found[0]
    assert all(other == found[0] for other in found)
    assert before_save == [2, 4, 6]
    assert {"loss/all", "loss/spikes", "flops", "mfu", "own/selected", "excess/q50"} <= records[0].keys()
    assert [record.get("eval/math/loss") for record in records] == [None, None, 0.0, None, None, 1.0]
    assert records[0]["step_seconds"] == 1.0 and carried["spikes"]["steps"] == STEPS
