"""Whole runs from the command line: launchers, records, evaluation, export."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.dist import World
from megatron_slm.errors import UserError
from tests.end_to_end.test_bad_input import command_line
from tests.gloo import run_ranks
from tests.runs import (
    LLAMA,
    config_tree,
    free_port,
    in_a_process,
    megatron_slm,
    records,
    train_in_process,
    write_config,
)

SELECTIVE = ("loss/selected", "loss/unselected", "loss/reference", "selection/threshold", "selection/ratio")
ALWAYS = ("step", "consumed_samples", "consumed_tokens", "scored_tokens", "trained_tokens", "flops")
ALWAYS += ("loss/all", "lr", "grad_norm", "mfu")


@pytest.fixture(scope="module")
def run(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a finished selective run on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_ranks(train_in_process, 2, config_tree(corpora, folder))
    return folder


def test_a_run_directory_holds_its_configuration_environment_records_and_checkpoints(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "log-rank0001.txt"}
    assert expected <= names
    assert json.loads((run / "environment.json").read_text())["starts"][0]["ranks"] == 2
    assert (run / "checkpoints" / "latest").read_text() == "step_00000020"


def test_records_hold_the_documented_keys(run: Path) -> None:
    lines = records(run)
    assert [record["step"] for record in lines] == list(range(1, 21))
    for record in lines:
        assert set(ALWAYS + SELECTIVE) <= record.keys()
        by_source = {"selection/ratio/web", "selection/ratio/books", "loss/all/web", "loss/reference/books"}
        assert by_source | {"excess/q50"} <= record.keys()
        assert record["selection/ratio"] == pytest.approx(0.6, abs=0.01)
        assert record["consumed_tokens"] == record["consumed_samples"] * 32 == record["step"] * 8 * 32
    assert [record["step"] for record in lines if "eval/held_out/loss" in record] == [10, 20]
    assert lines[-1]["loss/all"] < lines[0]["loss/all"] - 0.1


def test_causal_language_modeling_reports_no_selection(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", train_tokens=2 * 8 * 32) | {"objective": "clm"}
    run_ranks(train_in_process, 2, tree)
    for record in records(tmp_path / "run"):
        assert not [key for key in record if "select" in key or key == "loss/reference"]


def test_tensorboard_shows_the_records(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {scalar.step: scalar.value for scalar in events.Scalars("loss/all")}
    assert shown == {record["step"]: pytest.approx(record["loss/all"]) for record in records(run)}


def exported_losses(world: World, folder: str, corpora: str, tied: bool) -> dict[str, float]:
    """Evaluate an exported folder without this package: `from_pretrained`, full logits, windows of the stream."""
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.tie_word_embeddings is tied and model.dtype == torch.float32
    stream = torch.from_numpy(np.fromfile(f"{corpora}/held_out.bin", dtype=np.uint16).astype(np.int64))
    losses = []
    for start in range(0, len(stream) - 1, 32):
        text = stream[start : start + 33]
        loss = torch.nn.functional.cross_entropy(model(text[None, :-1]).logits[0], text[1:], reduction="none")
        losses.append(loss[text[1:] != tokenizer.eos_token_id])
    return {"loss": float(torch.cat(losses).mean())}


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_folder_has_the_evaluated_loss(corpora: Path, tmp_path: Path, tied: bool, run: Path) -> None:
    if tied:
        ended = megatron_slm("export", str(run), str(tmp_path / "out"))
        assert ended.returncode == 0, ended.stderr
    else:
        run = tmp_path / "run"
        tree = config_tree(corpora, run, stage=2, train_tokens=2 * 8 * 32)
        tree["model"] = {"config": LLAMA | {"tie_word_embeddings": False}}
        run_ranks(train_in_process, 2, tree)
        assert run_ranks(command_line, 1, "export", str(run), str(tmp_path / "out"))[0][0] == 0
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert "| selection | top 60% of the tokens by excess; scope global" in (tmp_path / "out" / "README.md").read_text()
    found = run_ranks(exported_losses, 1, str(tmp_path / "out"), str(corpora), tied)[0]
    assert found["loss"] == pytest.approx(records(run)[-1]["eval/held_out/loss"], abs=1e-5)


def evaluate(world: World, corpora: str) -> dict[str, Any]:
    from megatron_slm.data.corpus import open_corpus
    from megatron_slm.data.loader import EvaluationStream
    from megatron_slm.training.evaluation import Evaluator
    from tests.steps import TINY_LLAMA, Case, make_backend, make_student

    case = Case(model=TINY_LLAMA | {"vocab_size": 300})
    backend = make_backend(world, case)
    engine = backend.frozen_engine(make_student(backend, case)[0], shard=True)
    stream = EvaluationStream(open_corpus(f"{corpora}/held_out"), 32, eod=1, reset_attention=False)
    beginning = Evaluator(engine, {"held_out": stream}, 4, world, limit=5)
    return Evaluator(engine, {"held_out": stream}, 4, world).evaluate() | beginning.losses()


def test_evaluation_is_the_same_at_one_two_and_three_ranks(corpora: Path) -> None:
    one = run_ranks(evaluate, 1, str(corpora))[0]
    assert one["held_out"] != one["eval/held_out/loss"]
    for ranks in (2, 3):
        for found in run_ranks(evaluate, ranks, str(corpora)):
            assert found == pytest.approx(one, rel=1e-12)


def test_the_deepspeed_launcher_trains(corpora: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run", train_tokens=8 * 32)))
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", free_port()]
    ended = in_a_process([*launcher, "--module", "megatron_slm", "train", config])
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][0]["ranks"] == 2


def train_as_a_task(world: World, job: str, config: str) -> tuple[int, str]:
    """Train as a task of srun, with no variables but Slurm's."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ |= {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    os.environ |= {"SLURM_NTASKS": "2", "SLURM_PROCID": str(world.rank), "SLURM_LOCALID": str(world.rank)}
    return command_line(world, "train", config)


