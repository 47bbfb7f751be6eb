"""Runs that send their records to a tracker, and runs that serve their own TensorBoard."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_slm.commands import _tensorboard
from megatron_slm.dist import World
from tests.end_to_end.test_bad_input import command_line, command_line_among, refused, sentences_of
from tests.end_to_end.test_controls import ASKED, CALLS_TO_STEP_5, SHORT
from tests.gloo import run_ranks
from tests.runs import config_tree, free_port, records, train_in_process, write_config


def use_fake_trackio(begun: list[str], sent: list[tuple[int, dict[str, float]]]) -> None:
    """Put a module in the place of Trackio, which records the runs that begin and the values that are sent."""

    def init(name: str, **_: Any) -> Any:
        begun.append(name)
        return SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: None)

    module = ModuleType("trackio")
    vars(module).update(init=init)
    sys.modules["trackio"] = module


def train_tracked(world: World, tree: dict[str, Any]) -> tuple[list[str], list[tuple[int, dict[str, float]]]]:
    begun: list[str] = []
    sent: list[tuple[int, dict[str, float]]] = []
    if world.is_main:
        use_fake_trackio(begun, sent)
    else:
        sys.modules["trackio"] = None  # type: ignore[assignment]  # the other ranks need not have it
    train_in_process(world, tree)
    return begun, sent


def test_a_tracker_gets_the_records_of_rank_0_and_its_run_goes_on(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", loggers=["trackio"], train_tokens=4 * 8 * 32, save_interval=2)
    ranks = run_ranks(train_tracked, 2, tree)
    longer = tree | {"training": tree["training"] | {"train_tokens": 6 * 8 * 32, "loggers": ["tensorboard", "trackio"]}}
    assert not (tmp_path / "run" / "tensorboard").exists()
    again = run_ranks(train_tracked, 2, longer)  # loggers may change on resume
    assert (tmp_path / "run" / "tensorboard").exists()
    assert ranks[1] == again[1] == ([], [])
    (first,), (second,) = ranks[0][0], again[0][0]
    assert first == second and first.startswith("run-")
    sent = [*ranks[0][1], *again[0][1]]
    written = records(tmp_path / "run")
    assert [step for step, _ in sent] == [record["step"] for record in written] == [1, 2, 3, 4, 5, 6]
    for (_, values), record in zip(sent, written, strict=True):
        compared = {key: value for key, value in record.items() if value is not None and key != "step"}
        assert compared == {key: values[key] for key in compared}


def dry_run_without(world: World, package: str, config: str) -> tuple[int, str]:
    sys.modules[package] = None  # type: ignore[assignment]
    return command_line(world, "train", config, "--dry-run")


def test_a_missing_tracker_is_found_before_any_model_is_loaded(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", loggers=["mlflow"], lr=0.001)
    config = str(write_config(tmp_path / "run.yaml", tree))
    (sentence,) = sentences_of("train", *run_ranks(dry_run_without, 1, "mlflow", config)[0])
    assert "training.loggers is ['mlflow'], but mlflow cannot be imported" in sentence
    assert "Run pip install 'megatron_slm[mlflow]', or remove mlflow" in sentence


def train_serving(world: World, environment: dict[str, str], *arguments: str) -> tuple[int, str, int]:
    """Run the command line as `command_line_among`, and return also the number of children that it left."""
    _tensorboard.USUAL_PORT = int(environment["USUAL_PORT"])
    found = command_line_among(world, environment, *arguments)
    return *found, len(psutil.Process().children())


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR2"])
def test_tensorboard_is_served_until_the_run_is_told_to_stop(corpora: Path, tmp_path: Path, number: str) -> None:
    tree = config_tree(corpora, tmp_path / "run", **SHORT) | {"selection": ASKED}
    config, port = str(write_config(tmp_path / "run.yaml", tree)), free_port()
    asking = {"DEADLY_MARK": str(tmp_path / "mark"), "DEADLY_CALL": str(CALLS_TO_STEP_5), "DEADLY_RANK": "1"}
    asking |= {"DEADLY_SIGNAL": number, "MASTER_PORT": free_port(), "USUAL_PORT": port}
    ranks = run_ranks(train_serving, 2, asking, "train", config, "--tensorboard")
    assert [(status, left) for status, _, left in ranks] == [(0, 0), (0, 0)]
    assert f"TensorBoard: http://127.0.0.1:{port}/" in ranks[0][1] and "TensorBoard:" not in ranks[1][1]
    assert "stopped by a signal: step 5" in ranks[0][1]
    assert (tmp_path / "run" / "log-tensorboard.txt").exists()


@pytest.mark.parametrize("given", ["training.lr=1", "70000", "-1"])
def test_what_is_no_port_is_refused(corpora: Path, tmp_path: Path, given: str) -> None:
    config = str(write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run")))
    assert f"--tensorboard is {given}, but a port is a number" in refused("train", config, f"--tensorboard={given}")


def test_tensorboard_is_not_served_without_its_files(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", loggers=[])
    sentence = refused("train", str(write_config(tmp_path / "run.yaml", tree)), "--tensorboard")
    assert "training.loggers is []" in sentence and "--tensorboard shows" in sentence
