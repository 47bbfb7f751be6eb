"""`plan`: from a configuration alone, with and without its inputs, and a rehearsal of one rank among eight."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_slm.dist import World, disconnect
from tests.end_to_end.test_bad_input import sentence_of
from tests.end_to_end.test_dry_run import shown
from tests.gloo import run_ranks
from tests.runs import LLAMA, config_tree, write_config

H100 = ("--ranks", "8", "--device", "h100-80gb")
HERE = ("--ranks", "8", "--device", "cpu")


def plan(tree: dict[str, Any], folder: Path, *arguments: str) -> tuple[int, str, str]:
    config = write_config(folder / "run.yaml", tree)
    return run_ranks(shown, 1, "plan", str(config), *arguments)[0]


def without_inputs(folder: Path) -> dict[str, Any]:
    """The configuration of a run of which only the shape of the student is known."""
    tree = config_tree(folder / "nowhere", folder / "run", global_batch_size=16)
    tree["model"]["config"]["vocab_size"] = 300
    # Paths below a folder that exists are certainly local: no hub is asked.
    tree["reference"]["path"] = str(folder / "nowhere")
    return tree


def in_words(said: str) -> dict[str, list[str]]:
    """The lines of the tables by their first word."""
    return {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}


def test_a_plan_of_a_prepared_run_has_every_topic_and_writes_nothing(corpora: Path, tmp_path: Path) -> None:
    status, heard, said = plan(
        config_tree(corpora, tmp_path / "run", global_batch_size=16), tmp_path, *H100, "--price", "2.5", "--json"
    )
    assert status == 0, heard
    found = json.loads(said)
    assert found["steps"] == 10 and found["tokens_per_step"] == 16 * 32
    assert found["peak_bytes"] == max(sum(parts.values()) for parts in found["memory"]["phases"].values())
    assert {"weights", "gradients", "optimizer", "reference", "buffers"} <= found["memory"]["phases"]["update"].keys()
    assert found["device_hours"] == pytest.approx(8 * 10 * found["seconds_per_step"] / 3600)
    assert found["money"] == pytest.approx(2.5 * found["device_hours"])
    assert found["disk"]["checkpoint"] == 14 * found["parameters"]
    assert not any("does not exist yet" in sentence for sentence in found["assumptions"])
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}


def test_the_shape_of_the_student_is_enough_and_each_missing_input_is_named(tmp_path: Path) -> None:
    status, heard, said = plan(without_inputs(tmp_path), tmp_path, *H100)
    assert status == 0, heard
    for title in ("Memory per rank", "Time of a step", "The run", "Disk", "Assumptions"):
        assert title in said
    for missing in ("data.train", "data.valid.held_out", "reference.path"):
        assert f"{missing} {tmp_path}" in said
    assert "has the student's shape" in said and "an MFU of 40 %" in said


def test_a_configuration_without_weights_or_tokenizer_is_planned(tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 300, "num_hidden_layers": 7}))
    tree = without_inputs(tmp_path) | {"model": {"path": str(tmp_path / "shape")}, "objective": "clm"}
    status, heard, said = plan(tree, tmp_path, *H100, "--json")
    assert status == 0, heard
    found = json.loads(said)
    assert found["loading"] == 8 * 2 * found["parameters"]
    assert any("holds no weights" in sentence for sentence in found["assumptions"])


BAD: dict[str, tuple[tuple[str, ...], str, str]] = {
    "a device of which there are two": (("--ranks", "8", "--device", "a100"), "--device is a100", "a100-80gb?"),
    "a misspelt device": (("--ranks", "8", "--device", "h100-8gb"), "--device is h100-8gb", "h100-80gb?"),
    "no ranks": (("--ranks", "0", "--device", "h100"), "--ranks is 0", "1 or more"),
    "an MFU above one": ((*H100, "--mfu", "40"), "--mfu is 40", "such as 0.4"),
    "a free device": ((*H100, "--price", "0"), "--price is 0", "above 0"),
    "no failures at all": ((*H100, "--mtbf", "inf"), "--mtbf is inf", "finite"),
    "ranks that do not divide the batch": (("--ranks", "3", "--device", "h100"), "times 3 ranks", "multiple"),
    "an epoch of unknown length": (
        (*H100, "training.train_tokens=null", "training.train_epochs=2"),
        "training.train_epochs is 2",
        "Set training.train_tokens",
    ),
    "a vocabulary that nothing knows": (
        (*H100, f"model.config={json.dumps(LLAMA)}"),
        "model.config.vocab_size is not set",
        "32000",
    ),
    "a student without a configuration": (
        (*H100, "model={path: ./nowhere/model}"),
        "model.path is ./nowhere/model",
        "config.json",
    ),
}


def test_what_a_plan_cannot_do_without_is_asked_for(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "run.yaml", without_inputs(tmp_path)))
    commands = [["plan", config, *arguments] for arguments, _, _ in BAD.values()]
    answers = run_ranks(refusals, 1, commands)[0]
    for (name, (_, state, remedy)), answer in zip(BAD.items(), answers, strict=True):
        sentence = sentence_of("plan", *answer)
        assert state in sentence and remedy in sentence, f"{name}: {sentence}"


def refusals(world: World, commands: list[list[str]]) -> list[tuple[int, str]]:
    return [shown(world, *command)[:2] for command in commands]


def rehearsed(world: World, *arguments: str) -> tuple[int, str, str, dict[str, int]]:
    """A rehearsal, and how often it called the functions of training itself."""
    from megatron_slm.models.head import token_loss
    from megatron_slm.selection.select import keep_highest
    from megatron_slm.training.step import TrainingStep

    calls = {
        "loss": mock.patch("megatron_slm.models.causal_lm.token_loss", wraps=token_loss),
        "selection": mock.patch("megatron_slm.selection.rule.keep_highest", wraps=keep_highest),
        "step": mock.patch.object(TrainingStep, "__call__", autospec=True, side_effect=TrainingStep.__call__),
    }
    with calls["loss"] as loss, calls["selection"] as selection, calls["step"] as step:
        answer = shown(world, *arguments)
    disconnect()
    return *answer, {"loss": loss.call_count, "selection": selection.call_count, "step": step.call_count}


def test_a_rehearsal_runs_the_real_step_of_one_rank_of_eight(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", global_batch_size=32)
    config = str(write_config(tmp_path / "run.yaml", tree))
    status, heard, said, calls = run_ranks(rehearsed, 1, "plan", config, *HERE, "--rehearse", "--json")[0]
    assert status == 0, heard
    found = json.loads(said)["rehearsal"]
    assert found["ranks"] == 8 and found["micro_steps"] == 2 and found["applied"]
    vocabulary = json.loads((corpora / "reference" / "config.json").read_text())["vocab_size"]
    assert found["loss"] == pytest.approx(math.log(vocabulary), rel=0.1)
    # Two steps: two micro-batches each are selected from; the checks of the models call the loss, too.
    assert calls["step"] == 2 and calls["selection"] == 4 and calls["loss"] >= 6
    assert [name for name in found["phases"] if name.startswith("step: ")] == [
        "step: reference",
        "step: forward, selection",
        "step: backward",
        "step: update",
    ]
    assert all(phase["peak"] > 1e8 and phase["seconds"] > 0 for phase in found["phases"].values())
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}


def test_a_rehearsal_needs_no_input_but_the_shape_of_the_models(tmp_path: Path) -> None:
    tree = without_inputs(tmp_path) | {"reference": {"store": str(tmp_path / "nowhere" / "store")}}
    status, heard, said = plan(tree, tmp_path, *HERE, "--rehearse")
    assert status == 0, heard
    assert "Rehearsal of rank 0 of 8 on cpu" in said and "the update was applied" in said
    assert "The tokens are random" in said and "The losses of the store are random" in said
    # 16 samples of 32 tokens over 8 ranks, of which 60 % are selected.
    assert f"selected {round(0.6 * 2 * 32)} tokens" in said


def test_a_rehearsal_holds_a_whole_reference_on_each_rank(tmp_path: Path) -> None:
    status, heard, _ = plan(without_inputs(tmp_path), tmp_path, *HERE, "--rehearse", "reference.shard=false")
    assert status == 0, heard


def test_a_rehearsal_that_this_machine_cannot_hold_is_refused_before_it_begins(tmp_path: Path) -> None:
    tree = without_inputs(tmp_path) | {"objective": "clm"}
    tree["model"]["config"] |= {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 100}
    answer = plan(tree, tmp_path, *HERE, "--rehearse")
    sentence = sentence_of("plan", *answer[:2])
    assert "--ranks is 8" in sentence and "GiB are free here" in sentence


def test_a_rehearsal_meets_the_errors_of_the_models(tmp_path: Path) -> None:
    tree = without_inputs(tmp_path)
    tree["model"]["config"] = LLAMA | {"vocab_size": 300, "model_type": "gemma2", "head_dim": 16}
    answer = plan(tree, tmp_path, *HERE, "--rehearse")
    assert "a soft cap" in sentence_of("plan", *answer[:2])


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("training.activation_checkpointing=full",)], ids=["exact", "checkpointed"])
def test_the_planned_memory_is_within_ten_per_cent_of_the_peak(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    tree = without_inputs(tmp_path)
    wide = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    tree["model"]["config"] |= wide | {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 512}
    tree["data"]["seq_length"] = 512
    tree["deepspeed"] = {"zero_optimization": {"stage": 3}}
    status, heard, said = plan(tree, tmp_path, *HERE, "--rehearse", "--json", *overrides)
    assert status == 0, heard
    found = json.loads(said)
    phases = found["memory"]["phases"].values()
    planned = max(sum(size for part, size in parts.items() if part != "libraries") for parts in phases)
    peaks = [phase["peak"] for name, phase in found["rehearsal"]["phases"].items() if name.startswith("step: ")]
    assert planned == pytest.approx(max(peaks) - found["rehearsal"]["libraries"], rel=0.1)
