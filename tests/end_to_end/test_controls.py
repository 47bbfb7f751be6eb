"""What is asked of a run that is under way, and what becomes of it."""

import errno
import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.training import state as requests
from tests.end_to_end.test_bad_input import command_line_among
from tests.end_to_end.test_resume import train_half
from tests.gloo import RankError, run_ranks
from tests.runs import assert_bitwise_equal, config_tree, free_port, records, train_in_process, write_config

ASKED = {"score": "tests.end_to_end.deadly:excess_until_killed"}
CALLS_TO_STEP_5 = 2 * 4 + 1
"""The first of two micro-steps of step 5."""
SHORT = {"train_tokens": 8 * 8 * 32, "save_interval": 4}


def train_asked(world: World, tree: dict[str, Any], mark: str, number: str, rank: int) -> dict[str, Any]:
    """Train while one rank is sent a signal in step 5; the handlers are those of before afterwards."""
    os.environ |= {"DEADLY_MARK": mark, "DEADLY_CALL": str(CALLS_TO_STEP_5)}
    os.environ |= {"DEADLY_SIGNAL": number, "DEADLY_RANK": str(rank)}
    signals = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    progress = train_in_process(world, tree)
    assert [signal.signal(*pair) for pair in zip(signals, before, strict=True)] == [signal.SIG_IGN] * 3
    return progress


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def test_a_run_that_one_rank_is_told_to_stop_saves_and_goes_on_bitwise(corpora: Path, tmp_path: Path) -> None:
    whole, stopped = (config_tree(corpora, tmp_path / name, **SHORT) | {"selection": ASKED} for name in ("a", "b"))
    config, mark = str(write_config(tmp_path / "b.yaml", stopped)), str(tmp_path / "mark")
    asking = {"DEADLY_MARK": mark, "DEADLY_CALL": str(CALLS_TO_STEP_5), "DEADLY_SIGNAL": "SIGTERM", "DEADLY_RANK": "1"}
    ended = run_ranks(command_line_among, 2, asking | {"MASTER_PORT": free_port()}, "train", config)
    assert [status for status, _ in ended] == [0, 0]
    assert "stopped by a signal: step 5 of 8 is saved" in ended[0][1]
    assert checkpoints(tmp_path / "b") == [4, 5]
    assert max(record["step"] for record in records(tmp_path / "b")) == 5
    for tree in (whole, stopped):
        assert run_ranks(train_asked, 2, tree, mark, "SIGTERM", 1)[0]["step"] == 8
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 8)


def test_a_run_that_one_rank_is_told_to_save_saves_that_step_and_goes_on(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=0, **SHORT) | {"selection": ASKED}
    found = run_ranks(train_asked, 2, tree, str(tmp_path / "mark"), "SIGUSR1", 1)
    assert [progress["step"] for progress in found] == [8, 8]
    assert checkpoints(tmp_path / "run") == [4, 5, 8]


def ask_twice(_: World, echo_seconds: float) -> str:
    requests.ECHO_SECONDS = echo_seconds
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asking = requests.Requests()
    with asking.listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    return str(asking.collect())


def test_a_second_sigterm_ends_the_process_unless_it_is_an_echo_of_the_first() -> None:
    assert run_ranks(ask_twice, 1, 60.0) == ["Requested(save=False, stop=True)"]
    with pytest.raises(RankError, match="died with exit code -15"):
        run_ranks(ask_twice, 1, 0.0)


def train_on_a_full_disk(world: World, tree: dict[str, Any], when: str, full: list[int]) -> str | dict[str, Any]:
    """Train while the checkpoints of the steps in `full` meet a full disk: on one rank in the middle, or at once."""
    folder = Path(tree["run_dir"]) / "checkpoints"
    save, usage = torch.save, shutil.disk_usage

    def is_full() -> bool:
        return any((folder / f".writing-step_{step:08d}").exists() for step in full)

    def save_if_there_is_room(*args: Any, **kwargs: Any) -> None:
        if when == f"rank {world.rank}" and is_full():
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    torch.save = save_if_there_is_room
    shutil.disk_usage = lambda path: usage(path)._replace(free=1000 if when == "at once" and is_full() else 10**12)
    try:
        return train_in_process(world, tree)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("when", "backend", "stage"),
    [("rank 1", "deepspeed", 3), ("rank 0", "deepspeed", 1), ("rank 0", "plain", 0), ("at once", "deepspeed", 0)],
)
def test_a_checkpoint_that_meets_a_full_disk_does_not_end_the_run(
    corpora: Path, tmp_path: Path, when: str, backend: str, stage: int
) -> None:
    short = {"train_tokens": 7 * 8 * 32, "save_interval": 2}
    tree = config_tree(corpora, tmp_path / "run", stage=stage, backend=backend, **short)
    for progress in run_ranks(train_on_a_full_disk, 2, tree, when, [2, 4]):
        assert progress["step"] == 7 and progress["failed_saves"] == 2
    assert checkpoints(tmp_path / "run") == [6, 7]
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))
    assert [record["failed_saves"] for record in records(tmp_path / "run")] == [0, 0, 1, 1, 2, 2, 2]
    log = (tmp_path / "run" / "log-rank0000.txt").read_text()
    assert "checkpoint is due at step 2, but it cannot be written" in log
    assert ("free space is 0.0 MB" if when == "at once" else "No space left on device") in log


