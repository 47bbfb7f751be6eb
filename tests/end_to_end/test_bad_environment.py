"""Faults of machines, launchers and files. Each ends with an error, exit status 2, and nothing lost."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.__main__ import main
from megatron_slm.dist import World
from megatron_slm.errors import AgreedError
from tests.end_to_end.test_bad_input import command_line, command_line_among, refused, sentence_of, snapshot
from tests.gloo import RankError, run_ranks
from tests.runs import config_tree, megatron_slm, records, train_in_process, write_config


def refused_among(environment: dict[str, str], *arguments: str) -> str:
    """Run a command that fails as a launcher that sets these variables would, and return its errors."""
    return sentence_of(arguments[0], *run_ranks(command_line_among, 1, environment, *arguments)[0])


@pytest.fixture
def busy_port() -> Iterator[str]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield str(holder.getsockname()[1])


LAUNCHES = {
    "a rank in words": ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is first"),
    "ranks in words": ({"RANK": "0", "WORLD_SIZE": "all"}, "WORLD_SIZE is all"),
    "a rank beyond the last": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
    "a place in words": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK is x"),
    "no such host": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host.invalid"},
        "MASTER_ADDR is host.invalid",
    ),
}


@pytest.mark.parametrize("mistake", LAUNCHES)
def test_a_wrong_launch_is_named(corpora: Path, tmp_path: Path, mistake: str) -> None:
    environment, expected = LAUNCHES[mistake]
    tree = config_tree(corpora, tmp_path / "run", timeout_minutes=0.01)
    config = write_config(tmp_path / "run.yaml", tree)
    assert expected in refused_among(environment, "train", str(config))
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(corpora: Path, tmp_path: Path, busy_port: str) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": busy_port}
    assert f"MASTER_PORT {busy_port}" in refused_among(environment, "train", str(config))


CONFIGURATIONS = {
    "nothing": (b"", "it has no settings"),
    "a list": (b"- a\n- b\n", "it has no settings"),
    "bytes of another encoding": (b"run_dir: caf\xe9\n", "is not YAML"),
    "a tab": (b"run_dir:\n\tx: 1\n", "is not YAML"),
    "a Python object": (b"run_dir: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    "no settings that are needed": (b"run_dir: x\n", "model is not set"),
}


@pytest.mark.parametrize("mistake", CONFIGURATIONS)
def test_a_file_that_is_not_a_configuration_is_named(tmp_path: Path, mistake: str) -> None:
    content, expected = CONFIGURATIONS[mistake]
    (tmp_path / "run.yaml").write_bytes(content)
    assert expected in refused("train", str(tmp_path / "run.yaml"))


def test_a_folder_in_place_of_a_configuration_is_named(tmp_path: Path) -> None:
    assert "cannot be read (Is a directory)" in refused("train", str(tmp_path))


def no_tokenizer(folder: Path) -> None:
    for path in (folder / "reference").glob("token*"):
        path.unlink()


def garbled_tokenizer(folder: Path) -> None:
    (folder / "web.tokenizer" / "tokenizer.json").write_text("{")


def garbled_model_configuration(folder: Path) -> None:
    (folder / "reference" / "config.json").write_text("{")


def pickled_weights(folder: Path) -> None:
    weights = folder / "reference" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))


def file_for_a_model(folder: Path) -> None:
    shutil.rmtree(folder / "reference")
    (folder / "reference").write_text("weights")


def another_format(folder: Path) -> None:
    description = folder / "web.json"
    described = json.loads(description.read_text())
    assert "format_version" in described
    description.write_text(json.dumps(described | {"format_version": 9}))


DAMAGES = {
    "a reference without its tokenizer": (no_tokenizer, "its tokenizer cannot be used"),
    "a tokenizer that is no JSON": (garbled_tokenizer, "web.tokenizer"),
    "a model whose configuration is no JSON": (garbled_model_configuration, "reference.path is"),
    "weights in a pickle": (pickled_weights, "it holds no *.safetensors"),
    "a file in place of a model": (file_for_a_model, "reference.path is"),
    "a corpus of another format": (another_format, "has format version 9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named(corpora: Path, tmp_path: Path, damage: str) -> None:
    harm, expected = DAMAGES[damage]
    shutil.copytree(corpora, tmp_path / "corpora")
    harm(tmp_path / "corpora")
    config = write_config(tmp_path / "run.yaml", config_tree(tmp_path / "corpora", tmp_path / "run"))
    assert expected in refused("train", str(config))


@pytest.fixture(scope="module")
def finished(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the directory of a run of two steps, and its configuration."""
    folder = tmp_path_factory.mktemp("finished")
    tree = config_tree(corpora, folder / "run", train_tokens=2 * 8 * 32)
    run_ranks(train_in_process, 1, tree)
    return folder / "run", tree


