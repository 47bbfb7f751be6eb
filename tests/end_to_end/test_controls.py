"""What is asked of a run that is under way, and what becomes of it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.dist import World
from megatron_slm.training import requests
from tests.gloo import RankError, run_ranks
from tests.runs import assert_bitwise_equal, config_tree, megatron_slm, records, train_in_process, write_config

ASKED = {"score": "tests.end_to_end.deadly:excess_until_killed"}
CALLS_TO_STEP_13 = 2 * 12 + 1
"""The first of two micro-steps of step 13."""


def train_asked(world: World, tree: dict[str, Any], mark: str, number: str, rank: int) -> dict[str, Any]:
    """Train while one rank is sent a signal in step 13; the handlers are those of before afterwards."""
    os.environ |= {"DEADLY_MARK": mark, "DEADLY_CALL": str(CALLS_TO_STEP_13)}
    os.environ |= {"DEADLY_SIGNAL": number, "DEADLY_RANK": str(rank)}
    signals = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    progress = train_in_process(world, tree)
    assert [signal.signal(*pair) for pair in zip(signals, before, strict=True)] == [signal.SIG_IGN] * 3
    return progress


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def test_a_run_that_one_rank_is_told_to_stop_saves_and_goes_on_bitwise(corpora: Path, tmp_path: Path) -> None:
    whole, stopped = (config_tree(corpora, tmp_path / name) | {"selection": ASKED} for name in ("a", "b"))
    config, mark = str(write_config(tmp_path / "b.yaml", stopped)), str(tmp_path / "mark")
    asking = {"DEADLY_MARK": mark, "DEADLY_CALL": str(CALLS_TO_STEP_13), "DEADLY_SIGNAL": "SIGTERM", "DEADLY_RANK": "1"}
    ended = megatron_slm("train", config, ranks=2, **asking)
    assert ended.returncode == 0, ended.stderr
    assert "stopped by a signal: step 13 of 20 is saved" in ended.stderr
    assert checkpoints(tmp_path / "b") == [10, 13]
    assert max(record["step"] for record in records(tmp_path / "b")) == 13
    for tree in (whole, stopped):
        assert run_ranks(train_asked, 2, tree, mark, "SIGTERM", 1)[0]["step"] == 20
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 20)


def test_a_run_that_one_rank_is_told_to_save_saves_that_step_and_goes_on(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=0) | {"selection": ASKED}
    found = run_ranks(train_asked, 2, tree, str(tmp_path / "mark"), "SIGUSR1", 1)
    assert [progress["step"] for progress in found] == [20, 20]
    assert checkpoints(tmp_path / "run") == [10, 13, 20]


def ask_twice(_: World, echo_seconds: float) -> str:
    requests.ECHO_SECONDS = echo_seconds
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asking = requests.Requests()
    with asking.listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    return str(asking.take())


def test_a_second_sigterm_ends_the_process_unless_it_is_an_echo_of_the_first() -> None:
    assert run_ranks(ask_twice, 1, 60.0) == ["Asked(save=False, stop=True)"]
    with pytest.raises(RankError, match="died with exit code -15"):
        run_ranks(ask_twice, 1, 0.0)
