"""--end-token: a piece that ends documents in place of the one that ends the turns of a chat model."""

import json
from pathlib import Path

import pytest

from megatron_slm.__main__ import main
from megatron_slm.build.corpora import Corpora, open_corpora, require_tokenizer
from megatron_slm.config import parse_config
from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.errors import UserError
from megatron_slm.prepare.merge import merge_corpora
from megatron_slm.prepare.prepare import verify_corpus
from tests.refusal import refuses
from tests.runs import config_tree
from tests.texts import open_tokens, sentence, write_jsonl
from tests.tokenizer_folders import CHAT, SPECIAL, byte_level, write_tokenizer
from tests.unit.test_prepare_merge_adopt import megatron_corpus

pytestmark = pytest.mark.usefixtures("in_this_process")

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with models of one vocabulary; the end token ends turns in `chat`, and documents in `base`."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_level(special=[END, *SPECIAL[1:]])
    write_tokenizer(folder / "chat", tokenizer, eos_token="<|im_end|>", chat_template=CHAT)
    write_tokenizer(folder / "base", tokenizer, eos_token=END)
    write_tokenizer(folder / "open", tokenizer, eos_token=None)
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """Return a working folder with a text and links to the models."""
    monkeypatch.chdir(tmp_path)
    for name in ("chat", "base", "open"):
        (tmp_path / name).symlink_to(models / name)
    write_jsonl(tmp_path / "web.jsonl", [sentence(i) for i in range(5)])
    return tmp_path


def prepare(output: str, tokenizer: str, *options: str) -> None:
    main(["prepare", "--input", "web.jsonl", "--tokenizer", tokenizer, "--output", output, *options])


def opened(train: str) -> Corpora:
    tree = config_tree(Path(), Path("run"))
    tree["data"] |= {"train": train, "valid": {"held_out": train}}
    return open_corpora(parse_config(tree).data)


@pytest.mark.parametrize("tokenizer", ["chat", "open"])
def test_the_chosen_piece_ends_every_document_and_is_the_end_token_of_the_corpus(tokenizer, here):
    prepare("web", tokenizer, "--end-token", END)
    tokens = open_tokens(open_corpus("web"))
    assert {int(tokens[i][-1]) for i in range(len(tokens))} == {0}
    assert load_tokenizer("web.tokenizer").eos_token == opened("web").tokenizer.eos_token == END
    verify_corpus("web")


@pytest.mark.parametrize("given", ["chat", "first.tokenizer"])
def test_models_with_any_end_token_are_accepted(given, here):
    prepare("first", "chat", "--end-token", END)
    prepare("web", given, *(["--end-token", END] if given == "chat" else []))
    corpora = opened("web")
    for name in ("chat", "base", "open"):
        require_tokenizer(name, "model", corpora)


def test_a_model_with_another_end_token_is_refused_where_none_was_chosen(here):
    prepare("web", "base")
    with pytest.raises(UserError, match=r"differs from that of data\.train") as caught:
        require_tokenizer("chat", "model", opened("web"))
    assert (caught.value.setting, caught.value.value) == ("model.path", "chat")


def test_a_model_without_that_piece_is_refused(here):
    prepare("web", "chat", "--end-token", END)
    write_tokenizer(here / "other", byte_level(special=SPECIAL))
    with pytest.raises(UserError) as caught:
        require_tokenizer("other", "model", opened("web"))
    assert (caught.value.setting, caught.value.value) == ("model.path", "other") and END in caught.value.reason


def test_corpora_with_the_same_end_can_be_merged_and_keep_the_choice(here):
    prepare("a", "base")
    prepare("b", "chat", "--end-token", END)
    prepare("c", "chat")
    merge_corpora(["a", "b"], "ab")
    for name in ("chat", "base"):
        require_tokenizer(name, "model", opened("ab"))
    with refuses("--merge", None, "different tokenizer"):
        merge_corpora(["b", "c"], "bc")


def test_adopted_files_may_end_with_a_chosen_piece(here, caplog):
    megatron_corpus(here / "old", [[[5, 0]], [[6, 0]]])
    main(["prepare", "--adopt", "old", "--tokenizer", "chat", "--end-token", END])
    assert "of the documents end with" not in caplog.text
    require_tokenizer("chat", "reference", opened("old"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--tokenizer", "chat", "--end-token", "<|stop|>"],
            "--end-token is <|stop|>, but it is not a piece of the tokenizer chat",
        ),
        (["--tokenizer", "chat", "--end-token", "rise over run"], "but it is not a piece"),
        (["--tokenizer", "chat", "--end-token", ""], "--end-token is '', but it is empty"),
        (["--tokenizer", "open"], "tokenizer is open, but it has no end token"),
        (["--train-tokenizer", "300", "--end-token", END], "it does not apply to --train-tokenizer"),
    ],
)
def test_pieces_that_cannot_end_documents_are_refused(options, sentence, here, capsys):
    with pytest.raises(SystemExit) as end:
        main(["prepare", "--input", "web.jsonl", "--output", "web", *options])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(here.glob("*web.*json")) and not (here / ".web.preparing").exists()


def test_an_attempt_is_not_resumed_with_another_end(here, capsys, monkeypatch):
    monkeypatch.setattr("megatron_slm.prepare.inputs._CHUNK_BYTES", 100)
    (here / "bad.jsonl").write_text("{bad\n")
    for options, said in (([], "not valid JSON"), (["--end-token", END], f'--end-token was null and is "{END}"')):
        with pytest.raises(SystemExit):
            prepare("out", "base", "--input", "web.jsonl", "bad.jsonl", *options)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokenizer", "options", "warned"),
    [
        ("chat", [], True),
        ("chat", ["--end-token", END], False),
        ("chat", ["--format", "messages"], False),
        ("base", [], False),
    ],
)
def test_ending_documents_with_the_end_of_a_turn_gives_a_warning(tokenizer, options, warned, here, caplog):
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    (here / "web.jsonl").write_text(json.dumps({"text": sentence(1), "messages": turns}) + "\n")
    with caplog.at_level("WARNING", "megatron_slm"):
        prepare("web", tokenizer, *options)
    assert ("<|im_end|> ends turns" in caplog.text and END in caplog.text) == warned
