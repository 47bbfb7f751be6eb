"""The tokens of prompts with completions and of chats that count, compared with brute force on bytes."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_slm.__main__ import main
from megatron_slm.data.corpus import Corpus, open_corpus, open_mask
from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.prepare import encoding
from megatron_slm.prepare.documents import Fields
from megatron_slm.prepare.inputs import find_files
from megatron_slm.prepare.merge import merge_corpora
from megatron_slm.prepare.prepare import Options, prepare_corpora, prepare_corpus, verify_corpus
from tests.refusal import refuses
from tests.texts import contents, open_tokens, sentence, write_jsonl
from tests.unit.test_prepare_bad_input import refused

pytestmark = pytest.mark.usefixtures("in_this_process")

CHATML = (
    "{% for m in messages %}{% if m['role'] == 'bot' or 'name' in m %}{{ raise_exception('no bots') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAIRS = [
    ("the slope of", " a line is 12.5"),
    ("", "the area under a curve"),
    ("the slope ", "of a line"),  # the token ' of' begins in the prompt
    ("日本 🙂 x =", "é 日本 🙂\n and"),
    ("x = 3", "🙂"),
    ("the </s> of a <|im_end|>", " </s> is text"),
    ("the slope of a line " * 5000, "is rise over run"),  # longer than a window of plain text
]
CHATS = [
    [
        ("system", "the area is x"),
        ("user", "rise?"),
        ("assistant", "over run é 🙂"),
        ("user", "y"),
        ("assistant", "12"),
    ],
    [("user", "日本 the slope"), ("assistant", " of a line"), ("user", "so the last word is the user's")],
]


def byte_level(folder: Path, end: str = "\n", template: str = CHATML) -> str:
    """Write a byte-level tokenizer like that of GPT-2, whose offsets exclude spaces, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator([sentence(i) for i in range(100)], trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    whole.chat_template = template.replace("END", repr(end))
    whole.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory) -> str:
    return byte_level(tmp_path_factory.mktemp("chat"))


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    lines = [
        json.dumps({"question": q, "meta": {"answer": a, "source": f"s{i % 2}"}}) for i, (q, a) in enumerate(pairs)
    ]
    path.write_text("".join(line + "\n" for line in lines) + "\n")
    return path


def write_chats(path: Path, chats: list[list[tuple[str, str]]]) -> Path:
    records = [{"messages": [{"role": r, "content": c, "name": None} for r, c in chat]} for chat in chats]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(path: Path, output: Path, tokenizer: str, workers: int = 1, **fields: str) -> Corpus:
    options = Options(tokenizer=tokenizer, fields=Fields(**fields), workers=workers)
    return prepare_corpora(find_files([str(path)]), str(output), options)[0]


QUESTIONS = {"format": "prompt-completion", "prompt": "question", "completion": "meta.answer"}


UNPRINTABLE = sorted({*range(256)} - {*range(33, 127), *range(161, 173), *range(174, 256)})


def piece_bytes(tokenizer, index: int) -> bytes:
    piece = tokenizer.convert_ids_to_tokens(index)
    if index in tokenizer.all_special_ids:
        return piece.encode()
    if tokenizer.unk_token:  # sentencepiece
        return bytes.fromhex(piece[3:5]) if piece.startswith("<0x") else piece.replace("\u2581", " ").encode()
    # GPT-2's table: printable bytes stand for themselves, the rest follow from 256 on.
    return bytes(ord(c) if ord(c) < 256 else UNPRINTABLE[ord(c) - 256] for c in piece)


def brute_mask(tokenizer, ids: list[int], text: str, counts: list[bool]) -> list[int]:
    """Return the mask by brute force: a token counts if the character of its first byte counts."""
    place, mask = 0, []
    for index in ids:
        mask.append(int(counts[len(text.encode()[:place].decode(errors="ignore"))]))
        place += len(piece_bytes(tokenizer, index))
    assert place == len(text.encode())
    return mask


