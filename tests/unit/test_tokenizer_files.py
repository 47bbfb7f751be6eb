"""Tokenizer files: tokenizer.json decides the ids, and different tokenizers are distinguished."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.build.corpora import Corpora, open_corpora, require_tokenizer
from megatron_slm.build.references import open_matching_store
from megatron_slm.config import parse_config
from megatron_slm.data.corpus import corpus_tokenizer_path, describe, open_corpus
from megatron_slm.data.tokenizer import PROBE_TEXTS, load_tokenizer, tokenizer_identity
from megatron_slm.errors import UserError
from megatron_slm.prepare.adopt import adopt_corpus
from megatron_slm.prepare.merge import merge_corpora
from megatron_slm.prepare.prepare import prepare_corpus, verify_corpus
from megatron_slm.prepare.staged import StagedCorpora
from megatron_slm.reference.store import Manifest
from tests.refusal import refuses
from tests.runs import config_tree
from tests.texts import open_tokens, sentence, write_jsonl
from tests.tokenizer_folders import CHAT, WORDS, byte_level, write_tokenizer
from tests.unit.test_prepare_merge_adopt import megatron_corpus

pytestmark = pytest.mark.usefixtures("in_this_process")

DIGITS = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
TEXT = "it's 12345678 don't\n\n  we'll </s> 2024"
REBUILT = ["GPT2Tokenizer", "Qwen2Tokenizer"]  # classes of transformers that bring a pre-tokenizer of their own


def ids_of(tokenizer, text: str = TEXT) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def ids_in_file(tokenizer, text: str = TEXT) -> list[int]:
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", [*REBUILT, "T5Tokenizer"])
def test_tokenizer_json_decides_the_ids_and_not_the_class(kind, tmp_path, caplog):
    file = byte_level()
    with caplog.at_level("INFO", "megatron_slm"):
        loaded = load_tokenizer(str(write_tokenizer(tmp_path, file, tokenizer_class=kind, chat_template=CHAT)))
    assert ids_of(loaded) == ids_in_file(file)
    assert len(loaded) == file.get_vocab_size()
    assert (loaded.eos_token, loaded.chat_template) == ("</s>", CHAT)
    assert [record.getMessage().count("its tokenizer.json") for record in caplog.records] == [1]


def test_special_tokens_that_only_the_class_names_are_kept_if_they_are_pieces(tmp_path):
    folder = write_tokenizer(tmp_path, byte_level(special=["<|endoftext|>"]), tokenizer_class="GPT2Tokenizer")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert load_tokenizer(str(folder)).eos_token_id == 0


def test_tokenizer_json_also_decides_for_a_hub_name(tmp_path):
    commit = "0" * 40
    file = byte_level()
    write_tokenizer(tmp_path / "models--a--b" / "snapshots" / commit, file, tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text(commit)
    program = """if True:
        import json, os, sys
        os.environ.update(HF_HUB_CACHE=sys.argv[1], HF_HUB_OFFLINE="1")
        from megatron_slm.data.tokenizer import load_tokenizer
        print(json.dumps(load_tokenizer("a/b").encode(sys.argv[2], split_special_tokens=True)))"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, tmp_path, TEXT], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ids_in_file(file)