def garble(name: str) -> Callable[[Path], None]:
    return lambda run_dir: (run_dir / name).write_text("{ this is not what was written\n") and None  # type: ignore[return-value]


def lose(name: str) -> Callable[[Path], None]:
    return lambda run_dir: (run_dir / name).unlink()


FOLDERS = {
    "a garbled environment.json": (garble("environment.json"), "environment.json cannot be read"),
    "a garbled metrics.jsonl": (garble("metrics.jsonl"), "metrics.jsonl in it has a line that is not a record"),
    "a garbled config.yaml": (garble("config.yaml"), "its config.yaml was not written by a run"),
    "a lost config.yaml": (lose("config.yaml"), "its config.yaml is missing"),
    "a lost part of the only checkpoint": (
        lose("checkpoints/step_00000002/progress.json"),
        "none of its checkpoints is complete",
    ),
    "a garbled manifest": (garble("checkpoints/step_00000002/manifest.json"), "none of its checkpoints is complete"),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_damaged_run_directory_is_named_and_left_unchanged(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    harm, expected = FOLDERS[damage]
    shutil.copytree(finished[0], tmp_path / "run")
    harm(tmp_path / "run")
    before = snapshot(tmp_path / "run" / "checkpoints") | snapshot(tmp_path / "run" / "tensorboard")
    config = write_config(tmp_path / "run.yaml", finished[1] | {"run_dir": str(tmp_path / "run")})
    assert expected in refused("train", str(config))
    assert before.items() <= snapshot(tmp_path / "run").items()


def sentence_on_a_rank(world: World, tree: dict[str, Any]) -> str:
    with pytest.raises(AgreedError) as caught:
        train_in_process(world, tree)
    return str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "spikes.jsonl"])
def test_garbled_records_that_rank_0_finds_stop_every_rank(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # of one rank
    garble(name)(tmp_path / "run")
    tree = finished[1] | {"run_dir": str(tmp_path / "run")}
    said = run_ranks(sentence_on_a_rank, 2, tree)
    assert said[0] == said[1] and f"{name} in it has a line that is not a record" in said[0]


def train_on_a_full_disk(world: World, tree: dict[str, Any], config: str) -> tuple[int, str]:
    """Train while the disk fills as records are written."""
    from megatron_slm.training import callbacks

    def full(_: object) -> dict[str, float | int | None]:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    callbacks.finite = full
    return command_line(world, "train", config)


def test_a_disk_that_is_full_is_named_and_what_was_saved_stays(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    tree = finished[1] | {"run_dir": str(tmp_path / "run")}
    tree["training"] = tree["training"] | {"train_tokens": 4 * 8 * 32}
    before = snapshot(tmp_path / "run" / "checkpoints")
    config = str(write_config(tmp_path / "run.yaml", tree))
    answer = run_ranks(train_on_a_full_disk, 1, tree, config)[0]
    assert "No space left on device at metrics.jsonl" in sentence_of("train", *answer)
    assert snapshot(tmp_path / "run" / "checkpoints") == before
    run_ranks(train_in_process, 1, tree)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "/dev/null/run"])
def test_a_place_that_cannot_be_written_is_named(corpora: Path, tmp_path: Path, place: str) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, Path(place)))
    assert f"run_dir is {place}, but it cannot be used" in refused("train", str(config))


def test_a_cache_that_is_a_file_is_named(corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    assert "data.cache" in refused("train", str(config), f"data.cache={tmp_path / 'cache'}")
    assert (tmp_path / "cache").read_text() == "mine"


def test_one_process_trains_without_a_launcher_a_home_or_a_locale(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", stage=0, train_tokens=8 * 32)
    config = write_config(tmp_path / "run.yaml", tree)
    ended = megatron_slm("train", str(config), HOME="/nonexistent", LC_ALL="C", LANG="", TRITON_CACHE_DIR="")
    assert ended.returncode == 0, ended.stderr
    assert [record["step"] for record in records(tmp_path / "run")] == [1]


def test_another_number_of_ranks_is_refused_where_the_optimizer_is_partitioned(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    before = snapshot(tmp_path / "run" / "checkpoints")
    with pytest.raises(RankError, match=r"checkpoint is .* written by 1 ranks, this run has 2.* Start 1 ranks"):
        run_ranks(train_in_process, 2, finished[1] | {"run_dir": str(tmp_path / "run")})
    assert snapshot(tmp_path / "run" / "checkpoints") == before


def test_an_interrupt_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_slm.commands.prepare.run", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["prepare", "--output", "web"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "megatron-slm prepare: interrupted; files that were saved before are unchanged.\n"
