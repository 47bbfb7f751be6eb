"""Mistakes of users. Each ends with an error that names the setting, exit status 2, no traceback, and nothing lost."""

import fcntl
import io
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_slm.__main__ import main
from megatron_slm.dist import World, disconnect
from tests.end_to_end.selection_mistakes import SELECTION
from tests.gloo import run_ranks
from tests.runs import (
    TORCHRUN,
    config_tree,
    free_port,
    in_a_process,
    megatron_slm,
    records,
    train_in_process,
    write_config,
    write_text,
)


def command_line(_: World, *arguments: str) -> tuple[int, str]:
    """Run a command in this process, which has imported everything already; return exit status and standard error."""
    disconnect()
    heard = io.StringIO()
    with redirect_stderr(heard):
        try:
            main(list(arguments))
        except SystemExit as end:
            return int(end.code or 0), heard.getvalue()
    return 0, heard.getvalue()


def command_line_among(world: World, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run a command as a launcher that sets these variables would."""
    os.environ.update(environment)
    return command_line(world, *arguments)


def command_lines(world: World, many: list[list[str]]) -> list[tuple[int, str]]:
    """Run several commands in one process; one that fails early leaves nothing behind for the next."""
    return [command_line(world, *arguments) for arguments in many]


def refused(*arguments: str) -> str:
    """Run a command that fails, and return its errors, one per line."""
    return sentence_of(arguments[0], *run_ranks(command_line, 1, *arguments)[0])


def sentence_of(verb: str, status: int, heard: str) -> str:
    return "\n".join(sentences_of(verb, status, heard))


def sentences_of(verb: str, status: int, heard: str) -> list[str]:
    """Return the errors that a failed command printed."""
    start = f"megatron-slm {verb}: error: "
    sentences = [line.removeprefix(start) for line in heard.splitlines() if line.startswith(start)]
    assert status == 2 and sentences and heard.splitlines()[-1].startswith(start), heard
    assert "Traceback" not in heard
    return sentences


SETTINGS = {
    "an unknown key": ("selection.ratoi=0.5", "selection.ratoi is 0.5", "Did you mean selection.ratio?"),
    "an unknown group": ("optimiser.lr=1", "optimiser is {'lr': 1}", "training"),
    "a wrong type": ("training.lr=fast", "training.lr is fast", "a number"),
    "a fractional count": ("training.micro_batch_size=1.5", "training.micro_batch_size is 1.5", "whole number"),
    "a value where a group belongs": ("training=7", "training is 7", "a group of settings"),
    "an unknown logger": ("training.loggers=[neptune]", "training.loggers[0] is neptune", "'wandb'"),
    "a logger outside a list": ("training.loggers=wandb", "training.loggers is wandb", "in brackets"),
    "a ratio above one": ("selection.ratio=1.2", "selection.ratio is 1.2", "1 or less"),
    "a ratio of zero": ("selection.ratio=0", "selection.ratio is 0", "above 0"),
    "an unknown scope": ("selection.scope=node", "selection.scope is node", "'rank'"),
    "an unknown objective": ("objective=mlm", "objective is mlm", "'slm'"),
    "a batch that cannot be dealt": ("training.micro_batch_size=3", "training.global_batch_size is 8", "multiple"),
    "a negative interval": ("training.save_interval=-5", "training.save_interval is -5", "above 0"),
    "no length": ("training.train_tokens=null", "training.train_tokens is not set", "training.train_epochs"),
    "both lengths": ("training.train_epochs=2", "training.train_epochs is 2", "training.train_tokens is 5120"),
    "a minimum above the peak": ("training.min_lr=1", "training.min_lr is 1", "training.lr, is 0.001"),
    "a weight without its corpus": ("data.train=[0.7]", "data.train is [0.7]", "PREFIX"),
    "a negative weight": ("data.train=[-1, a, 2, b]", "data.train is [-1, 'a', 2, 'b']", "weights above 0"),
    "an empty blend": ("data.train=[]", "data.train is []", "PREFIX"),
    "a group in place of a blend": ("data.train={web: 1}", "data.train is {'web': 1}", "PREFIX"),
    "a split without numbers": ("data.split=most", "data.split is most", "parts"),
    "a split in exponents": ("data.split='1e-1,1'", "data.split is 1e-1,1", "parts"),
    "a split in four": ("data.split='1,1,1,1'", "data.split is 1,1,1,1", "parts"),
    "a split without training": ("data.split='0,1'", "data.split is 0,1", "the first above 0"),
    "a split without a document": ("data.split='0.1,99,1'", "data.split is", "none of the 300 documents"),
    "a score of an unknown signal": (
        "selection.score=tests.steps:unknown_signal",
        "selection.score",
        "student.entropi",
    ),
    "a corpus that is not there": ("data.train=/nowhere/web", "data.train", "/nowhere/web"),
    "DeepSpeed's batch size": ("deepspeed.train_batch_size=8", "deepspeed.train_batch_size is 8", "global_batch_size"),
    "DeepSpeed's optimizer": (
        "deepspeed.optimizer={type: Adam}",
        "deepspeed.optimizer is {'type': 'Adam'}",
        "this package sets it",
    ),
    "how DeepSpeed sends gradients": (
        "deepspeed.communication_data_type=bf16",
        "deepspeed.communication_data_type is bf16",
        "Remove it.",
    ),
    "an unknown DeepSpeed key": (
        "deepspeed.zero_optimisation={}",
        "deepspeed.zero_optimisation is {}",
        "Did you mean deepspeed.zero_optimization?",
    ),
    "DeepSpeed's other parallelism": (
        "deepspeed.tensor_parallel={}",
        "deepspeed.tensor_parallel is {}",
        "does not pass it",
    ),
    "an empty ZeRO section": ("deepspeed.zero_optimization=null", "deepspeed.zero_optimization is not set", "group"),
    "a stage that does not exist": (
        "deepspeed.zero_optimization.stage=4",
        "deepspeed.zero_optimization.stage is 4",
        "0, 1, 2 or 3",
    ),
    "a stage in words": (
        "deepspeed.zero_optimization.stage=auto",
        "deepspeed.zero_optimization.stage is auto",
        "0, 1, 2 or 3",
    ),
    "an infinite size of DeepSpeed's": (
        "deepspeed.zero_optimization.reduce_bucket_size=.inf",
        "deepspeed.zero_optimization.reduce_bucket_size is inf",
        "finite",
    ),
    "a negative seed": ("seed=-1", "seed is -1", "0 or more"),
    "a seed beyond 31 bits": ("seed=2147483648", "seed is 2147483648", "below 2147483648"),
    "an order of no tokens": ("data.order_tokens=0", "data.order_tokens is 0", "above 0"),
    "an order shorter than a step": ("data.order_tokens=255", "data.order_tokens is 255", "256 tokens"),
    "a beta of one": ("training.adam_beta2=1", "training.adam_beta2 is 1", "below 1"),
    "an epsilon of zero": ("training.adam_eps=0", "training.adam_eps is 0", "above 0"),
    "an infinite rate": ("training.lr=.inf", "training.lr is inf", "finite"),
    "a rate that is no number": ("training.lr=.nan", "training.lr is nan", "finite"),
    "an infinite decay in words": ("training.weight_decay=inf", "training.weight_decay is inf", "a number"),
    "an infinite weight": ("data.train=[.inf, a, 1, b]", "data.train is [inf, 'a', 1, 'b']", "PREFIX"),
    "a truth for a number": ("training.micro_batch_size=true", "training.micro_batch_size is true", "whole number"),
    "a truth for a rate": ("training.lr=true", "training.lr is true", "a number"),
    "a truth for a weight": ("data.train=[true, a]", "data.train is [True, 'a']", "PREFIX"),
    "a number for a truth": ("data.reset_attention=2", "data.reset_attention is 2", "true or false"),
    "an empty group that has no defaults": ("training=null", "training is not set", "group"),
    "more tokens than positions": ("data.seq_length=128", "data.seq_length", "model.config.max_position_embeddings"),
    "heads that do not divide": ("model.config.num_attention_heads=3", "model.config", "number of attention heads"),
    "a score that does not exist": ("selection.score=surprise", "selection.score is", "excess"),
    "a score that cannot be imported": ("selection.score=nowhere:found", "selection.score is", "cannot be imported"),
    "no reference": ("reference=null", "selection.score is", "needs a reference model"),
    "a reference that is not there": ("reference.path=/nowhere/model", "reference.path is", "/nowhere/model"),
    "a store that is not there": ("reference.store=/nowhere/scores", "reference.store is", "/nowhere/scores"),
    "a reference without its place": (
        "reference={micro_batch_size: 4}",
        "reference.path is not set",
        "reference.store",
    ),
    "references of one kind and several": ("reference.of=[{path: a}]", "reference.path is /", "reference.of"),
    "a reference among several that is nothing": (
        "reference={of: [{weight: 1}]}",
        "reference.of[0].path is not set",
        "store",
    ),
    "a reference among several that is two": (
        "reference={of: [{path: a, store: b}]}",
        "reference.of[0].store is b",
        "either",
    ),
    "a weight of no reference": (
        "reference={of: [{path: a, weight: -1}]}",
        "reference.of[0].weight is -1",
        "above 0",
    ),
    "an unknown setting of one of several": (
        "reference={of: [{paht: a}]}",
        "reference.of[0].paht is a",
        "Did you mean reference.of[0].path?",
    ),
    "an unknown model type": (
        "model.config.model_type=llamma",
        "model.config.model_type is llamma",
        "Did you mean llama?",
    ),
    "no model": ("model={config: {}}", "model.path is not set", "model.config"),
    "a model without its type": ("model={config: {hidden_size: 8}}", "model.config.model_type is not set", "llama"),
    "a vocabulary that is too small": ("model.config.vocab_size=10", "model.config.vocab_size is 10", "tokenizer"),
    "dropout": (
        "model.config.attention_dropout=0.1",
        "model.config.attention_dropout is 0.1",
        "objective=clm",
    ),
    "a range that ends where it begins": (
        "data.skip_samples=[[8, 8]]",
        "data.skip_samples is [[8, 8]]",
        "0 <= first < last",
    ),
    "a range before the first sample": (
        "data.skip_samples=[[-8, 8]]",
        "data.skip_samples is [[-8, 8]]",
        "0 <= first < last",
    ),
    "a range of three": ("data.skip_samples=[[0, 8, 9]]", "data.skip_samples[0] is [0, 8, 9]", "2 numbers"),
    "a range of one": ("data.skip_samples=[[8]]", "data.skip_samples[0] is [8]", "two numbers"),
    "a range in words": ("data.skip_samples=[[0, all]]", "data.skip_samples[0][1] is all", "whole number"),
    "a truth in a range": ("data.skip_samples=[[true, 8]]", "data.skip_samples[0][0] is true", "whole number"),
    "one range without its list": ("data.skip_samples=[0, 8]", "data.skip_samples[0] is 0", "a list of numbers"),
    "ranges longer than the run": ("data.skip_samples=[[0, 9999]]", "data.skip_samples", "9999"),
    "a spike below the average": ("training.spike_sigma=-1", "training.spike_sigma is -1", "0 or more"),
    "a spike in words": ("training.spike_sigma=high", "training.spike_sigma is high", "a number"),
    "a profile of no step": ("training.profile_steps=[0, 3]", "training.profile_steps is [0, 3]", "1 <= first"),
    "a profile that ends before it begins": (
        "training.profile_steps=[5, 3]",
        "training.profile_steps is [5, 3]",
        "first <= last",
    ),
    "a profile of one number": ("training.profile_steps=5", "training.profile_steps is 5", "a list of numbers"),
    "a check of fewer than no windows": ("reference.check_windows=-1", "reference.check_windows is -1", "0 or more"),
    "an override without a value": ("training.lr", "override is training.lr", "NAME=VALUE"),
    "a callback that is not there": ("callbacks=[nowhere:Found]", "callbacks is nowhere:Found", "cannot be imported"),
    "a callback without its class": ("callbacks=[{args: {a: 1}}]", "callbacks[0] is {'args': {'a': 1}}", "class"),
    "an unknown key of a callback": (
        "callbacks=[{class: 'a:B', arguments: {}}]",
        "callbacks[0] is {'class': 'a:B', 'arguments': {}}",
        "args",
    ),
    "a callback of one word": ("callbacks=nowhere", "callbacks is nowhere", "a list"),
} | SELECTION
"""Mistakes in settings, each with the setting and value of the error, and a word of its reason or remedy."""


@pytest.fixture(scope="module")
def answers(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Return exit status, standard error and run directory of every mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    commands, run_dirs = [], []
    for number, (override, _, _) in enumerate(SETTINGS.values()):
        run_dirs.append(folder / f"run{number}")
        config = write_config(folder / f"run{number}.yaml", config_tree(corpora, run_dirs[-1]))
        commands.append(["train", str(config), override])
    found = run_ranks(command_lines, 1, commands)[0]
    return {name: (*answer, path) for name, answer, path in zip(SETTINGS, found, run_dirs, strict=True)}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_wrong_setting_is_named(answers: dict[str, tuple[int, str, Path]], mistake: str) -> None:
    status, heard, run_dir = answers[mistake]
    _, setting, word = SETTINGS[mistake]
    assert any(line.startswith(setting) and word in line for line in sentences_of("train", status, heard)), heard
    assert not (run_dir / "metrics.jsonl").exists()


def test_several_mistakes_are_named_one_per_line(corpora: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    arguments = ["train", str(config), "training.lr=fast", "selection.ratio=2", "seeed=1"]
    named = [line.partition(" is ")[0] for line in sentences_of("train", *run_ranks(command_line, 1, *arguments)[0])]
    assert named == ["seeed", "training.lr", "selection.ratio"]


MODELS = {
    "an unknown attention": (["model.attn_implementation=fast"], "model.attn_implementation is fast"),
    "an attention that is not installed": (
        ["model.attn_implementation=flash_attention_2"],
        "attn_implementation is flash_attention_2",
    ),
    "weights of another shape": (["model={path: PATH, config: {intermediate_size: 48}}"], "have another shape"),
    "more layers than weights": (["model={path: PATH, config: {num_hidden_layers: 3}}"], "9 of the model's weights"),
    "no such ZeRO setting": (["deepspeed.zero_optimization.bucket=5"], "deepspeed.zero_optimization.bucket is 5"),
    "text for a ZeRO size": (
        ["deepspeed.zero_optimization.reduce_bucket_size=big"],
        "deepspeed.zero_optimization.reduce_bucket_size is big",
    ),
    "a family that ignores restarts": (
        ["model.config={model_type: bloom, hidden_size: 32, n_layer: 1, n_head: 2}", "data.reset_attention=true"],
        "data.reset_attention is true, but BloomForCausalLM",
    ),
    "a reference with fewer positions": (
        ["data.seq_length=128", "model.config.max_position_embeddings=128"],
        "the reference supports at most 64 positions",
    ),
}


@pytest.mark.parametrize("mistake", MODELS)
def test_a_model_that_cannot_be_made_is_named(corpora: Path, tmp_path: Path, mistake: str) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    overrides, expected = MODELS[mistake]
    path = str(corpora / "reference")
    assert expected in refused("train", str(config), *(override.replace("PATH", path) for override in overrides))


def test_a_score_of_another_shape_is_named(corpora: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    said = refused("train", str(config), "selection.score=tests.end_to_end.deadly:one_for_all")
    assert said.startswith("selection.score is") and "torch.float32 []" in said and "[2, 32]" in said


def test_a_score_that_reads_a_signal_that_it_does_not_need_is_named(corpora: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    said = refused("train", str(config), "selection.score=tests.end_to_end.deadly:reads_more_than_it_says")
    assert said.startswith("selection.score is") and "reads_more_than_it_says" in said and "'reference.loss'" in said


def test_a_score_that_is_not_a_number_is_logged_once_and_counted(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", train_tokens=3 * 8 * 32)
    tree["selection"] = {"score": "tests.end_to_end.deadly:not_a_number"}
    run_ranks(train_in_process, 2, tree)
    assert [record["selection/nan"] for record in records(tmp_path / "run")] == [256, 256, 256]
    log = (tmp_path / "run" / "log-rank0000.txt").read_text()
    assert log.count("selection.score is NaN for 256 tokens of this step") == 1


def test_bf16_without_partitioning_is_refused(corpora: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run", stage=0))
    assert "training.precision is bf16" in refused("train", str(config), "training.precision=bf16")


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    assert f"configuration is {path}, but it cannot be read (No such file" in refused("train", str(path))


def test_a_configuration_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: [1,")
    assert "is not YAML" in refused("train", str(tmp_path / "run.yaml"))


def truncate(folder: Path) -> None:
    tokens = folder / "web.bin"
    tokens.write_bytes(tokens.read_bytes()[:-8])


def garble(folder: Path) -> None:
    (folder / "web.idx").write_bytes(b"not an index" * 100)


def forget_description(folder: Path) -> None:
    (folder / "web.json").unlink()


def use_another_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "reference")
    shutil.copytree(folder / "other.tokenizer", folder / "reference")


def blend_another_tokenizer(folder: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"other{suffix}", folder / f"books{suffix}")


def truncate_weights(folder: Path) -> None:
    weights = folder / "reference" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate_weights, "it cannot be loaded (Error while deserializing"),
        (truncate, "web.bin"),
        (garble, "web.idx"),
        (forget_description, "web.json"),
        (use_another_tokenizer, "its tokenizer differs from that of data.train"),
        (blend_another_tokenizer, "different tokenizer"),
    ],
)
def test_a_damaged_input_is_named(corpora: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str) -> None:
    copy = tmp_path / "corpora"
    shutil.copytree(corpora, copy)
    damage(copy)
    config = write_config(tmp_path / "run.yaml", config_tree(copy, tmp_path / "run"))
    assert expected in refused("train", str(config))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt"}


@pytest.fixture(scope="module")
def finished(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(corpora, folder / "corpora")
    tree = config_tree(folder / "corpora", folder / "run", stage=0, train_tokens=2 * 8 * 32)
    run_ranks(train_in_process, 1, tree)
    return folder, tree


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lr=1.0e-2", "training.lr was 0.001 and is now 0.01"),
        ("seed=5", "seed was 1234 and is now 5"),
        ("data.order_tokens=99999", "data.order_tokens was 512 and is now 99999"),
        ("training.global_batch_size=16", "training.global_batch_size was 8 and is now 16"),
        ("deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.stage was 0 and is now 2"),
    ],
)
def test_a_run_directory_refuses_another_configuration(
    finished: tuple[Path, dict[str, Any]], override: str, expected: str
) -> None:
    folder, tree = finished
    before = snapshot(folder / "run")
    assert expected in refused("train", str(write_config(folder / "run.yaml", tree)), override)
    assert snapshot(folder / "run") == before


def test_a_rollback_to_a_missing_checkpoint_names_those_that_exist(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, tree = finished
    before = snapshot(folder / "run")
    config = str(write_config(folder / "run.yaml", tree))
    sentence = refused("train", config, "--rollback", "7")
    assert "--rollback is 7" in sentence and "Use one of 2." in sentence
    assert "there is no checkpoint" in refused("train", config, f"run_dir={tmp_path}/fresh", "--rollback", "2")
    assert snapshot(folder / "run") == before


def test_a_run_directory_refuses_other_tokens_under_the_same_name(finished: tuple[Path, dict[str, Any]]) -> None:
    from megatron_slm.prepare.prepare import prepare_corpus

    folder, tree = finished
    before = snapshot(folder / "run" / "checkpoints")
    for path in (folder / "corpora").glob("books.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = str(write_text(folder / "books.jsonl", 60, seed=99))
    prepare_corpus([text], str(folder / "corpora" / "books"), tokenizer=str(folder / "corpora" / "web.tokenizer"))
    assert "would change the order of samples" in refused("train", str(write_config(folder / "run.yaml", tree)))
    assert snapshot(folder / "run" / "checkpoints") == before


def test_a_run_directory_that_is_a_file_is_named(corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    assert "run_dir is" in refused("train", str(config))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_directory_that_is_a_link_to_nothing_is_named(corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    config = str(write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run")))
    for arguments in ((), ("--dry-run",)):
        sentence = refused("train", config, *arguments)
        assert f"a link to {tmp_path / 'gone'}, which does not exist" in sentence
    assert not (tmp_path / "gone").exists()


def test_a_folder_with_a_users_own_configuration_is_left_unchanged(corpora: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", config_tree(corpora, tmp_path))
    before = config.read_bytes()
    assert "its config.yaml was not written by a run" in refused("train", str(config))
    assert config.read_bytes() == before


def test_a_run_directory_in_use_is_refused(corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is training in it" in refused("train", str(config))


def test_a_start_that_failed_does_not_fix_the_configuration(corpora: Path, tmp_path: Path) -> None:
    """A start that failed after it made an empty metrics.jsonl does not fix the configuration."""
    tree = config_tree(corpora, tmp_path / "run", stage=0, train_tokens=8 * 32)
    run_ranks(train_in_process, 1, tree)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    tree["training"]["lr"] = 5.0e-3
    assert run_ranks(train_in_process, 1, tree)[0]["step"] == 1


def test_export_names_what_is_missing(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    assert "holds no config.yaml" in refused("export", str(tmp_path), str(tmp_path / "out"))
    run = str(finished[0] / "run")
    assert "--checkpoint is 7" in refused("export", run, str(tmp_path / "out"), "--checkpoint", "7")
    (tmp_path / "mine").mkdir()
    assert "already exists" in refused("export", run, str(tmp_path / "mine"))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "a link to" in refused("export", run, str(tmp_path / "link"))
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    status, heard = run_ranks(command_line_among, 1, launched, "export", run, str(tmp_path / "out"))[0]
    assert "number of ranks is 2" in sentence_of("export", status, heard)


def test_an_error_of_all_ranks_is_printed_once(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run") | {"reference": {"path": "/nowhere/model"}}
    config = str(write_config(tmp_path / "run.yaml", tree))
    (status, aloud), silent = run_ranks(command_line_among, 2, {"MASTER_PORT": free_port()}, "train", config)
    assert "reference.path is /nowhere/model" in sentence_of("train", status, aloud)
    assert silent[0] == 2 and "error" not in silent[1]
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == tree


def test_torchrun_shows_the_error_once_and_in_its_summary(corpora: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run")))
    ended = megatron_slm("train", config, "data.train=/nowhere/web", ranks=2)
    assert ended.returncode != 0
    said = ended.stderr.partition("error: ")[2].splitlines()[0]
    assert "/nowhere/web" in said and ended.stderr.count(f"megatron-slm train: error: {said}") == 1
    # torchrun's own summary comes last: it has the sentence too.
    assert said in ended.stderr.partition("Root Cause")[2]


def test_a_rank_that_fails_first_leaves_rank_0_the_time_to_print_the_error(corpora: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run")))
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\n"
        "from megatron_slm.__main__ import main\n"
        "time.sleep(1.5 if os.environ['RANK'] == '0' else 0)\n"
        "main(sys.argv[1:])\n"
    )
    command = [*TORCHRUN, "2", str(script), "train", config, "data.train=/nowhere/web"]
    said = in_a_process(command).stderr.partition("megatron-slm train: error: ")[2]
    assert "/nowhere/web" in said.partition("\n")[0]
