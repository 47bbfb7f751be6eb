"""--by: one corpus per value of a field, each document in exactly one of them."""

import json
import os
from pathlib import Path

import pytest

from megatron_slm.data.corpus import Corpus, open_corpus
from megatron_slm.prepare import staged
from megatron_slm.prepare.documents import Fields
from megatron_slm.prepare.inputs import find_files
from megatron_slm.prepare.prepare import Options, prepare_corpora, prepare_corpus, verify_corpus
from megatron_slm.prepare.staged import safe_name
from tests.refusal import refuses
from tests.texts import contents, sentence, write_jsonl

pytestmark = pytest.mark.usefixtures("in_this_process")

VALUES = ["wiki", "arXiv", "git hub/x", "Wiki", "", 7]


def write(path: Path, count: int = 300) -> Path:
    records = [{"text": sentence(i), "meta": {"source": VALUES[i % len(VALUES)]}} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(path: Path, output: Path, model: str, workers: int = 1) -> list[Corpus]:
    options = Options(tokenizer=model, fields=Fields(by="meta.source"), workers=workers)
    return prepare_corpora(find_files([str(path)]), str(output), options)


def test_two_workers_give_the_corpora_of_one(model, tmp_path, monkeypatch):
    path = write(tmp_path / "web.jsonl")
    alone = prepared(path, tmp_path / "alone" / "web", model)
    monkeypatch.undo()
    for one, other in zip(alone, prepared(path, tmp_path / "two" / "web", model, workers=2), strict=True):
        assert contents(Path(one.prefix)) == contents(Path(other.prefix))


def test_each_value_has_a_corpus_of_its_own_documents(model, tmp_path):
    path = write(tmp_path / "web.jsonl")
    corpora = prepared(path, tmp_path / "out" / "web", model)
    assert [corpus.name for corpus in corpora] == [
        "web-wiki", "web-arXiv", "web-git-hub-x", "web-Wiki-2", "web-unnamed", "web-7",
    ]  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 4 * len(VALUES)
    for place, corpus in enumerate(corpora):
        texts = [sentence(i) for i in range(place, 300, len(VALUES))]
        alone = write_jsonl(tmp_path / "alone.jsonl", texts)
        prepare_corpus([str(alone)], str(tmp_path / "alone" / str(place)), tokenizer=model)
        ours, theirs = contents(Path(corpus.prefix)), contents(tmp_path / "alone" / str(place))
        assert list(verify_corpus(corpus.prefix).sources) == [str(VALUES[place])]
        assert {k: v for k, v in ours.items() if k != ".json"} == {k: v for k, v in theirs.items() if k != ".json"}


@pytest.mark.parametrize("renames", [0, 2, 5, 9, 11])
def test_the_same_command_completes_an_interrupted_publication(model, tmp_path, monkeypatch, renames):
    path, done, real = write(tmp_path / "web.jsonl", 12), iter(range(renames)), os.replace

    def replace_until_killed(source, target):
        if Path(source).parent.name == "ready" and next(done, None) is None:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(path, tmp_path / "out" / "web", model)
    for described in (tmp_path / "out").glob("web*.json"):
        open_corpus(str(described.with_suffix("")))  # a corpus with a description is complete
    assert len(prepared(path, tmp_path / "out" / "web", model)) == len(VALUES)
    assert len(list((tmp_path / "out").iterdir())) == 4 * len(VALUES)


def test_an_existing_corpus_of_one_value_stops_the_command(model, tmp_path):
    (tmp_path / "web-arXiv.json").write_text("mine")
    with refuses("--output", tmp_path / "web-arXiv", r"web-arXiv\.json already exists"):
        prepared(write(tmp_path / "web.jsonl"), tmp_path / "web", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web-arXiv.json", "web.jsonl"]


def test_too_many_values_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "MAX_GROUPS", 5)
    with refuses("--by", "meta.source", "more than 5 values"):
        prepared(write(tmp_path / "web.jsonl"), tmp_path / "out" / "web", model)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_value_becomes_a_short_unique_file_name():
    assert safe_name("web", "../../etc/passwd", []) == "web-etc-passwd"
    assert safe_name("web", "日本 語", []) == "web-日本-語"
    assert safe_name("web", "x" * 1000, []) == "web-" + "x" * 50
    assert safe_name("web", "a b", ["web-A-B", "web-a-b-2"]) == "web-a-b-3"