@pytest.mark.parametrize("when", ["rank 1", "at once"])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error_that_leaves_the_one_before(
    corpora: Path, tmp_path: Path, when: str
) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=2, train_tokens=4 * 8 * 32, save_interval=2)
    for sentence in run_ranks(train_on_a_full_disk, 2, tree, when, [4]):
        assert "checkpoint is due at step 4, but it cannot be written" in sentence and "Make room" in sentence
    assert checkpoints(tmp_path / "run") == [2]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"
    assert run_ranks(train_in_process, 2, tree)[0]["step"] == 4


def train_rolled_back(world: World, tree: dict[str, Any], step: int) -> dict[str, Any]:
    from megatron_slm.build.run import build_run
    from megatron_slm.config import parse_config

    run = build_run(parse_config(tree), world, rollback=step)
    run.trainer.fit(run.state)
    return run.state.progress()


def test_a_run_that_goes_back_and_skips_is_one_that_never_saw_those_samples(corpora: Path, tmp_path: Path) -> None:
    """12 samples more than the order's 160 are read: the last ones are of its second cycle."""
    back, straight = (config_tree(corpora, tmp_path / name, stage=0, micro_batch_size=4) for name in ("a", "b"))
    run_ranks(train_in_process, 1, back)
    first = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)
    run_ranks(train_half, 1, straight)
    for tree in (back, straight):
        tree["data"]["skip_samples"] = [[96, 104], [88, 92], [0, 8]]
    (progress,), (other,) = run_ranks(train_rolled_back, 1, back, 10), run_ranks(train_in_process, 1, straight)
    assert progress == other and progress["consumed_samples"] == 160 and progress["next_sample"] == 172
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 20)
    aside = tmp_path / "a" / "rolled-back" / "0001"
    assert (aside / "metrics.jsonl").read_text() == "".join(first[10:])
    assert (aside / "step_00000020" / "manifest.json").exists()
    del back["data"]["skip_samples"]
    back["training"]["train_tokens"] = 21 * 8 * 32
    assert run_ranks(train_in_process, 1, back)[0]["next_sample"] == 180


def test_a_run_shows_its_time_and_doubts_a_reference_that_is_the_student(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", train_tokens=4 * 8 * 32, profile_steps=[2, 3])
    tree["model"] = {"path": str(corpora / "reference")}
    run_ranks(train_in_process, 2, tree)
    for rank in range(2):
        with gzip.open(tmp_path / "run" / "profile" / f"steps-2-3-rank{rank:04d}.json.gz") as file:
            assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])
    log = (tmp_path / "run" / "log-rank0000.txt").read_text()
    assert "profile of steps 2 to 3" in log and "Self CPU %" in log
    assert "reference check: held_out: loss of the reference" in log
    assert "The reference is no better than the student on any evaluation set" in log


class Losses:
    def __init__(self, **losses: float) -> None:
        self.losses = lambda: losses


def test_a_reference_that_is_better_somewhere_is_not_doubted(caplog: pytest.LogCaptureFixture) -> None:
    from megatron_slm.training.reference_check import ReferenceCheck
    from megatron_slm.training.state import Plan, RunState

    student, state = Losses(math=3.0, web=2.0), RunState(Plan(10, 4, 32, 1, 1, 1))
    for reference, doubts in ((Losses(math=2.5, web=4.0), 0), (Losses(math=3.0, web=4.0), 1)):
        caplog.clear()
        ReferenceCheck(student, reference, "models/reference").on_train_start(state)
        assert sum("models/reference (reference.path)" in record.message for record in caplog.records) == doubts
