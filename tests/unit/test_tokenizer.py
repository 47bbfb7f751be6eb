"""Tokenizers: training, agreement with sentencepiece, and fingerprints."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron_slm.data.sentencepiece_model import train_tokenizer
from megatron_slm.data.tokenizer import PROBE_TEXTS, load_tokenizer, tokenizer_fingerprint
from tests.refusal import refuses

PROSE = "the slope of a line is rise over run so if x = 3 then y = 12.5 and f(x) returns the area under curve"
WORDS = PROSE.split()
TEXTS = [
    " ".join(WORDS[(i * k + k * k) % len(WORDS)] for k in range(60)) + f"\n\n    if a[{i}] <= {i * 37}:\n\treturn {i}\n"
    for i in range(200)
]
ODD = [
    "",
    "plain",
    "  two leading, two trailing  ",
    "tabs\tand\r\nline ends\n\n\n",
    "日本語 🙂 e\u0301 \u00a0 ﬁ",
    "</s> <unk> <0x0A> <s>",
    "\x00\x07\x7f",
]


def train_sentencepiece(path: Path, **options) -> Path:
    model = io.BytesIO()
    lines = (line for text in TEXTS for line in text.split("\n"))
    options = {"vocab_size": 380, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    train_tokenizer(iter(TEXTS), 380, path)
    return path


@pytest.mark.parametrize("text", [*ODD, TEXTS[3]])
def test_decoding_gives_back_the_text_exactly(trained, text):
    tokenizer = load_tokenizer(str(trained))
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_trained_tokenizer_has_the_requested_size_and_an_end_token(trained):
    tokenizer = load_tokenizer(str(trained))
    assert len(tokenizer) == 380
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)


def test_the_same_texts_train_the_same_model_in_another_process_even_when_lines_are_drawn(tmp_path):
    program = """if True:
        import json, pathlib, sys
        from megatron_slm.data.sentencepiece_model import train_tokenizer
        train_tokenizer(json.load(sys.stdin), 300, pathlib.Path(sys.argv[1]), max_lines=150)"""
    train_tokenizer(iter(TEXTS), 300, tmp_path / "here", max_lines=150)
    subprocess.run([sys.executable, "-c", program, tmp_path / "there"], input=json.dumps(TEXTS), text=True, check=True)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    train_tokenizer(iter(TEXTS), 300, tmp_path / "other", max_lines=150, seed=2)
    assert (tmp_path / "here").read_bytes() != (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(("size", "reason"), [(50_000, r"at most \d+ pieces"), (100, r"need \d+ pieces")])
def test_the_error_for_a_vocabulary_that_does_not_fit_the_text_gives_a_size_that_does(tmp_path, size, reason):
    with refuses("--train-tokenizer", size, reason):
        train_tokenizer(iter(TEXTS), size, tmp_path / "model")


def test_training_on_no_text_is_refused(tmp_path):
    with refuses("--train-tokenizer", 300, "no text"):
        train_tokenizer(iter([]), 300, tmp_path / "model")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity"},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {"byte_fallback": False, "vocab_size": 200},
        {
            "user_defined_symbols": ["<math>", "\n"],
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        },
        {"model_type": "unigram", "vocab_size": 300},
        {"model_type": "unigram", "vocab_size": 300, "normalization_rule_name": "identity"},
        {
            "model_type": "unigram",
            "vocab_size": 300,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
        },
        {  # as of T5
            "model_type": "unigram",
            "vocab_size": 100,
            "byte_fallback": False,
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
        },
        {  # as of XLNet
            "model_type": "unigram",
            "vocab_size": 100,
            "byte_fallback": False,
            "control_symbols": ["<cls>", "<sep>"],
            "user_defined_symbols": ["<eop>", "<math>"],
        },
        {"model_type": "char", "vocab_size": 310},
        {"model_type": "char", "vocab_size": 60, "byte_fallback": False},
    ],
    ids=[
        *("default", "identity", "bare", "no-bytes", "symbols"),
        *("unigram", "unigram-identity", "unigram-bare", "unigram-t5", "unigram-xlnet", "char", "char-no-bytes"),
    ],
)
def test_a_sentencepiece_model_gives_the_ids_that_sentencepiece_gives(tmp_path, options):
    path = train_sentencepiece(tmp_path / "tokenizer.model.v1", **options)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(str(path))
    for text in [*ODD, *TEXTS, *PROBE_TEXTS, "a <math>x</math> b", "</s></s> <cls><eop> <0x00><0xFF>\u2581"]:
        ids = ours(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == theirs.encode_as_ids(text), text
    bos = theirs.bos_id()
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_id(), bos if bos >= 0 else None)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "word", "vocab_size": 25, "byte_fallback": False},
        {"treat_whitespace_as_suffix": True},
        {"model_type": "unigram", "vocab_size": 300, "treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["<math>"]},  # after a symbol, sentencepiece adds no space and a fast tokenizer does
        # A symbol that is only part of a text cannot be kept from being read in it.
        {"model_type": "unigram", "vocab_size": 300, "control_symbols": ["="]},
    ],
    ids=["word", "suffix", "unigram-suffix", "symbols-and-prefix", "short-control"],
)
def test_a_sentencepiece_model_whose_ids_would_change_is_refused(tmp_path, options):
    path = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    with refuses("tokenizer", path, "converted|fast form"):
        load_tokenizer(str(path))


def test_a_fingerprint_survives_saving_and_differs_for_another_tokenizer(trained, tmp_path):
    tokenizer = load_tokenizer(str(trained))
    tokenizer.save_pretrained(tmp_path / "saved")
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "saved"))) == fingerprint
    assert len(fingerprint) == 64
    tokenizer.add_tokens(["<extra>"])
    extended = tokenizer_fingerprint(tokenizer)
    tokenizer.eos_token = "<extra>"
    assert len({fingerprint, extended, tokenizer_fingerprint(tokenizer)}) == 3


def test_a_tokenizer_without_an_end_token_is_refused(trained, tmp_path):
    tokenizer = load_tokenizer(str(trained))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with refuses("tokenizer", tmp_path, "no end token"):
        load_tokenizer(str(tmp_path))


def test_files_that_are_not_tokenizers_are_refused(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a model")
    for path, reason in ((tmp_path / "broken.model", "not a sentencepiece model"), (tmp_path, "cannot be loaded")):
        with refuses("tokenizer", path, reason):
            load_tokenizer(str(path))
