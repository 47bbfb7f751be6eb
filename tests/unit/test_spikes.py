"""The detection of loss spikes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_slm.training.checkpoints import cut_back
from megatron_slm.training.metrics import WARM_UP, WINDOW, LossAverage, Spikes
from megatron_slm.training.state import Plan, RunState

NOISE = np.random.default_rng(0).normal(0, 0.1, 400)


def run(losses: list[float], path: Path | None, state: RunState, sigma: float = 6.0) -> list[int]:
    """Return the number of spikes after each step; the state continues from its last step."""
    spikes, counts = Spikes(path, sigma), []
    if path is not None:
        cut_back(path, state.step)  # as every start of a run does
    spikes.on_train_start(state)
    for loss in losses:
        state.advance(state.next_sample + 8, selected_tokens=1, applied=True)
        state.record = {}
        spikes.on_step_end(state, SimpleNamespace(loss=loss))
        counts.append(state.record["loss/spikes"])
    return counts  # type: ignore[return-value]


def fresh() -> RunState:
    return RunState(Plan(1000, 8, 32, 1, 1, 1))


def test_a_jump_is_told_with_its_samples_and_a_falling_loss_is_not(tmp_path: Path) -> None:
    losses = (2 * np.exp(-np.arange(200) / 60) + 2 + NOISE[:200]).tolist()
    losses[150] += 5
    counts = run(losses, tmp_path / "spikes.jsonl", fresh())
    assert counts == [0] * 150 + [1] * 50
    (line,) = (tmp_path / "spikes.jsonl").read_text().splitlines()
    spike = json.loads(line)
    assert spike["step"] == 151 and spike["samples"] == [1200, 1208] and spike["loss"] == losses[150]
    assert spike["sigma"] > 6 and abs(spike["expected"] - losses[149]) < 1


def test_one_spike_does_not_hide_the_next_and_a_lasting_level_is_accepted() -> None:
    losses = (2 + NOISE).tolist()
    losses[100], losses[102] = 50.0, 5.0
    assert run(losses[:110], None, fresh())[-1] == 2
    higher = losses[:90] + [loss + 3 for loss in losses[110:400]]
    counts = run(higher, None, fresh())
    assert counts[90] == 1 and counts[-1] == counts[-150] < 40


def test_nothing_is_a_spike_while_the_average_warms_up() -> None:
    losses = (2 + NOISE[:WARM_UP]).tolist()
    assert run([*losses, 50.0], None, fresh())[-1] == 1
    losses[WARM_UP - 1] = 50.0
    assert run(losses, None, fresh())[-1] == 0


def test_a_loss_that_is_not_defined_is_passed_over() -> None:
    state = fresh()
    run([2.0, math.nan, 2.0], None, state)
    assert state.carried["spikes"]["steps"] == 2 and state.carried["spikes"]["mean"] == 2.0


def test_a_resumed_run_decides_as_one_that_went_through(tmp_path: Path) -> None:
    losses = (2 + NOISE[:200]).tolist()
    losses[120] = losses[160] = 9.0
    whole = run(losses, tmp_path / "a.jsonl", fresh())
    state = fresh()
    run(losses[:100], None, state)
    progress = json.loads(json.dumps(state.progress()))
    run(losses[100:150], tmp_path / "b.jsonl", state)
    state = fresh()
    state.restore(progress)
    assert run(losses[100:], tmp_path / "b.jsonl", state) == whole[100:]
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert whole[-1] == 2


def test_the_averages_are_plain_until_there_is_a_window_of_them() -> None:
    average = LossAverage()
    for value in NOISE[:WINDOW]:
        average.add(value)
    assert average.mean == pytest.approx(NOISE[:WINDOW].mean())
    assert average.variance == pytest.approx(NOISE[:WINDOW].var())
