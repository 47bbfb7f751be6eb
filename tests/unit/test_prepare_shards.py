"""Preparation by shards: the merge equals one preparation, and names every shard that it lacks."""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm.__main__ import main
from megatron_slm.errors import UserError
from megatron_slm.io.shards import Shards, WorkShard, index_ranges, parse_shard
from megatron_slm.prepare import inputs, staged
from megatron_slm.prepare.documents import Fields
from megatron_slm.prepare.inputs import InputFile, find_files
from megatron_slm.prepare.prepare import Options, prepare_corpora
from megatron_slm.prepare.sharded import deal, merge_shards, prepare_shard
from tests.refusal import refuses
from tests.texts import sentence
from tests.unit.test_prepare_resume import everything, killed_at

SHARDS = 8
FILES = 11
ONCE = " ".join(f"only{i}" for i in range(15))


@pytest.fixture(autouse=True)
def here_and_at_every_input(in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in this process, and write the journal after every input, so that kills are reproducible."""
    monkeypatch.setattr(staged, "_COMMIT_SHARE", float("inf"))
    monkeypatch.setattr(inputs, "_CHUNK_BYTES", 2000)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files of different sizes; two hold no text, and one value of `source` is rare."""
    folder = tmp_path_factory.mktemp("web")
    for number in range(FILES):
        count = (0, 30, 7, 19, 0, 3, 44, 11, 25, 2, 8)[number]
        records = [{"text": sentence(100 * number + i, 30), "source": ("a b", "a-b")[i % 2]} for i in range(count)]
        if number == 7:
            records.append({"text": ONCE, "source": "c"})
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{number:02}.jsonl").write_text("".join([*lines, "{bad\n"]))
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("evaluation") / "test.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in (ONCE, sentence(605, 30), "few words")))
    return str(path)


def options(model: str, questions: str, **changes: Any) -> Options:
    settings = {"tokenizer": model, "fields": Fields(by="source"), "skip_bad": FILES, "evaluation": (questions,)}
    return Options(**{**settings, **changes})  # type: ignore[arg-type]


def published(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in everything(folder).items() if not name.startswith(".")}


@pytest.mark.parametrize("by", ["source", None])
def test_the_merge_of_eight_shards_of_which_two_were_killed_equals_one_preparation(
    web: Path, evaluation: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str | None
) -> None:
    chosen, output = options(model, evaluation, fields=Fields(by=by)), tmp_path / "shards" / "web"
    prepare_corpora(find_files([str(web)]), str(tmp_path / "whole" / "web"), chosen)
    work = [
        functools.partial(prepare_shard, find_files([str(web)]), str(output), chosen, WorkShard(index, SHARDS))
        for index in range(SHARDS)
    ]
    for index in (6, 3, 0, 5, 7, 2, 4):  # in any order, and shard 1 is not run
        if index in (2, 5):
            assert killed_at(9, monkeypatch, work[index])
        else:
            work[index]()
    with pytest.raises(UserError) as caught:
        merge_shards(str(output))
    found = [(error.setting, error.reason) for error in (caught.value, *caught.value.others)]
    assert [setting for setting, _ in found] == ["--merge"] * 3
    assert "1 of its 8 shards are missing: 1" in found[0][1]
    assert "shard 2/8 is unfinished" in found[1][1] and "shard 5/8 is unfinished" in found[2][1]
    assert "it last wrote at 20" in found[1][1]
    assert not published(output.parent)
    for index in (1, 2, 5):
        work[index]()
    before = everything(output.parent)
    work[3]()  # a finished shard is left as it is
    assert everything(output.parent) == before
    merge_shards(str(output))
    assert published(output.parent) == everything(tmp_path / "whole")
    assert {name: content for name, content in everything(output.parent).items() if name.startswith(".")} == before


def test_a_resumed_shard_does_not_encode_its_finished_inputs_again_and_its_progress_is_named(
    web: Path, evaluation: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, files = str(tmp_path / "web"), find_files([str(web)])
    shard = functools.partial(prepare_shard, files, output, options(model, evaluation), WorkShard(0, 2))
    prepare_shard(files, output, options(model, evaluation), WorkShard(1, 2))
    assert killed_at(60, monkeypatch, shard)
    with refuses("--merge", output, r"its shard 0/2 is unfinished: [1-9] of [4-8] inputs; it last wrote at .* 0 min"):
        merge_shards(output)
    read: list[str] = []
    real = InputFile.read
    with monkeypatch.context() as patch:
        patch.setattr(InputFile, "read", lambda self, fields: [read.append(self.path.name), real(self, fields)][1])  # type: ignore[func-returns-value]
        shard()
    assert "00.jsonl" not in read and any(name.endswith(".jsonl") and name[0] == "0" for name in read)
    assert merge_shards(output)


def finished(web: Path, evaluation: str, model: str, output: Path, count: int = 2) -> str:
    for index in range(count):
        prepare_shard(find_files([str(web)]), str(output), options(model, evaluation), WorkShard(index, count))
    return str(output)


@pytest.mark.parametrize(
    ("changes", "count", "reason"),
    [
        ({"fields": Fields(text="body")}, 2, '--json-key was "text" and is "body"'),
        ({"fields": Fields()}, 2, '--by was "source" and is null'),
        ({"evaluation": ()}, 2, "--contamination was"),
        ({}, 3, "number of shards was 2 and is 3"),
    ],
)
def test_a_shard_of_another_command_is_refused_and_nothing_is_lost(
    web: Path, evaluation: str, model: str, tmp_path: Path, changes: dict[str, Any], count: int, reason: str
) -> None:
    first = functools.partial(prepare_shard, find_files([str(web)]), str(tmp_path / "web"))
    first(options(model, evaluation), WorkShard(0, 2))
    before = everything(tmp_path)
    with refuses("--shard", f"1/{count}", reason):
        first(options(model, evaluation, **changes), WorkShard(1, count))
    assert everything(tmp_path) == before


def test_other_inputs_are_refused(web: Path, evaluation: str, model: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(web, tmp_path / "copy"))
    output = str(tmp_path / "out" / "web")
    prepare_shard(find_files([str(copy)]), output, options(model, evaluation), WorkShard(0, 2))
    (copy / "09.jsonl").write_text('{"text": "more", "source": "c"}\n')
    with refuses("--shard", "1/2", r"--input was .*09\.jsonl.* and is "):
        prepare_shard(find_files([str(copy)]), output, options(model, evaluation), WorkShard(1, 2))


def test_a_plan_without_finished_work_is_replaced(web: Path, evaluation: str, model: str, tmp_path: Path) -> None:
    folder = Shards(tmp_path / "web", "--output", "preparing")
    folder.begin(WorkShard(0, 5), {"--input": []})
    output = finished(web, evaluation, model, tmp_path / "web")
    assert merge_shards(output)


def test_the_merge_refuses_folders_of_other_commands(web: Path, evaluation: str, model: str, tmp_path: Path) -> None:
    output = finished(web, evaluation, model, tmp_path / "web")
    folder = tmp_path / ".web.shards"
    report = json.loads((folder / "1-of-2" / "shard.json").read_text())
    (folder / "1-of-2" / "shard.json").write_text(json.dumps(report | {"plan": "0"}))
    with refuses("--merge", output, "1-of-2 belongs to another command"):
        merge_shards(output)
    (folder / "1-of-2" / "shard.json").write_text(json.dumps(report))
    (folder / "2-of-3").mkdir()
    with refuses("--merge", output, "2-of-3 belongs to another command"):
        merge_shards(output)


def test_a_changed_shard_is_found_and_an_existing_corpus_is_not_overwritten(
    web: Path, evaluation: str, model: str, tmp_path: Path
) -> None:
    output = finished(web, evaluation, model, tmp_path / "web")
    tokens = next((tmp_path / ".web.shards" / "0-of-2").glob("*.bin"))
    content = tokens.read_bytes()
    tokens.write_bytes(bytes(2) + content[2:])
    with refuses("corpus", None, "has changed"):
        merge_shards(output)
    tokens.write_bytes(content)
    (tmp_path / "web-a-b.bin").write_text("of somebody else")
    with refuses("--output", None, "web-a-b.bin already exists"):
        merge_shards(output)
    assert set(published(tmp_path)) == {"web-a-b.bin"}


def test_shards_need_a_tokenizer_that_exists_and_an_input_each(web: Path, model: str, tmp_path: Path) -> None:
    files = find_files([str(web)])
    with refuses("--train-tokenizer", 330, "each shard would train another tokenizer"):
        prepare_shard(files, str(tmp_path / "web"), Options(train_size=330), WorkShard(0, 2))
    with refuses("--shard", "0/12", "only 11 inputs"):
        prepare_shard(files, str(tmp_path / "web"), Options(tokenizer=model), WorkShard(0, 12))
    with refuses("--merge", tmp_path / "web", "there are no shards"):
        merge_shards(str(tmp_path / "web"))
    assert not everything(tmp_path)


def test_the_commands_take_the_tasks_of_a_slurm_array(
    web: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["prepare", "--input", str(web), "--tokenizer", model, "--skip-bad", "11"]
    for task in (4, 5, 6):
        for name, value in {"ID": task, "MIN": 4, "MAX": 6, "COUNT": 3}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        main([*common, "--output", str(tmp_path / "web"), "--shard", "auto"])
    main(["prepare", "--merge", "--output", str(tmp_path / "web")])
    main([*common, "--output", str(tmp_path / "whole" / "web")])
    assert published(tmp_path / "whole") == {
        name: content for name, content in published(tmp_path).items() if not name.startswith("whole")
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3", "neither I/N nor auto"),
        ("-1/8", "neither I/N nor auto"),
        ("a/b", "neither I/N nor auto"),
        ("0/0", "there is no shard"),
        ("8/8", "count from 0"),
        ("auto", "SLURM_ARRAY_TASK_ID is not set"),
    ],
)
def test_bad_shards_are_refused(text: str, reason: str) -> None:
    with refuses("--shard", text, reason):
        parse_shard(text, {})


def test_auto_refuses_an_array_with_gaps() -> None:
    """These are tasks that are submitted again: the number of all shards is not among the variables."""
    variables = {"ID": "5", "MIN": "2", "MAX": "5", "COUNT": "2"}
    with refuses("--shard", "auto", "the number of shards is not known"):
        parse_shard("auto", {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()})


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40), st.data())
def test_inputs_are_dealt_once_each_in_order_and_in_about_equal_shares(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    dealt = deal([[str(number), size] for number, size in enumerate(sizes)], count)
    assert [number for part in dealt for number in part] == list(range(len(sizes)))
    assert all(dealt) and len(dealt) == count


def test_equal_inputs_are_dealt_equally_and_a_large_one_alone() -> None:
    assert sorted(len(part) for part in deal([["x"]] * 10, 4)) == [2, 2, 3, 3]
    assert [list(part) for part in deal([["a", 10], ["b", 1000], ["c", 10], ["d", 10]], 3)] == [[0], [1], [2, 3]]


def test_indices_are_shown_as_slurm_writes_them() -> None:
    assert index_ranges([0, 3, 4, 5, 9]) == "0,3-5,9"
    assert os.environ.get("SLURM_ARRAY_TASK_ID") is None
