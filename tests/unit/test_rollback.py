"""A rollback loses nothing, whenever it is interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.commands.train import _rollback
from megatron_slm.dist import World
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.training import checkpoints as rollback
from megatron_slm.training.checkpoints import (
    MANIFEST,
    CheckpointStore,
    _sum,
    checkpoint_name,
    list_checkpoints,
    refuse_missing_checkpoint,
    roll_back,
    saved_steps,
)

ALONE = World(0, 1, 0, torch.device("cpu"))
STEPS = (5, 10, 15, 20)
LINES = [json.dumps({"step": step}) + "\n" for step in range(1, 21)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 20 steps with a checkpoint every 5, and a later one that was never published."""
    for step in (*STEPS, 25):
        folder = tmp_path / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"of {step}")
        (folder / MANIFEST).write_text(json.dumps({"files": {"weights": _sum(folder / "weights", flush=False)}}))
    (tmp_path / "checkpoints" / "latest").write_text(checkpoint_name(20))
    (tmp_path / "metrics.jsonl").write_text("".join(LINES) + '{"step": 21, "lo')
    (tmp_path / "spikes.jsonl").write_text(LINES[7] + LINES[12])
    return tmp_path


def roll_back_to(run_dir: Path, step: int) -> None:
    roll_back(run_dir, CheckpointStore(run_dir / "checkpoints", ALONE), step, ALONE)


def published_steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(run_dir / "checkpoints")]


def weights(run_dir: Path) -> list[str]:
    """Return the weights of all checkpoints, wherever they are."""
    return sorted(path.read_text() for path in run_dir.rglob("weights"))


def test_what_came_after_is_moved_aside_with_its_records(run_dir: Path) -> None:
    before = weights(run_dir)
    roll_back_to(run_dir, 10)
    aside = run_dir / "rolled-back" / "0001"
    assert published_steps(run_dir) == [5, 10] and (run_dir / "checkpoints" / "latest").read_text() == checkpoint_name(
        10
    )
    assert {path.name for path in aside.glob("step_*")} == {checkpoint_name(step) for step in (15, 20, 25)}
    assert (aside / "metrics.jsonl").read_text() == "".join(LINES[10:]) + '{"step": 21, "lo'
    assert (aside / "spikes.jsonl").read_text() == LINES[12]
    assert weights(run_dir) == before
    (run_dir / "metrics.jsonl").write_text("".join(LINES[:10]))
    (run_dir / "spikes.jsonl").unlink()
    roll_back_to(run_dir, 10)
    assert [path.name for path in (run_dir / "rolled-back").iterdir()] == ["0001"]
    roll_back_to(run_dir, 5)
    assert published_steps(run_dir) == [5] and (run_dir / "rolled-back" / "0002" / checkpoint_name(10)).exists()
    assert weights(run_dir) == before


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_at_any_moment_loses_nothing_and_asking_again_finishes(
    run_dir: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has two files of records, three checkpoints and `latest`; it is killed before each is changed."""
    before, left = weights(run_dir), [moment]

    def dies(work: Any) -> Any:
        def then(*args: Any) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            work(*args)

        return then

    with monkeypatch.context() as patch:
        patch.setattr(rollback, "write_durably", dies(rollback.write_durably))  # type: ignore[attr-defined]
        patch.setattr(shutil, "move", dies(shutil.move))
        with pytest.raises(KeyboardInterrupt):
            roll_back_to(run_dir, 10)
    assert weights(run_dir) == before
    assert (run_dir / "metrics.jsonl").read_text().startswith("".join(LINES))
    newest = CheckpointStore(run_dir / "checkpoints", ALONE).newest()
    assert newest is not None and int(newest.name[5:]) == {4: 15, 5: 10}.get(moment, 20)
    roll_back_to(run_dir, 10)
    assert published_steps(run_dir) == [5, 10] and weights(run_dir) == before
    assert (run_dir / "checkpoints" / "latest").read_text() == checkpoint_name(10)


def test_a_rollback_to_a_damaged_checkpoint_is_refused(run_dir: Path) -> None:
    (run_dir / "checkpoints" / checkpoint_name(10) / "weights").write_text("else")
    with pytest.raises(AgreedError) as caught:
        roll_back_to(run_dir, 10)
    assert (caught.value.setting, caught.value.value) == ("--rollback", 10) and "damaged" in caught.value.reason
    assert published_steps(run_dir) == list(STEPS) and not (run_dir / "rolled-back").exists()


@pytest.mark.parametrize("line", ["garbage\n", "[1]\n", "{}\n"])
def test_a_line_that_is_not_a_record_is_reported_and_nothing_is_moved(run_dir: Path, line: str) -> None:
    (run_dir / "metrics.jsonl").write_text(LINES[0] + line)
    with pytest.raises(AgreedError) as caught:
        roll_back_to(run_dir, 10)
    assert caught.value.value == str(run_dir) and "metrics.jsonl" in caught.value.reason
    assert published_steps(run_dir) == list(STEPS) and not (run_dir / "rolled-back").exists()


def test_the_steps_with_a_checkpoint_are_listed(run_dir: Path) -> None:
    refuse_missing_checkpoint(run_dir / "checkpoints", 15)
    with pytest.raises(UserError) as caught:
        refuse_missing_checkpoint(run_dir / "checkpoints", 25)
    assert (caught.value.setting, caught.value.value) == ("--rollback", 25)
    assert "5, 10, 15, 20" in caught.value.remedy


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_run_that_a_launcher_restarts_is_not_rolled_back_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    assert _rollback(10) == 10
    monkeypatch.setenv(name, "1")
    assert _rollback(10) is None


class FileEngine:
    """An engine that saves one file, and has a small module so that the room it needs can be estimated."""

    module = torch.nn.Linear(2, 2)

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("new")


def test_copies_with_other_names_are_never_read_moved_or_removed(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    mine = ["step_00000015.good", "step_15", "step_000000020", "step_00000020 (copy)", ".writing-step_00000030.mine"]
    for name in mine:
        shutil.copytree(checkpoints / checkpoint_name(15), checkpoints / name)
    (checkpoints / checkpoint_name(40)).write_text("a file")
    left_by_a_kill = checkpoints / f".writing-{checkpoint_name(12)}"
    left_by_a_kill.mkdir()
    assert saved_steps(checkpoints) == [5, 10, 15, 20]
    (checkpoints / "latest").unlink()
    assert saved_steps(checkpoints) == [5, 10, 15, 20, 25]
    roll_back_to(run_dir, 10)
    assert saved_steps(checkpoints) == [5, 10]
    store = CheckpointStore(checkpoints, ALONE, keep=1)
    store.save(FileEngine(), {"step": 11})  # type: ignore[arg-type]
    assert saved_steps(checkpoints) == [11] and not left_by_a_kill.exists()
    assert all((checkpoints / name / "weights").read_text() == "of 15" for name in mine)
    assert (checkpoints / checkpoint_name(40)).read_text() == "a file"
