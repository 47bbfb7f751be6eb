"""Resumed runs, which equal uninterrupted ones."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.dist import World
from tests.end_to_end.test_bad_input import command_line
from tests.gloo import RankError, run_ranks
from tests.runs import (
    LLAMA,
    TORCHRUN,
    assert_bitwise_equal,
    config_tree,
    in_a_process,
    megatron_slm,
    records,
    train_in_process,
    write_config,
)

DEADLY = {"score": "tests.end_to_end.deadly:excess_until_killed"}
CALLS_TO_STEP_5 = 2 * 4 + 1
"""The first of two micro-steps of step 5: killed inside an accumulation, one step after the checkpoint of step 3."""
SHORT = {"train_tokens": 6 * 8 * 32, "save_interval": 3}


def train_deadly(world: World, tree: dict[str, Any], mark: str) -> dict[str, Any]:
    os.environ |= {"DEADLY_MARK": mark, "DEADLY_CALL": str(CALLS_TO_STEP_5)}
    return train_in_process(world, tree)


def test_a_killed_run_resumes_bitwise_under_torchrun(corpora: Path, tmp_path: Path) -> None:
    whole, killed = (config_tree(corpora, tmp_path / name, **SHORT) | {"selection": DEADLY} for name in ("a", "b"))
    mark = str(tmp_path / "mark")
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(train_deadly, 2, killed, mark)
    assert max(record["step"] for record in records(tmp_path / "b")) == 4
    ended = megatron_slm("train", str(write_config(tmp_path / "b.yaml", killed)), ranks=2, DEADLY_MARK=mark)
    assert ended.returncode == 0, ended.stderr
    assert [record["step"] for record in records(tmp_path / "b")] == list(range(1, 7))
    run_ranks(train_deadly, 2, whole, mark)
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 6)


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_of_a_killed_run_and_they_resume_bitwise(corpora: Path, tmp_path: Path) -> None:
    whole, killed = (config_tree(corpora, tmp_path / name, **SHORT) | {"selection": DEADLY} for name in ("a", "b"))
    mark = str(tmp_path / "mark")
    environment = {"DEADLY_MARK": mark, "DEADLY_CALL": str(CALLS_TO_STEP_5), "DEADLY_RANK": "1"}
    command = [*TORCHRUN, "2", "--max-restarts", "1", "-m", "megatron_slm", "train"]
    ended = in_a_process([*command, str(write_config(tmp_path / "b.yaml", killed))], **environment)
    assert ended.returncode == 0, ended.stderr
    assert len(json.loads((tmp_path / "b" / "environment.json").read_text())["starts"]) == 2
    run_ranks(train_deadly, 2, whole, mark)
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 6)


def test_a_killed_run_of_one_process_resumes_bitwise_without_a_launcher(corpora: Path, tmp_path: Path) -> None:
    alone = SHORT | {"micro_batch_size": 4}
    whole, killed = (config_tree(corpora, tmp_path / name, stage=0, **alone) | {"selection": DEADLY} for name in "ab")
    mark = str(tmp_path / "mark")
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(train_deadly, 1, killed, mark)
    assert max(record["step"] for record in records(tmp_path / "b")) == 4
    ended = megatron_slm("train", str(write_config(tmp_path / "b.yaml", killed)), DEADLY_MARK=mark)
    assert ended.returncode == 0, ended.stderr
    run_ranks(train_deadly, 1, whole, mark)
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 6)


@pytest.mark.parametrize(("stage", "backward"), [(1, "exact"), (2, "exact"), (3, "rows"), (3, "replay")])
def test_a_killed_run_resumes_bitwise_at_the_other_stages_and_with_each_backward(
    corpora: Path, tmp_path: Path, stage: int, backward: str
) -> None:
    selection = DEADLY | {"backward": backward}
    whole, killed = (
        config_tree(corpora, tmp_path / name, stage, **SHORT) | {"selection": selection, "model": {"config": LLAMA}}
        for name in ("a", "b")
    )
    mark = str(tmp_path / "mark")
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(train_deadly, 2, killed, mark)
    run_ranks(train_deadly, 2, killed, mark)
    run_ranks(train_deadly, 2, whole, mark)
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 6)


TURNS = {"start": 0.2, "schedule": "linear", "schedule_tokens": 12 * 256, "ratio": 0.3} | DEADLY
AGREE = {
    "start": 0.2,
    "combine": "intersection",
    "of": [{"score": DEADLY["score"], "ratio": 0.7}, {"score": "student_loss", "ratio": 0.5}],
}


def train_deadly_after_the_start(world: World, tree: dict[str, Any], mark: str) -> dict[str, Any]:
    """Train, and die in step 13. The first fifth of the steps computes no score."""
    os.environ |= {"DEADLY_MARK": mark, "DEADLY_CALL": str(2 * (12 - 4) + 1)}
    return train_in_process(world, tree)


@pytest.mark.parametrize("selection", [TURNS, AGREE], ids=["a schedule", "an intersection"])
def test_a_run_killed_while_its_selection_rule_changes_resumes_bitwise(
    corpora: Path, tmp_path: Path, selection: dict[str, Any]
) -> None:
    whole, killed = (config_tree(corpora, tmp_path / name, stage=0) | {"selection": selection} for name in ("a", "b"))
    mark = str(tmp_path / "mark")
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(train_deadly_after_the_start, 2, killed, mark)
    run_ranks(train_deadly_after_the_start, 2, killed, mark)
    run_ranks(train_deadly_after_the_start, 2, whole, mark)
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b", 20)
    shown = records(tmp_path / "b")
    for record in shown[:4]:
        assert record["selection/ratio"] == 1 and record["loss/selected"] == record["loss/all"]
        undefined = ("loss/reference", "loss/unselected", "selection/threshold", "excess/q50")
        assert [record[name] for name in undefined] == [None] * 4
    kept = [round(256 * record["selection/ratio"]) for record in shown]
    assert [record["consumed_selected_tokens"] for record in shown] == list(itertools.accumulate(kept))
    assert all(record["loss/reference"] > 0 for record in shown[4:])
    if selection is TURNS:
        assert kept[4:] == sorted(kept[4:], reverse=True) and kept[4] == 256 and kept[-1] == 2 * 38
    else:
        # 102 would be planned of the two pools of 128.
        assert all(
            0 < count <= 128 and record["selection/threshold"] is None
            for count, record in zip(kept[4:], shown[4:], strict=True)
        )


def train_killed_while_saving(world: World, tree: dict[str, Any], moment: str) -> None:
    """Train, and die on one rank at one of the moments of writing the second checkpoint."""
    from megatron_slm.training import checkpoints

    owner, name, rank = {
        "before this rank's optimizer state": (torch, "save", 0),
        "before the other rank's optimizer state": (torch, "save", 1),
        "before the sums": (os, "fsync", 1),
        "before the manifest": (checkpoints, "write_durably", 0),
        "before the folder is renamed": (checkpoints, "publish", 0),
        "before latest is replaced": (os, "replace", 0),
        "before old checkpoints are removed": (shutil, "rmtree", 0),
    }[moment]
    original = getattr(owner, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        folder = Path(tree["run_dir"]) / "checkpoints"
        second = any(folder.glob("*step_00000004"))
        third_name = name == "replace" and "latest" not in str(args[0])
        if world.rank == rank and second and not third_name:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
    train_in_process(world, tree)


@pytest.mark.parametrize(
    ("moment", "survivor"),
    [
        ("before this rank's optimizer state", 2),
        ("before the other rank's optimizer state", 2),
        ("before the sums", 2),
        ("before the manifest", 2),
        ("before the folder is renamed", 2),
        ("before latest is replaced", 2),
        ("before old checkpoints are removed", 4),
    ],
)
def test_a_run_killed_while_it_writes_a_checkpoint_resumes_from_the_previous_one(
    corpora: Path, tmp_path: Path, moment: str, survivor: int
) -> None:
    short = {"train_tokens": 4 * 8 * 32, "save_interval": 2, "keep_checkpoints": 1}
    tree = config_tree(corpora, tmp_path / "run", stage=2, **short)
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(train_killed_while_saving, 2, tree, moment)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert latest.read_text() == f"step_{survivor:08d}"
    assert run_ranks(train_in_process, 2, tree)[0]["step"] == 4
    assert latest.read_text() == "step_00000004"
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    assert not list(latest.parent.glob(".writing-*"))


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_previous_one(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=0)
    run_ranks(train_in_process, 1, tree)
    weights = next((tmp_path / "run" / "checkpoints" / "step_00000020").rglob("*model_states.pt"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert run_ranks(train_in_process, 1, tree)[0]["step"] == 20
    assert "is damaged" in (tmp_path / "run" / "log-rank0000.txt").read_text()


def test_a_truncated_manifest_or_a_missing_latest_file_loses_no_records(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=0)
    run_ranks(train_in_process, 1, tree)
    whole, folder = records(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    (folder / "latest").unlink()
    run_ranks(train_in_process, 1, tree)
    assert records(tmp_path / "run") == whole
    manifest = folder / "step_00000020" / "manifest.json"
    manifest.write_text(manifest.read_text()[:50])
    run_ranks(train_in_process, 1, tree)
    assert records(tmp_path / "run") == whole
    assert (folder / "latest").read_text() == "step_00000020"


def test_a_run_whose_checkpoints_are_all_incomplete_does_not_start_over(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=0, train_tokens=2 * 8 * 32)
    run_ranks(train_in_process, 1, tree)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    next((tmp_path / "run" / "checkpoints").glob("*/progress.json")).write_text("{}")
    with pytest.raises(RankError, match="none of its checkpoints is complete"):
        run_ranks(train_in_process, 1, tree)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_curves_have_each_step_once_after_a_kill_before_the_first_checkpoint(corpora: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tree = config_tree(corpora, tmp_path / "run", stage=0, save_interval=20) | {"selection": DEADLY}
    mark = str(tmp_path / "mark")
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(train_deadly, 2, tree, mark)
    run_ranks(train_deadly, 2, tree, mark)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss/all")] == list(range(1, 21))


def test_data_and_selection_continue_on_another_number_of_ranks(corpora: Path, tmp_path: Path) -> None:
    """At stage 0, whose checkpoints any number of ranks can load, 10 steps on 2 ranks and 10 on 1 equal 20 on 1."""
    one, other = (config_tree(corpora, tmp_path / name, stage=0) for name in ("a", "b"))
    one["training"]["micro_batch_size"] = 4
    run_ranks(train_in_process, 1, one)
    run_ranks(train_half, 2, other)
    other["training"]["micro_batch_size"] = 4
    run_ranks(train_in_process, 1, other)
    for first, second in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):
        assert first["consumed_samples"] == second["consumed_samples"]
        assert first["consumed_selected_tokens"] == second["consumed_selected_tokens"]
        assert first["loss/all"] == pytest.approx(second["loss/all"], abs=1e-4)
        assert first["loss/reference"] == pytest.approx(second["loss/reference"], abs=1e-5)


def train_half(world: World, tree: dict[str, Any]) -> None:
    """Train, and stop after the checkpoint of step 10."""
    from megatron_slm.build.run import build_run
    from megatron_slm.config import parse_config

    run = build_run(parse_config(tree), world)
    original = run.trainer._run_step

    def stop(state: Any) -> None:
        if state.step == 10:
            raise KeyboardInterrupt
        original(state)

    run.trainer._run_step = stop  # type: ignore[method-assign]
    try:
        run.trainer.fit(run.state)
    except KeyboardInterrupt:
        return
    raise AssertionError("the run went past step 10")


def test_a_longer_run_logs_how_its_learning_rate_changes(corpora: Path, tmp_path: Path) -> None:
    short = config_tree(corpora, tmp_path / "run", stage=0, train_tokens=2 * 8 * 32, micro_batch_size=4)
    config = str(write_config(tmp_path / "run.yaml", short))
    assert run_ranks(command_line, 1, "train", config)[0][0] == 0
    status, output = run_ranks(command_line, 1, "train", config, f"training.train_tokens={4 * 8 * 32}")[0]
    assert status == 0, output
    rates = [record["lr"] for record in records(tmp_path / "run")]
    assert rates[1] == 0 and rates[2] > 0
    assert f"learning rate of step 3 is {rates[2]:.3g};" in output
    # Resumed once more with the same length, the learning rate does not change.
    again = run_ranks(command_line, 1, "train", config, "training.train_tokens=1024")[0][1]
    assert "learning rate of step" not in again


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_glob_characters_in_paths_are_literal(corpora: Path, tmp_path: Path, stage: int) -> None:
    folder = tmp_path / "a[b] *?"
    shutil.copytree(corpora, folder / "corpora [1]")
    tree = config_tree(folder / "corpora [1]", folder / "run [1]", stage, **SHORT)
    tree["model"] = {"path": str(folder / "corpora [1]" / "reference")}
    config = str(write_config(tmp_path / "run.yaml", tree))
    half = (f"training.train_tokens={5 * 8 * 32}", f"data.order_tokens={10 * 8 * 32}", "training.schedule=constant")
    for arguments in (half, half[1:]):
        assert run_ranks(command_line, 1, "train", config, *arguments)[0][0] == 0
    assert [record["step"] for record in records(folder / "run [1]")] == list(range(1, 7))
    assert run_ranks(command_line, 1, "export", str(folder / "run [1]"), str(folder / "out [1]"))[0][0] == 0
    assert (folder / "out [1]" / "model.safetensors").exists()