@pytest.mark.parametrize("kind", REBUILT)
def test_a_corpus_holds_the_ids_of_tokenizer_json_and_auto_tokenizer_gives_the_same(kind, tmp_path):
    from transformers import AutoTokenizer

    file = byte_level()
    folder = write_tokenizer(tmp_path / "t", file, tokenizer_class=kind)
    path = write_jsonl(tmp_path / "web.jsonl", [TEXT, *PROBE_TEXTS])
    corpus = prepare_corpus([str(path)], str(tmp_path / "web"), tokenizer=str(folder))
    tokens = open_tokens(corpus)
    plain = AutoTokenizer.from_pretrained(corpus_tokenizer_path(corpus))
    for number, text in enumerate([TEXT, *PROBE_TEXTS]):
        assert tokens[number].tolist() == [*ids_in_file(file, text), 0] == [*ids_of(plain, text), 0]
    verify_corpus(corpus.prefix)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with corpora `a` and `b` of one tokenizer, and `c` of one that splits differently."""
    from tests.texts import encode_here

    folder = tmp_path_factory.mktemp("made")
    write_tokenizer(folder / "words", byte_level(WORDS))
    write_tokenizer(folder / "digits", byte_level(DIGITS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_slm.prepare.prepare.encode_chunks", encode_here)
        for name, tokenizer in (("a", "words"), ("b", "words"), ("c", "digits")):
            path = write_jsonl(folder / f"{name}.jsonl", [f"{sentence(i)} {i}{name}" for i in range(5)])
            prepare_corpus([str(path)], str(folder / name), tokenizer=str(folder / tokenizer))
    return folder


@pytest.fixture
def here(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "here")


def run_corpora(here: Path, train: str, valid: str) -> Corpora:
    tree = config_tree(here, here / "run")
    tree["data"] |= {"train": str(here / train), "valid": {"held_out": str(here / valid)}}
    return open_corpora(parse_config(tree).data)


def test_two_tokenizers_with_the_same_pieces_can_split_differently(made):
    words, digits = (tokenizer_identity(load_tokenizer(str(made / name))) for name in ("words", "digits"))
    assert words.fingerprint == digits.fingerprint
    assert words.difference(digits) == "they have the same pieces and split text differently"
    assert words.difference(tokenizer_identity(load_tokenizer(str(made / "a.tokenizer")))) is None


def test_a_run_requires_one_tokenizer_for_corpora_and_models(here):
    corpora = run_corpora(here, "a", "b")
    require_tokenizer(str(here / "words"), "model", corpora)
    require_tokenizer(str(here / "b.tokenizer"), "reference", corpora)
    with pytest.raises(UserError, match=r"reference\.path is .*digits.*split text differently"):
        require_tokenizer(str(here / "digits"), "reference", corpora)
    with pytest.raises(UserError, match=r"data\.valid\.held_out is .*split text differently"):
        run_corpora(here, "a", "c")


def test_corpora_that_split_differently_are_not_merged(here):
    merge_corpora([str(here / "a"), str(here / "b")], str(here / "ab"))
    assert open_corpus(str(here / "ab")).tokenizer == open_corpus(str(here / "a")).tokenizer
    with refuses("--merge", None, "different tokenizer than"):
        merge_corpora([str(here / "a"), str(here / "c")], str(here / "ac"))


def forget_probe(prefix: Path) -> None:
    """Rewrite a description in format version 1."""
    corpus = open_corpus(str(prefix))
    fields = json.loads(describe(dataclasses.replace(corpus, format_version=1)))
    del fields["tokenizer_probe"], fields["end_token"]
    Path(f"{prefix}.json").write_text(json.dumps(fields))


def test_corpora_of_format_version_1_are_identified_by_their_saved_tokenizer(here):
    for name in ("a", "b", "c"):
        forget_probe(here / name)
    verify_corpus(str(here / "a"))
    corpora = run_corpora(here, "a", "b")
    require_tokenizer(str(here / "words"), "model", corpora)
    with pytest.raises(UserError, match="split text differently"):
        require_tokenizer(str(here / "digits"), "model", corpora)
    merge_corpora([str(here / "a"), str(here / "b")], str(here / "ab"))
    assert open_corpus(str(here / "ab")).tokenizer_probe


def test_a_tokenizer_that_was_changed_in_its_corpus_is_found(here):
    byte_level(DIGITS).save(str(here / "a.tokenizer" / "tokenizer.json"))
    for work in (lambda: verify_corpus(str(here / "a")), lambda: run_corpora(here, "a", "b")):
        with refuses("corpus", None, r"a\.tokenizer is not the tokenizer that it was prepared with"):
            work()


def test_a_store_whose_tokenizer_splits_differently_is_refused(here):
    corpora = {name: run_corpora(here, name, name) for name in ("a", "c")}
    identity = corpora["a"].identity
    (here / "store").mkdir()
    for probe in (identity.probe, ""):
        manifest = Manifest(
            "document", ["loss"], "fixed16", 0.0, "", 32, False, "", identity.fingerprint, {}, [], tokenizer_probe=probe
        )
        (here / "store" / "manifest.json").write_text(manifest.text())
        open_matching_store(str(here / "store"), corpora["a"])
        if probe:
            with pytest.raises(UserError, match=r"reference\.store is .*split text differently"):
                open_matching_store(str(here / "store"), corpora["c"])
        else:
            open_matching_store(str(here / "store"), corpora["c"])  # stores of version 1 have no probe to compare


def test_a_preparation_is_not_resumed_with_a_tokenizer_that_splits_differently(here, monkeypatch):
    (here / "d.jsonl").write_text((here / "a.jsonl").read_text() + "{bad\n")
    inputs, output = [str(here / "a.jsonl"), str(here / "d.jsonl")], str(here / "out" / "web")
    monkeypatch.setattr(StagedCorpora, "commit", StagedCorpora.commit_now)
    monkeypatch.setattr("megatron_slm.prepare.inputs._CHUNK_BYTES", 100)
    with refuses("document", None, "not valid JSON"):
        prepare_corpus(inputs, output, tokenizer=str(here / "words"))
    (here / "d.jsonl").write_text((here / "a.jsonl").read_text())
    with refuses("--tokenizer", here / "digits", "splits text differently"):
        prepare_corpus(inputs, output, tokenizer=str(here / "digits"))
    assert prepare_corpus(inputs, output, tokenizer=str(here / "words")).num_documents == 10


def test_an_adopted_corpus_records_how_its_tokenizer_splits(here):
    megatron_corpus(here / "old", [[[5, 0]]])
    assert adopt_corpus(str(here / "old"), str(here / "digits")).tokenizer == open_corpus(str(here / "c")).tokenizer
