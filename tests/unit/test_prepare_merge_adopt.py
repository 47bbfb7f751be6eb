"""Existing corpora: merging shards, and adopting Megatron's own files in place."""

import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.prepare.adopt import adopt_corpus
from megatron_slm.prepare.inputs import find_files
from megatron_slm.prepare.merge import merge_corpora
from megatron_slm.prepare.prepare import Options, prepare_corpora, prepare_corpus, verify_corpus
from tests.refusal import refuses
from tests.texts import contents, sentence, write_jsonl

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory) -> Path:
    """Return a folder with corpora `a`, `b` and `c` of one jsonl file each, and `whole` of all three."""
    folder = tmp_path_factory.mktemp("shards")
    for number, name in enumerate("abc"):
        records = [{"text": sentence(50 * number + i), "source": name if i % 2 else "all"} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "{bad\n")
    files = [str(folder / f"{name}.jsonl") for name in "abc"]
    for inputs, name in ((files, "whole"), *(([file], Path(file).stem) for file in files)):
        prepare_corpora(find_files(inputs), str(folder / name), Options(tokenizer=model, skip_bad=3))
    return folder


def megatron_corpus(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """Write a corpus with Megatron's own tools, from documents of sequences of ids."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.tensor([*chain(*sequences)]), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def encoded(model: str, texts: list[str], end: bool = True) -> list[list[list[int]]]:
    tokenizer = load_tokenizer(model)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[document + [tokenizer.eos_token_id] * end] for document in ids]


def test_merged_shards_equal_one_preparation_of_all_files(shards, tmp_path):
    merge_corpora([str(shards / name) for name in "abc"], str(tmp_path / "merged"))
    assert contents(tmp_path / "merged") == contents(shards / "whole")
    corpus = verify_corpus(str(tmp_path / "merged"))
    assert corpus.skipped == 3
    assert corpus.sources["all"]["documents"] == 60


@pytest.mark.parametrize(("suffix", "place"), [(".bin", 0), (".idx", 34)])
def test_a_changed_shard_is_found_and_nothing_is_merged(suffix, place, model, tmp_path):
    """Change the tokens, or the lengths after the header of 34 bytes."""
    for name in "ab":
        prepare_corpus([str(write_jsonl(tmp_path / "x.jsonl", [sentence(3)]))], str(tmp_path / name), tokenizer=model)
    with open(tmp_path / f"b{suffix}", "r+b") as stream:
        stream.seek(place)
        stream.write(b"\x07\x00")
    with refuses("corpus", tmp_path / "b", rf"b\{suffix} has changed"):
        merge_corpora([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out" / "merged"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("renames", range(4))
def test_the_same_command_completes_an_interrupted_merge(shards, tmp_path, monkeypatch, renames):
    done, real = iter(range(renames)), os.replace

    def replace_until_killed(source, target):
        if Path(source).parent.name == "ready" and next(done, None) is None:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_killed)
        with pytest.raises(KeyboardInterrupt):
            merge_corpora([str(shards / name) for name in "abc"], str(tmp_path / "merged"))
    merge_corpora([str(shards / name) for name in "abc"], str(tmp_path / "merged"))
    assert contents(tmp_path / "merged") == contents(shards / "whole")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_megatron_corpus_is_described_and_not_changed(model, tmp_path, dtype, caplog):
    texts = [sentence(i) + " 日本 🙂" for i in range(30)]
    prefix = megatron_corpus(tmp_path / "old", encoded(model, texts), dtype)
    before = {suffix: Path(f"{prefix}{suffix}").stat() for suffix in (".bin", ".idx")}
    with caplog.at_level("WARNING", "megatron_slm"):
        corpus = adopt_corpus(str(prefix), model)
    assert not caplog.text
    assert (corpus.num_documents, corpus.num_bytes) == (30, sum(len(text.encode()) for text in texts))
    assert {suffix: Path(f"{prefix}{suffix}").stat() for suffix in before} | before == before
    assert verify_corpus(str(prefix)) == corpus
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.bin", "old.idx", "old.json", "old.tokenizer"]


def test_an_adopted_corpus_equals_the_prepared_one(model, tmp_path):
    texts = [sentence(i) for i in range(30)]
    prepare_corpus([str(write_jsonl(tmp_path / "web.jsonl", texts))], str(tmp_path / "web"), tokenizer=model)
    adopt_corpus(str(megatron_corpus(tmp_path / "old", encoded(model, texts))), model)
    assert contents(tmp_path / "old") == contents(tmp_path / "web")


def test_the_share_of_documents_with_an_end_token_is_logged(model, tmp_path, caplog):
    documents = encoded(model, [sentence(i) for i in range(3)]) + encoded(model, [sentence(9)], end=False)
    with caplog.at_level("WARNING", "megatron_slm"):
        adopt_corpus(str(megatron_corpus(tmp_path / "old", documents)), model)
    assert "only 75.0 % of the documents end with '</s>'" in caplog.text


def test_many_documents_are_scanned_block_by_block(model, tmp_path, monkeypatch):
    from megatron_slm.data import corpus as index
    from megatron_slm.prepare import adopt

    monkeypatch.setattr(adopt, "_BLOCK_TOKENS", 50)
    monkeypatch.setattr(index, "_BLOCK", 7)
    texts = [sentence(i, 1 + i) for i in range(40)]
    corpus = adopt_corpus(str(megatron_corpus(tmp_path / "old", encoded(model, texts))), model)
    assert corpus.num_bytes == sum(len(text.encode()) for text in texts)
    assert open_corpus(str(tmp_path / "old")) == corpus
