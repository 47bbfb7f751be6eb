"""Killed preparations: they resume from the journal and give the same bytes, whenever they are killed."""

import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_slm.errors import UserError
from megatron_slm.io.staging import Staging
from megatron_slm.prepare import inputs, prepare, staged
from megatron_slm.prepare.documents import Fields
from megatron_slm.prepare.inputs import InputFile, find_files
from megatron_slm.prepare.prepare import Options, prepare_corpora
from megatron_slm.prepare.staged import StagedCorpus
from tests.texts import sentence

FILES = 5
ONCE = " ".join(f"only{i}" for i in range(15))  # in the second file and nowhere else


class KilledError(BaseException):
    """A stand-in for SIGKILL: nothing is cleaned up."""


@pytest.fixture
def web(tmp_path) -> Path:
    folder = tmp_path / "web"
    folder.mkdir()
    for number in range(FILES):
        records = [{"text": sentence(1000 * number + i, 30), "source": ("a", "b")[i % 2]} for i in range(20 * number)]
        lines = [json.dumps(record) + "\n" for record in records]
        if number == 1:
            lines[7] = json.dumps({"text": ONCE, "source": "a"}) + "\n"
        (folder / f"{number}.jsonl").write_text("".join([*lines[:5], "{bad\n", *lines[5:]]))
    return folder


@pytest.fixture
def evaluation(tmp_path) -> str:
    path = tmp_path / "evaluation.jsonl"
    texts = [ONCE, sentence(3002, 30), " ".join(map(str, range(20)))]
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(autouse=True)
def here_and_at_every_input(in_this_process, monkeypatch):
    """Encode in this process, and write the journal after every input, so that kills are reproducible."""
    monkeypatch.setattr(staged, "_COMMIT_SHARE", float("inf"))
    monkeypatch.setattr(inputs, "_CHUNK_BYTES", 2000)


def prepared(web: Path, output: Path, model: str, questions: str, **changes) -> None:
    settings = {"tokenizer": model, "fields": Fields(by="source"), "skip_bad": FILES, "evaluation": (questions,)}
    prepare_corpora(find_files([str(web)]), str(output), Options(**{**settings, **changes}))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_at(instant: int, monkeypatch, work) -> bool:
    """Kill ``work`` at its n-th write, flush or rename; return False if it has fewer."""
    left = iter(range(instant))
    alive, remove = [True], shutil.rmtree

    def dying(real):
        def call(*arguments):
            if next(left, None) is None:
                alive.clear()
                raise KilledError
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (StagedCorpus, "append"), (os, "truncate")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        patch.setattr("shutil.rmtree", lambda path, **options: remove(path, **options) if alive else None)
        try:
            work()
        except KilledError:
            return True
    return False


