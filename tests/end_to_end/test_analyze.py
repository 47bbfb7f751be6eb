"""Observed tokens of whole runs: recorded while training, or at the checkpoints afterwards."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_slm.__main__ import main
from tests.runs import config_tree, megatron_slm, write_config


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Restore the variables that a command sets for itself as its only rank."""
    with mock.patch.dict(os.environ):
        yield


OBSERVE = {"tokens": 200, "interval": 5}


def train(corpora: Path, folder: Path, ranks: int = 0, **training: Any) -> Path:
    tree = config_tree(corpora, folder / "run", keep_checkpoints=5, **training)
    ended = megatron_slm("train", str(write_config(folder / "run.yaml", tree)), ranks=ranks)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def observed_run(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(corpora, tmp_path_factory.mktemp("observed"), ranks=2, observe=OBSERVE)


def recordings(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_checkpoints_give_the_losses_that_were_recorded_in_training(observed_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(observed_run, run)
    trained = recordings(run / "observed")
    assert [name for name in trained if name.startswith("step")] == [
        f"step_{step:08d}.safetensors" for step in (0, 5, 10, 15, 20)
    ]
    for name in ("reference", "step_00000000", "step_00000010"):
        (run / "observed" / f"{name}.safetensors").unlink()
    ended = megatron_slm("analyze", "tokens", str(run), ranks=2)
    assert ended.returncode == 0, ended.stderr
    again = recordings(run / "observed")
    assert again.keys() == trained.keys()
    for name, columns in trained.items():
        for column, values in columns.items():
            assert (again[name][column] == values).all(), (name, column)


def test_the_table_holds_text_losses_and_selection(observed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pyarrow.parquet import read_table

    ended = megatron_slm("analyze", "tokens", str(observed_run))
    assert ended.returncode == 0, ended.stderr
    table = read_table(observed_run / "observed" / "tokens.parquet").to_pydict()
    steps = recordings(observed_run / "observed")
    assert (np.array(table["loss/10"], dtype=np.float32) == steps["step_00000010.safetensors"]["loss"]).all()
    assert (np.array(table["selected/10"]) == steps["step_00000010.safetensors"]["selected"]).all()
    assert (np.array(table["reference_loss"], dtype=np.float32) == steps["reference.safetensors"]["loss"]).all()
    assert set(table["corpus"]) == {"held_out"}
    text = "".join(table["text"])
    assert any(word in text for word in ("number", "proof", "river"))
    main(["analyze", "dynamics", str(observed_run), "--csv", str(observed_run / "csv")])
    main(["analyze", "selections", str(observed_run)])
    shown = capsys.readouterr().out
    assert "H->L" in shown
    assert "held_out" in shown
    assert (observed_run / "csv" / "classes.csv").exists()


def test_a_plain_run_is_analyzed_with_a_reference_that_is_named(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", keep_checkpoints=5) | {"objective": "clm", "reference": None}
    ended = megatron_slm("train", str(write_config(tmp_path / "run.yaml", tree)))
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "run"
    corpus = f"books={corpora / 'books'}"
    options = ["--reference", str(corpora / "reference"), "--corpus", corpus, "--tokens", "100"]
    ended = megatron_slm("analyze", "tokens", str(run), *options)
    assert ended.returncode == 0, ended.stderr
    found = recordings(run / "observed")
    assert list(found) == [
        "reference.safetensors",
        *(f"step_{step:08d}.safetensors" for step in (0, 10, 20)),
        "tokens.safetensors",
    ]
    assert found["step_00000010.safetensors"]["selected"].any()
    (run / "observed" / "reference.safetensors").unlink()
    assert megatron_slm("analyze", "tokens", str(run), *options).returncode == 0
    assert (
        recordings(run / "observed")["reference.safetensors"]["loss"] == found["reference.safetensors"]["loss"]
    ).all()


MISTAKES = {
    "no run": (["analyze", "tokens", "{corpora}"], "holds no config.yaml"),
    "nothing recorded": (["analyze", "dynamics", "{run}", "--folder", "{corpora}/nothing"], "analyze tokens"),
    "no name": (["analyze", "tokens", "{run}", "--corpus", "data/math"], "NAME=PREFIX"),
    "no corpus": (["analyze", "tokens", "{run}", "--corpus", "math=data/none"], "--corpus"),
    "another tokenizer": (["analyze", "tokens", "{run}", "--corpus", "o={corpora}/other"], "different tokenizer"),
    "no number": (["analyze", "tokens", "{run}", "--tokens", "many"], "--tokens is many"),
    "other tokens": (["analyze", "tokens", "{run}", "--tokens", "64"], "losses of other tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, observed_run: Path, corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = MISTAKES[mistake]
    before = sorted(path.name for path in (observed_run / "observed").iterdir())
    with pytest.raises(SystemExit) as ended:
        main([argument.format(corpora=corpora, run=observed_run) for argument in arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
    assert sorted(path.name for path in (observed_run / "observed").iterdir()) == before


def test_a_run_without_checkpoints_is_told_to_wait(
    observed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(observed_run / "config.yaml", run)
    with pytest.raises(SystemExit):
        main(["analyze", "tokens", str(run)])
    assert "holds no checkpoint" in capsys.readouterr().err


def test_resuming_repeats_the_recordings_bit_for_bit(corpora: Path, observed_run: Path, tmp_path: Path) -> None:
    """A run that stops at step 10, and resumes, records what the uninterrupted run recorded."""
    tree = config_tree(corpora, tmp_path / "run", keep_checkpoints=5, observe=OBSERVE)
    tree["training"]["train_tokens"] = 12 * 8 * 32
    tree["training"]["schedule"] = "constant"
    path = write_config(tmp_path / "run.yaml", tree)
    assert megatron_slm("train", str(path)).returncode == 0
    whole = recordings(tmp_path / "run" / "observed")
    for later in (tmp_path / "run" / "checkpoints").glob("step_00000012"):
        shutil.rmtree(later)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000010")
    (tmp_path / "run" / "observed" / "step_00000010.safetensors").rename(tmp_path / "ten")
    ended = megatron_slm("train", str(path))
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "ten").rename(tmp_path / "run" / "observed" / "step_00000010.safetensors")
    again = recordings(tmp_path / "run" / "observed")
    assert again.keys() == whole.keys()
    assert all((again[name][column] == values).all() for name in whole for column, values in whole[name].items())
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["evaluation"].keys() == {"held_out"}
