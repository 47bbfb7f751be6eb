"""`megatron_slm.train`, and callbacks of a user's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_slm
from megatron_slm.dist import World, disconnect
from megatron_slm.training.trainer import make_callback
from tests.gloo import run_ranks
from tests.runs import config_tree, records, write_config


class CountedTokens(megatron_slm.Callback):  # type: ignore[name-defined]
    """A callback that adds a column to the record, which the writers then write."""

    def __init__(self, name: str = "mine/selected", scale: float = 1.0) -> None:
        self._name = name
        self._scale = scale

    def on_step_end(self, state: Any, result: Any) -> None:
        if state.record is not None:
            state.record[self._name] = self._scale * result.selected_tokens


class Remembering(megatron_slm.Callback):  # type: ignore[name-defined]
    """Holds on to what it was told."""

    def __init__(self) -> None:
        self.moments: list[str] = []

    def on_train_start(self, state: Any) -> None:
        self.moments.append("start")

    def on_step_end(self, state: Any, result: Any) -> None:
        self.moments.append(f"step {state.step}")

    def on_record(self, state: Any, record: Any) -> None:
        assert record is state.record
        self.moments.append(f"record with mine: {'mine/selected' in record}")

    def close(self) -> None:
        self.moments.append("closed")


def train_from_python(_: World, config: Any) -> tuple[int, dict[str, Any], list[str]]:
    """As a program of a user's own would."""
    disconnect()
    remembering = Remembering()
    state = megatron_slm.train(config, callbacks=[remembering])
    return state.step, state.record, remembering.moments  # type: ignore[return-value]


def test_a_program_trains_and_hears_of_every_step(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", train_tokens=2 * 8 * 32)
    tree["callbacks"] = ["tests.end_to_end.test_from_python:CountedTokens"]
    step, record, moments = run_ranks(train_from_python, 1, tree)[0]
    wrote = "record with mine: True"
    assert step == 2 and moments == ["start", *("step 1", wrote, "step 2", wrote), "closed"]
    assert record["mine/selected"] == records(tmp_path / "run")[-1]["mine/selected"] == 4 * 38  # of 64 in each pool
    # The path of a file is as good, and a finished run is over at once.
    config = str(write_config(tmp_path / "run.yaml", tree))
    assert run_ranks(train_from_python, 1, config)[0][2] == ["start", "closed"]


def test_callbacks_in_a_configuration_take_arguments(corpora: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run", train_tokens=8 * 32))
    config.write_text(
        config.read_text() + "callbacks:\n"
        "- tests.end_to_end.test_from_python:CountedTokens\n"
        "- class: tests.end_to_end.test_from_python:CountedTokens\n"
        "  args: {name: mine/thousands, scale: 1e-3}\n"
    )
    run_ranks(train_from_python, 1, str(config))
    (record,) = records(tmp_path / "run")
    assert record["mine/thousands"] == pytest.approx(1e-3 * record["mine/selected"]) and record["mine/selected"] > 0


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"class": "tests.end_to_end.test_from_python:CountedTokens", "args": {"scael": 2}}, "scael"),
        ({"class": "tests.end_to_end.test_from_python:Missing", "args": {}}, "cannot be imported"),
        ("tests.end_to_end.test_from_python:train_from_python", "cannot be made"),
        ("builtins:dict", "not a callback"),
        ("json", "cannot be imported"),
    ],
)
def test_a_callback_that_cannot_be_made_is_named(entry: Any, reason: str) -> None:
    with pytest.raises(megatron_slm.UserError) as caught:
        make_callback(entry)
    error = caught.value
    assert error.setting == "callbacks" and error.value == (entry if isinstance(entry, str) else entry["class"])
    assert reason in error.reason and error.remedy


def test_a_program_gets_an_exception_with_fields(tmp_path: Path) -> None:
    training = {"lr": "fast", "global_batch_size": 8, "train_tokens": 1}
    with pytest.raises(megatron_slm.UserError) as caught:
        megatron_slm.train({"run_dir": "x", "model": {"path": "x"}, "data": {"train": "x"}, "training": training})
    assert (caught.value.setting, caught.value.value) == ("training.lr", "fast")
    assert not list(tmp_path.iterdir())


def test_a_missing_corpus_is_named_before_anything_heavy_is_imported(corpora: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    program = (
        "import sys, json; from megatron_slm.__main__ import main\n"
        "try: main(['train', sys.argv[1], 'data.valid.math=/nowhere/math'])\n"
        "except SystemExit as end: print(json.dumps([end.code, 'torch' in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == [2, False]
    assert "/nowhere/math.json is missing" in found.stderr and not (tmp_path / "run").exists()
