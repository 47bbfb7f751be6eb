"""Tokenizers with gaps in their ids: the model has a row for each id that occurs."""

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.prepare.prepare import prepare_corpus
from tests.end_to_end.test_dry_run import shown
from tests.gloo import run_ranks
from tests.runs import LLAMA, config_tree, train_in_process, write_config
from tests.texts import open_tokens, sentence, write_jsonl
from tests.tokenizer_folders import byte_level, with_holes, write_tokenizer


@pytest.fixture
def tree(tmp_path: Path, in_this_process: None) -> dict[str, Any]:
    """A short run on a corpus that holds ids above the number of pieces."""
    folder = write_tokenizer(tmp_path / "tokenizer", with_holes(byte_level()))
    path = write_jsonl(tmp_path / "web.jsonl", [sentence(i) for i in range(60)])
    corpus = prepare_corpus([str(path)], str(tmp_path / "web"), tokenizer=str(folder))
    tokens = open_tokens(corpus)
    assert max(tokens[i].max() for i in range(len(tokens))) >= len(load_tokenizer(str(folder)))
    tree = config_tree(tmp_path, tmp_path / "run", train_tokens=8 * 32, backend="plain")
    tree["data"] |= {"train": corpus.prefix, "valid": {"web": corpus.prefix}}
    del tree["reference"], tree["deepspeed"]
    return tree | {"objective": "clm"}


def test_a_model_from_scratch_trains_with_the_vocabulary_of_the_dry_run(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["training"] |= {"precision": "fp32"}
    assert run_ranks(train_in_process, 1, tree)[0]["step"] == 1
    status, heard, said = run_ranks(shown, 1, "train", str(write_config(tmp_path / "run.yaml", tree)), "--dry-run")[0]
    assert status == 0, heard
    assert "one tokenizer of 976 entries" in said


def test_a_model_with_fewer_rows_than_the_largest_id_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["model"] = {"config": dict(LLAMA, vocab_size=700)}  # more than there are pieces
    answer = run_ranks(shown, 1, "train", str(write_config(tmp_path / "run.yaml", tree)), "--dry-run")[0]
    assert answer[0] == 2 and "model.config.vocab_size is 700" in answer[1] and "976 entries" in answer[1]