def test_a_kill_at_any_instant_does_not_change_the_result(web, evaluation, model, tmp_path, monkeypatch):
    prepared(web, tmp_path / "whole" / "web", model, evaluation)
    whole = everything(tmp_path / "whole")
    assert json.loads(whole["web.contamination.json"])["num_contaminated"] == 2
    assert json.loads(whole["web-a.json"])["skipped"] == FILES
    for instant in itertools.count(step=11):
        output = tmp_path / str(instant) / "web"
        work = functools.partial(prepared, web, output, model, evaluation)
        if not killed_at(instant, monkeypatch, work):
            break
        killed = killed_at(instant // 2, monkeypatch, work)  # kill it again, at another instant
        if killed:
            work()
        assert everything(output.parent) == whole, f"instant {instant}"
    assert instant > 100


def test_masks_survive_a_kill_at_any_instant(web, evaluation, model, tmp_path, monkeypatch):
    fields = Fields(by="source", format="prompt-completion", prompt="source", separator=": ", completion="text")
    prepared(web, tmp_path / "whole" / "web", model, evaluation, fields=fields)
    whole = everything(tmp_path / "whole")
    assert {"web-a.mask", "web-b.mask"} <= whole.keys()
    for instant in itertools.count(start=5, step=23):
        output = tmp_path / str(instant) / "web"
        work = functools.partial(prepared, web, output, model, evaluation, fields=fields)
        if not killed_at(instant, monkeypatch, work):
            break
        work()
        assert everything(output.parent) == whole, f"instant {instant}"
    assert instant > 100


def test_finished_files_are_not_read_again(web, evaluation, model, tmp_path, monkeypatch):
    bad = web / "3.jsonl"
    bad.write_text(bad.read_text() + "{bad\n")
    with pytest.raises(UserError) as caught:
        prepared(web, tmp_path / "out" / "web", model, evaluation, skip_bad=4)
    assert caught.value.value == f"{bad}:62" and "--skip-bad above 4" in caught.value.remedy
    bad.write_text(bad.read_text().removesuffix("{bad\n"))
    read = []
    real = InputFile.read
    monkeypatch.setattr(InputFile, "read", lambda self, fields: [read.append(self.path.name), real(self, fields)][1])  # type: ignore[func-returns-value]
    prepared(web, tmp_path / "out" / "web", model, evaluation)
    assert [name for name in read if name[0].isdigit()] == ["3.jsonl", "4.jsonl"]
    prepared(web, tmp_path / "whole" / "web", model, evaluation)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


@pytest.fixture
def left(web, evaluation, model, tmp_path) -> Path:
    """Return the output of an attempt that stopped in the last file."""
    last = web / "4.jsonl"
    good = last.read_text()
    last.write_text(good + "{bad\n")
    with pytest.raises(UserError):
        prepared(web, tmp_path / "out" / "web", model, evaluation)
    last.write_text(good)
    return tmp_path / "out" / "web"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fields": Fields(by="source", text="body")}, '--json-key was "text" and is "body"'),
        ({"fields": Fields(by="source", format="prompt-completion")}, '--format was "text" and is "prompt-completion"'),
        ({"fields": Fields()}, '--by was "source" and is null'),
        ({"fields": Fields(by="source", source="kind")}, "--source-key was"),
        ({"evaluation": ()}, "--contamination was"),
        ({"tokenizer": None, "train_size": 300}, "--train-tokenizer was null and is 300"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(changes, reason, left, web, evaluation, model):
    before = everything(left.parent)
    with pytest.raises(UserError) as caught:
        prepared(web, left, model, evaluation, **changes)
    assert (caught.value.setting, caught.value.value) == ("--output", left)
    assert reason in caught.value.reason and ".web.preparing" in caught.value.remedy
    assert everything(left.parent) == before


def test_a_finished_file_that_changed_is_refused(left, web, evaluation, model):
    (web / "1.jsonl").write_text("{}\n")
    before = everything(left.parent)
    with pytest.raises(UserError) as caught:
        prepared(web, left, model, evaluation)
    assert f"{web / '1.jsonl'} has changed" in caught.value.reason
    assert everything(left.parent) == before


def test_files_created_after_the_last_journal_are_not_published(left, web, evaluation, model, tmp_path):
    for name in ("ready/web-stray.bin", "web-stray.lengths"):
        (left.parent / ".web.preparing" / name).write_bytes(b"begun after the journal was written")
    prepared(web, left, model, evaluation)
    prepared(web, tmp_path / "whole" / "web", model, evaluation)
    assert everything(left.parent) == everything(tmp_path / "whole")


def test_a_kill_while_the_staging_folder_is_removed_does_no_harm(web, evaluation, model, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def killed_half_way(path: Path, ignore_errors: bool = False) -> None:
        remove(path / "ready")
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("shutil.rmtree", killed_half_way)
        prepared(web, tmp_path / "out" / "web", model, evaluation)
    with pytest.raises(UserError) as caught:
        prepared(web, tmp_path / "out" / "web", model, evaluation)
    assert "already exists" in caught.value.reason
    prepared(web, tmp_path / "whole" / "web", model, evaluation)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_file_in_place_of_a_finished_corpus_is_not_overwritten(web, evaluation, model, tmp_path, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Staging, "publish_beside", killed)
        prepared(web, tmp_path / "out" / "web", model, evaluation)
    (tmp_path / "out" / "web-a.bin").write_text("of somebody else")
    with pytest.raises(UserError) as caught:
        prepared(web, tmp_path / "out" / "web", model, evaluation)
    assert caught.value.setting == "--output" and "web-a.bin already exists" in caught.value.reason
    assert (tmp_path / "out" / "web-a.bin").read_text() == "of somebody else"


def test_renamed_inputs_are_refused(left, web, evaluation, model):
    (web / "0.jsonl").rename(web / "00.jsonl")
    with pytest.raises(UserError) as caught:
        prepared(web, left, model, evaluation)
    assert "--input was" in caught.value.reason and "00.jsonl" in caught.value.reason


def test_workers_and_skip_bad_may_change(left, web, evaluation, model, tmp_path):
    prepared(web, left, model, evaluation, workers=2, skip_bad=100)
    prepared(web, tmp_path / "whole" / "web", model, evaluation)
    assert everything(left.parent) == everything(tmp_path / "whole")


def test_a_trained_tokenizer_is_kept(web, evaluation, tmp_path, monkeypatch):
    changes = {"tokenizer": None, "train_size": 330}
    with monkeypatch.context() as patch:
        patch.setattr(StagedCorpus, "append", lambda *arguments: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            prepared(web, tmp_path / "out" / "web", "", evaluation, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "train_tokenizer", None)
        prepared(web, tmp_path / "out" / "web", "", evaluation, **changes)
    prepared(web, tmp_path / "whole" / "web", "", evaluation, **changes)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