def documents(corpus: Corpus) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and the mask of each document."""
    tokens, mask = open_tokens(corpus), open_mask(corpus)
    stops = np.cumsum([len(tokens[i]) for i in range(len(tokens))])
    return [(tokens[i].tolist(), mask[stop - len(tokens[i]) : stop].tolist()) for i, stop in enumerate(stops)]


@pytest.mark.parametrize("separator", ["", "\n"])
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_the_tokens_that_begin_in_the_completion_count(model, chat_tokenizer, tmp_path, kind, separator):
    name = model if kind == "sentencepiece" else chat_tokenizer
    path = write_pairs(tmp_path / "qa.jsonl", PAIRS)
    corpus = prepared(path, tmp_path / "qa", name, **QUESTIONS, separator=separator)
    tokenizer, seams = load_tokenizer(name), 0
    for (ids, mask), (prompt, completion) in zip(documents(corpus), PAIRS, strict=True):
        text = prompt + separator + completion
        assert ids == [*encoded(tokenizer, text), tokenizer.eos_token_id]
        counts = [False] * len(prompt + separator) + [True] * len(completion)
        assert mask == [*brute_mask(tokenizer, ids[:-1], text, counts), 1]
        seams += ids[:-1] != encoded(tokenizer, prompt + separator) + encoded(tokenizer, completion)
    assert seams or separator, "no piece crosses the seam, so the test does not show that it is encoded in one pass"
    assert corpus.num_bytes == sum(len(completion.encode()) for _, completion in PAIRS)
    assert verify_corpus(str(tmp_path / "qa")).masked


def encoded(tokenizer, text: str, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_the_tokens_of_the_assistant_count(tmp_path, end, suffix):
    name = byte_level(tmp_path / "tokenizer", end)
    corpus = prepared(write_chats(tmp_path / f"c.{suffix}", CHATS), tmp_path / "c", name, format="messages")
    tokenizer, size = load_tokenizer(name), 0
    for (ids, mask), chat in zip(documents(corpus), CHATS, strict=True):
        text, counts = "", []
        for role, content in chat:
            head, body = f"<|im_start|>{role}\n", f"{content}<|im_end|>{end}"
            text += head + body
            counts += [False] * len(head) + [role == "assistant"] * len(body)
            size += len(f"{content}{end}".encode()) if role == "assistant" else 0
        expected = encoded(tokenizer, text, special=True)
        marks = brute_mask(tokenizer, expected, text, counts)
        if end:  # otherwise the end of the last turn ends the document
            expected, marks = [*expected, tokenizer.eos_token_id], [*marks, int(chat[-1][0] == "assistant")]
        assert (ids, mask) == (expected, marks)
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == len(chat)
    assert corpus.num_bytes == size, "the bytes of end tokens do not count"


def test_any_number_of_workers_gives_the_same_bytes_and_so_does_merging(model, tmp_path, monkeypatch):
    monkeypatch.undo()
    pairs = [(sentence(i, i % 50), sentence(i + 1, 1 + i % 30)) for i in range(700)]
    write_pairs(tmp_path / "all.jsonl", pairs)
    write_pairs(tmp_path / "a.jsonl", pairs[:300])
    write_pairs(tmp_path / "b.jsonl", pairs[300:])
    for name in ("all", "a", "b"):
        prepared(tmp_path / f"{name}.jsonl", tmp_path / name, model, **QUESTIONS)
    prepared(tmp_path / "all.jsonl", tmp_path / "three", model, 3, **QUESTIONS)
    merge_corpora([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "merged"))
    assert ".mask" in contents(tmp_path / "all")
    assert contents(tmp_path / "three") == contents(tmp_path / "all") == contents(tmp_path / "merged")


def test_workers_use_the_chat_template(chat_tokenizer, tmp_path, monkeypatch):
    path = write_chats(tmp_path / "c.jsonl", CHATS)
    prepared(path, tmp_path / "here", chat_tokenizer, format="messages")
    monkeypatch.undo()
    prepared(path, tmp_path / "there", chat_tokenizer, 2, format="messages")
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_spelled_out_special_tokens_are_text_even_after_chats(chat_tokenizer, tmp_path):
    """A worker caches its encoder, but the two formats need different ones."""
    raw = [("f", 1, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})]
    file, end = str(Path(chat_tokenizer) / "tokenizer.json"), load_tokenizer(chat_tokenizer).eos_token_id
    for kind, expected in (("messages", 3), ("text", 1)):
        settings = encoding.EncoderSettings(file, end, "uint16", Fields(format=kind))
        content = {"text": "a <|im_end|>", **raw[0][2]}
        group = encoding.encode_documents(settings, [encoding.RawDocument("f", 1, content)]).groups[""]  # type: ignore[attr-defined]
        assert (group.pieces[0] == end).sum() == expected
        assert bool(group.masks) == (kind == "messages")


@pytest.fixture
def masked(model, tmp_path) -> Path:
    """Return a folder with a corpus `qa` that has a mask, and `plain` that has none."""
    prepared(write_pairs(tmp_path / "qa.jsonl", PAIRS), tmp_path / "qa", model, **QUESTIONS)
    prepare_corpus([str(write_jsonl(tmp_path / "p.jsonl", [sentence(1)]))], str(tmp_path / "plain"), tokenizer=model)
    return tmp_path


def test_a_missing_truncated_or_changed_mask_is_found(masked):
    mask = masked / "qa.mask"
    content = mask.read_bytes()
    mask.write_bytes(content[:50] + bytes([1 - content[50]]) + content[51:])
    open_corpus(str(masked / "qa"))
    with refuses("corpus", masked / "qa", r"qa\.mask has changed"):
        verify_corpus(str(masked / "qa"))
    with refuses("corpus", masked / "qa", r"qa\.mask has changed"):
        merge_corpora([str(masked / "qa")], str(masked / "merged"))
    os.truncate(mask, len(content) - 1)
    with refuses("corpus", masked / "qa", r"qa\.mask has \d+ bytes instead of"):
        open_corpus(str(masked / "qa"))
    mask.unlink()
    with refuses("corpus", masked / "qa", r"qa\.mask is missing"):
        open_corpus(str(masked / "qa"))


def test_corpora_with_and_without_a_mask_are_not_merged(masked):
    for names in (["qa", "plain"], ["plain", "qa"]):
        with refuses("--merge", None, "has (a|no) mask of answers, unlike"):
            merge_corpora([str(masked / name) for name in names], str(masked / "merged"))


BAD = {
    "no_answer.jsonl": {"prompt": "x"},
    "null.jsonl": {"prompt": "x", "completion": None},
    "empty.jsonl": {"prompt": "x", "completion": " \n"},
    "half.jsonl": {"prompt": "x", "completion": "\ud83d"},
    "no_list.jsonl": {"messages": "x"},
    "no_role.jsonl": {"messages": [{"from": "human", "value": "x"}]},
    "silent.jsonl": {"messages": [{"role": "user", "content": "x"}]},
    "hollow.jsonl": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
    "bot.jsonl": {"messages": [{"role": "bot", "content": "x"}, {"role": "assistant", "content": "y"}]},
    "no_content.jsonl": {"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]},
}
PAIR, CHAT = (
    "--format prompt-completion --tokenizer CHAT --output out/web",
    "--format messages --tokenizer CHAT --output out/web",
)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (f"--input no_answer.jsonl {PAIR}", "--completion-key is completion, but no_answer.jsonl:1 has no key"),
        (f"--input null.jsonl {PAIR}", "--completion-key is completion, but null.jsonl:1 has null"),
        (f"--input empty.jsonl {PAIR}", "document is empty.jsonl:1, but its answer is empty"),
        (f"--input half.jsonl {PAIR}", "document is half.jsonl:1, but it is not valid UTF-8"),
        (f"--input no_list.jsonl {PAIR}", "--prompt-key is prompt, but no_list.jsonl:1 has no key 'prompt'"),
        (f"--input text.txt {PAIR}", "--format is prompt-completion, but text.txt is plain text"),
        (f"--input no_answer.jsonl {CHAT}", "--messages-key is messages, but no_answer.jsonl:1 has no key"),
        (f"--input no_list.jsonl {CHAT}", "document is no_list.jsonl:1, but it is not a list of messages"),
        (f"--input no_role.jsonl {CHAT}", "document is no_role.jsonl:1, but it is not a list of messages"),
        (
            f"--input silent.jsonl {CHAT}",
            "silent.jsonl:1, but it has no message with the role 'assistant', only ['user']",
        ),
        (f"--input hollow.jsonl {CHAT}", "document is hollow.jsonl:1, but an answer of the assistant is empty"),
        (f"--input bot.jsonl {CHAT}", "bot.jsonl:1, but the tokenizer's chat template rejects it (no bots)"),
        (f"--input no_content.jsonl {CHAT}", "no_content.jsonl:1, but the tokenizer's chat template rejects it"),
        (
            f"--input silent.jsonl {CHAT} --prompt-key x",
            "--prompt-key is x, but it does not apply to --format messages",
        ),
        (
            f"--input silent.jsonl {PAIR} --json-key x",
            "--json-key is x, but it does not apply to --format prompt-completion",
        ),
        (f"--input silent.jsonl {PAIR} --completion-key=", "--completion-key is '', but it is empty"),
        ("--input a.jsonl --separator x --tokenizer CHAT --output out/web", "--separator is x, but it does not"),
        ("--input silent.jsonl --format messages --tokenizer MODEL --output out/web", "but it has no chat template"),
        (
            "--input silent.jsonl --format messages --train-tokenizer 300 --output out/web",
            "--train-tokenizer is 300, but it has",
        ),
        ("--output out/web --verify --format messages", "--format is messages, but it does not apply to --verify"),
    ],
)
def test_bad_input_is_an_error(model, chat_tokenizer, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "text.txt").write_text("text")
    for name, record in BAD.items():
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    words = arguments.replace("CHAT", chat_tokenizer).replace("MODEL", model).split()
    assert said in refused(tmp_path, capsys, *words, "--workers", "1")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] + ('!' if loop.last else '') + m['content'] + END }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + END }}{% endfor %}"
        "{% if messages[-1]['role'] == 'assistant' %}!{% endif %}",
    ],
    ids=["before-the-answer", "after-the-answer"],
)
def test_a_template_that_changes_earlier_text_is_refused(tmp_path, capsys, template):
    """For example, templates that drop the reasoning of all turns but the last."""
    tokenizer = byte_level(tmp_path / "tokenizer", template=template)
    (tmp_path / "out").mkdir()
    path = write_chats(tmp_path / "c.jsonl", CHATS)
    arguments = ["--input", str(path), "--format", "messages", "--tokenizer", tokenizer, "--output"]
    said = refused(tmp_path, capsys, *arguments, str(tmp_path / "out" / "web"))
    assert "c.jsonl:1, but the chat template changes earlier text at message 3" in said


def test_records_without_an_answer_are_skipped_with_skip_bad(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "qa.jsonl", [("x", "y is 3"), ("x", ""), ("the", " area")])
    keys = ["--format", "prompt-completion", "--prompt-key", "question", "--completion-key", "meta.answer"]
    made = ["--separator", r"\n", "--skip-bad", "1", "--tokenizer", model, "--output", "qa"]
    main(["prepare", "--input", "qa.jsonl", *keys, *made])
    corpus = open_corpus("qa")
    assert (corpus.num_documents, corpus.skipped, corpus.num_bytes) == (2, 1, len("y is 3 area"))
    assert corpus.sources["s0"]["bytes"] == corpus.num_bytes
    assert load_tokenizer(model).decode(documents(corpus)[0][0][:-1]) == "x\ny is 3"
