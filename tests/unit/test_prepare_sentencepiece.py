"""Corpora of sentencepiece models: they hold the ids that sentencepiece gives, or are not made."""

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_slm.prepare.prepare import prepare_corpus, verify_corpus
from tests.refusal import refuses
from tests.texts import open_tokens, write_jsonl
from tests.unit.test_tokenizer import ODD, TEXTS, train_sentencepiece

pytestmark = pytest.mark.usefixtures("in_this_process")

TIED = "z" * 7  # as z zz zz zz: float32 sums of scores depend on their order, float64 sums do not


@pytest.fixture
def unigram(tmp_path) -> Path:
    """Return a model in which some texts have several segmentations of equal score."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    path = train_sentencepiece(tmp_path / "unigram.model", model_type="unigram", vocab_size=300)
    proto = ModelProto.FromString(path.read_bytes())
    for piece, score in (("z", -3.3), ("zz", -5.1)):
        proto.pieces.add(piece=piece, score=score, type=1)
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_corpus_of_a_unigram_model_has_the_ids_of_sentencepiece(unigram, tmp_path, caplog):
    texts = [*filter(str.strip, ODD), *TEXTS[:20]]
    path = write_jsonl(tmp_path / "web.jsonl", texts)
    with caplog.at_level("INFO", "megatron_slm"):
        corpus = prepare_corpus([str(path)], str(tmp_path / "web"), tokenizer=str(unigram))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(unigram))
    tokens = open_tokens(corpus)
    assert [tokens[i].tolist() for i in range(len(tokens))] == [[*theirs.encode_as_ids(t), 2] for t in texts]
    compared = sum(len(text[:2000]) for text in texts[:16])
    assert f"gives the same ids as sentencepiece in 16 documents of the input ({compared} characters)" in caplog.text
    verify_corpus(corpus.prefix)


@pytest.mark.parametrize("first", ["plain", None], ids=["second-file", "after-a-bad-line"])
def test_a_difference_in_the_first_documents_of_an_input_is_an_error(unigram, tmp_path, first):
    write_jsonl(tmp_path / "a.jsonl", ["plain"])
    lines = [json.dumps({"text": first}), json.dumps({"text": f"{TIED} of a line"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    with refuses("tokenizer", unigram, r"gives other ids .* in .*b\.jsonl:2, from character \d \('z+ of"):
        prepare_corpus(inputs, str(tmp_path / "out" / "web"), tokenizer=str(unigram))
    assert not list((tmp_path / "out").iterdir())