def test_srun_trains(corpora: Path, tmp_path: Path) -> None:
    """The job id, from which the port follows, is the process id, so that no other test uses the same port."""
    config = str(write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run", train_tokens=8 * 32)))
    for status, output in run_ranks(train_as_a_task, 2, str(os.getpid()), config):
        assert status == 0, output
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][0]["ranks"] == 2


def train_on_poison(world: World, tree: dict[str, Any], what: str, step: int) -> str:
    """Train with a student that returns one NaN on rank 1 in a step, in the loss or in its gradient."""
    from megatron_slm.models import student as exact
    from megatron_slm.models.causal_lm import score_batch

    steps = {"seen": 0}

    def poisoned(module: torch.nn.Module, batch: Any, want: tuple[str, ...] = ()) -> Any:
        signals = score_batch(module, batch, want)
        steps["seen"] += 1
        if world.rank == 1 and steps["seen"] == 2 * (step - 1) + 1:
            if what == "loss":
                signals["loss"] = signals["loss"] + torch.nan
            else:
                signals["loss"].register_hook(lambda gradient: gradient * torch.nan)
        return signals

    exact.score_batch = poisoned  # type: ignore[attr-defined]
    try:
        train_in_process(world, tree)
    except UserError as error:
        return str(error)
    return ""


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", train_tokens=5 * 8 * 32, save_interval=2)
    for sentence in run_ranks(train_on_poison, 2, tree, "loss", 4):
        assert "loss is not finite, but step 4" in sentence and "rank 1, samples [26, 27]" in sentence
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"
    assert run_ranks(train_in_process, 2, tree)[0]["step"] == 5


@pytest.mark.parametrize(("backend", "stage"), [*(("deepspeed", stage) for stage in range(4)), ("plain", 0)])
def test_a_skipped_update_is_counted(corpora: Path, tmp_path: Path, backend: str, stage: int) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=stage, backend=backend, train_tokens=5 * 8 * 32)
    assert run_ranks(train_on_poison, 2, tree, "gradient", 3) == ["", ""]
    assert [record["skipped_updates"] for record in records(tmp_path / "run")] == [0, 0, 1, 1, 1]
    assert all(record["loss/all"] is not None for record in records(tmp_path / "run"))


def test_too_many_skipped_updates_stop_the_run(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=0, max_skipped_updates=1, train_tokens=5 * 8 * 32)
    for sentence in run_ranks(train_on_poison, 2, tree, "gradient", 3):
        assert "training.max_skipped_updates" in sentence
