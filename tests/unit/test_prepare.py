"""Preparation: equal bytes from any number of workers, no partial results, constant memory, errors for bad input."""

import argparse
import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import psutil
import pytest

from megatron_slm.commands import prepare as verb
from megatron_slm.data.corpus import corpus_tokenizer_path
from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.errors import UserError
from megatron_slm.prepare import encoding
from megatron_slm.prepare.documents import Fields, RawDocument, decode_document
from megatron_slm.prepare.prepare import prepare_corpus, verify_corpus
from tests.refusal import refuses
from tests.texts import contents, open_tokens, sentence, write_jsonl

RUN = """if True:
    import sys
    from megatron_slm.prepare.prepare import prepare_corpus
    prepare_corpus(sys.argv[3:], sys.argv[1], tokenizer=sys.argv[2])"""


@pytest.fixture(scope="module")
def word_level(tmp_path_factory) -> str:
    """Return a tokenizer that is fast enough for memory tests with long texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def test_documents_decode_to_their_text_and_end_with_one_end_token(model, tmp_path):
    texts = [
        "first line\n\n  indented </s> second",
        "",
        "日本語 🙂 e\u0301",
        sentence(3),
        "  ",
        sentence(5, 20_000),
        "last\n",
    ]
    note = tmp_path / "note.txt"
    note.write_text("a file is\none document\n", encoding="utf-8")
    zipped = tmp_path / "zipped.txt.gz"
    zipped.write_bytes(gzip.compress(b"even zipped"))
    lines = write_jsonl(tmp_path / "web.v1.jsonl.gz", texts, key="body")
    corpus = prepare_corpus(
        [str(lines), str(note), str(zipped)], str(tmp_path / "out" / "web"), tokenizer=model, json_key="body", workers=2
    )
    expected = [text for text in texts if text] + ["a file is\none document\n", "even zipped"]
    tokens, tokenizer = open_tokens(corpus), load_tokenizer(str(corpus_tokenizer_path(corpus)))
    documents = [tokens[i].tolist() for i in range(len(tokens))]
    end = tokenizer.eos_token_id
    assert all(document[-1] == end and end not in document[:-1] for document in documents)
    assert [tokenizer.decode(document[:-1]) for document in documents] == expected
    assert corpus.num_bytes == sum(len(text.encode()) for text in expected)
    assert corpus.num_tokens == sum(map(len, documents))
    assert corpus.num_documents == len(expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"web{suffix}" for suffix in (".bin", ".idx", ".json", ".tokenizer")
    ]


def test_one_and_three_workers_give_the_same_bytes(tmp_path):
    texts = [sentence(i, 1 + i % 97) for i in range(2000)] + [sentence(9, 30_000)]
    inputs = [str(write_jsonl(tmp_path / "a.jsonl", texts)), str(write_jsonl(tmp_path / "b.jsonl.gz", texts[:700]))]
    for workers in (1, 3):
        prepare_corpus(inputs, str(tmp_path / f"w{workers}" / "web"), train_size=330, workers=workers)
    assert contents(tmp_path / "w1" / "web") == contents(tmp_path / "w3" / "web")


@pytest.mark.parametrize("text", ["no seam to choose" * 40, sentence(7, 4000), "\n\n".join(map(sentence, range(300)))])
def test_a_long_document_has_the_ids_of_one_pass(model, monkeypatch, text):
    monkeypatch.setattr(encoding, "_WINDOW", 256)
    monkeypatch.setattr(encoding, "_OVERLAP", 64)
    tokenizer = load_tokenizer(model).backend_tokenizer
    parts = encoding._encode_long(tokenizer, text)
    assert len(parts) > 1
    assert list(chain(*parts)) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_long_document_without_seams_is_encoded_in_one_pass(monkeypatch):
    from tokenizers import Tokenizer, models

    monkeypatch.setattr(encoding, "_WINDOW", 255)
    monkeypatch.setattr(encoding, "_OVERLAP", 64)
    pairs = Tokenizer(models.BPE({"a": 0, "aa": 1}, [("a", "a")]))  # pairs are counted from the beginning of the text
    text = "a" * 1000
    assert list(chain(*encoding._encode_long(pairs, text))) == [1] * 500


def peak_memory(inputs: list[str], output: Path, tokenizer: str) -> int:
    """Prepare in a separate process, and return the peak bytes of it and its workers together."""
    process = psutil.Popen([sys.executable, "-W", "ignore", "-c", RUN, str(output), tokenizer, *inputs])
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            # A forked child that still runs its parent's program would count the parent's memory twice.
            workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
            peak = max(peak, sum(p.memory_info().rss for p in (process, *workers)))
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


def test_memory_does_not_grow_with_the_corpus_or_its_lines(word_level, tmp_path):
    line, long_line = (json.dumps({"text": f"{'i' * 1000} " * words}) + "\n" for words in (10, 1000))  # 10 kB, 1 MB
    (tmp_path / "small.jsonl").write_text(line * 1000)
    (tmp_path / "large.jsonl").write_text(line * 4000 + long_line * 40)
    small, large = (
        peak_memory([str(tmp_path / f"{name}.jsonl")], tmp_path / name, word_level) for name in ("small", "large")
    )
    assert large < small + 25_000_000  # with 70,000,000 more bytes of input


@pytest.mark.parametrize("whole_group", [True, False], ids=["with-its-workers", "alone"])
def test_a_killed_preparation_publishes_nothing_and_the_next_one_works(word_level, model, tmp_path, whole_group):
    big = tmp_path / "big.jsonl"
    big.write_text((json.dumps({"text": "internationalization " * 500}) + "\n") * 5_000)
    small = write_jsonl(tmp_path / "small.jsonl", [sentence(i) for i in range(50)])
    output, staging = tmp_path / "out" / "web", tmp_path / "out" / ".web.preparing"
    process = psutil.Popen(
        [sys.executable, "-W", "ignore", "-c", RUN, str(output), word_level, str(big)], start_new_session=True
    )
    wait_until(lambda: (staging / "ready/web.bin").exists() and (staging / "ready/web.bin").stat().st_size > 0)
    with refuses("--output", output, "another process is writing it"):
        prepare_corpus([str(small)], str(output), tokenizer=model)
    workers = process.children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    process.wait()
    wait_until(lambda: not any(worker.is_running() for worker in workers))
    assert sorted(path.name for path in output.parent.iterdir()) == [".web.preparing"]
    assert prepare_corpus([str(small)], str(output), tokenizer=model).num_documents == 50
    assert not staging.exists()


def test_the_same_command_resumes_after_a_kill(model, tmp_path, caplog):
    web = tmp_path / "web"
    web.mkdir()
    for number in range(12):
        lines = [json.dumps({"text": sentence(7 * number + i, 400)}) + "\n" for i in range(150)]
        (web / f"{number:02}.jsonl").write_text("".join(lines))
    output, journal = tmp_path / "out" / "web", tmp_path / "out" / ".web.preparing" / "progress.json"
    command = [sys.executable, "-m", "megatron_slm", "prepare", "--input", str(web), "--tokenizer", model]
    process = subprocess.Popen([*command, "--workers", "2", "--output", str(output)], start_new_session=True)
    wait_until(lambda: journal.exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(json.loads(journal.read_text())["finished"])
    assert 0 < finished < 12
    with caplog.at_level("INFO", "megatron_slm"):
        prepare_corpus([str(web)], str(output), tokenizer=model)
    assert f"resuming after {finished} of 12 inputs" in caplog.text
    prepare_corpus([str(web)], str(tmp_path / "whole"), tokenizer=model)
    assert contents(output) == contents(tmp_path / "whole")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("renames", range(4))
def test_the_same_command_completes_an_interrupted_publication(model, tmp_path, monkeypatch, renames):
    small = write_jsonl(tmp_path / "small.jsonl", [sentence(1)])
    output = tmp_path / "web"
    done = iter(range(renames))
    real = os.replace

    def replace_until_killed(source, target):
        if Path(source).parent.name == "ready" and next(done, None) is None:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_killed)
        patch.setattr("shutil.rmtree", lambda path: None)  # a killed process does not clean up
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus([str(small)], str(output), tokenizer=model)
    assert not Path(f"{output}.json").exists()
    assert sum(Path(f"{output}{suffix}").exists() for suffix in (".bin", ".idx", ".tokenizer")) == renames
    assert prepare_corpus([str(small)], str(output), tokenizer=model).num_documents == 1


@pytest.mark.parametrize("suffix", [".json", ".bin", ".tokenizer"])
def test_a_dangling_link_is_not_replaced(model, tmp_path, suffix):
    write_jsonl(tmp_path / "web.jsonl", [sentence(1)])
    link = tmp_path / f"web{suffix}"
    link.symlink_to(tmp_path / "gone")
    with refuses("--output", tmp_path / "web", str(link)):
        prepare_corpus([str(tmp_path / "web.jsonl")], str(tmp_path / "web"), tokenizer=model)
    assert link.is_symlink() and not (tmp_path / "gone").exists()


def test_an_existing_corpus_is_an_error_and_stays_unchanged(model, tmp_path):
    small = write_jsonl(tmp_path / "small.jsonl", [sentence(1)])
    prepare_corpus([str(small)], str(tmp_path / "web"), tokenizer=model)
    before = contents(tmp_path / "web")
    with refuses("--output", tmp_path / "web", r"web\.json already exists"):
        prepare_corpus([str(small)], str(tmp_path / "web"), tokenizer=model)
    assert contents(tmp_path / "web") == before


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".tokenizer"])
def test_other_files_are_never_overwritten(model, tmp_path, suffix):
    small = write_jsonl(tmp_path / "small.jsonl", [sentence(1)])
    foreign = tmp_path / f"web{suffix}"
    foreign.write_bytes(b"foreign")
    with refuses("--output", tmp_path / "web", rf"web\{suffix} already exists"):
        prepare_corpus([str(small)], str(tmp_path / "web"), tokenizer=model)
    assert foreign.read_bytes() == b"foreign"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.jsonl", foreign.name]


@pytest.mark.parametrize(
    ("line", "setting", "value", "reason"),
    [
        (b'{"text": "a"', "document", "web.jsonl:7", "not valid JSON"),
        (b'"text"', "document", "web.jsonl:7", "not a JSON object"),
        (b'{"body": "a"}', "--json-key", "text", r"web\.jsonl:7 has no key 'text'"),
        (b'{"text": null}', "--json-key", "text", r"web\.jsonl:7 has null there"),
        (b'{"text": "\xff"}', "document", "web.jsonl:7", "not valid UTF-8"),
        (b'{"text": "\\ud800"}', "document", "web.jsonl:7", "not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(line, setting, value, reason):
    with refuses(setting, value, reason):
        decode_document(RawDocument("web.jsonl", 7, line), Fields())


FORMATS = {
    "--json-key": Fields("meta.body"),
    "--by": Fields("text", by="meta.body"),
    "--prompt-key": Fields(format="prompt-completion", prompt="meta.body"),
    "--completion-key": Fields(format="prompt-completion", prompt="text", completion="meta.body"),
    "--messages-key": Fields(format="messages", messages="meta.body"),
}


@pytest.mark.parametrize("option", FORMATS)
@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"meta": {"body": None}}, "null"),
        ({"meta": None}, "null under 'meta'"),
        ({"meta": ["body"]}, "a list under 'meta'"),
        ({"meta": "body"}, "text under 'meta'"),
        ({"meta": {"title": "x"}}, "no key 'body' under 'meta'"),
        ({}, "no key 'meta.body'"),
    ],
    ids=["null", "null-above", "list-above", "text-above", "missing", "missing-above"],
)
def test_the_cause_of_a_missing_nested_key_is_named(option, record, cause, model):
    line = json.dumps({"text": "t", **record}).encode()
    is_null_chat = option == "--messages-key" and cause == "null"
    setting, value = ("document", "web.jsonl:7") if is_null_chat else (option, "meta.body")
    with refuses(setting, value, cause):
        decode_document(RawDocument("web.jsonl", 7, line), FORMATS[option], load_tokenizer(model))


def test_the_remedy_for_a_missing_nested_key_lists_the_existing_ones():
    line = b'{"meta": {"title": "x", "main": {"text": "y"}}}'
    with pytest.raises(UserError) as caught:
        decode_document(RawDocument("web.jsonl", 7, line), Fields("meta.body"))
    assert caught.value.setting == "--json-key" and "['meta.main', 'meta.title']" in caught.value.remedy


def test_a_bad_line_in_a_worker_ends_the_command_and_leaves_no_files(model, tmp_path):
    path = write_jsonl(tmp_path / "web.jsonl", [sentence(i) for i in range(600)])
    path.write_text(path.read_text() + "\n{broken\n")
    with refuses("document", f"{path}:602", "not valid JSON"):
        prepare_corpus([str(path)], str(tmp_path / "out" / "web"), tokenizer=model, workers=2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_input_without_text_is_refused(model, tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with refuses("--input", tmp_path / "empty.jsonl", "no text"):
        prepare_corpus([str(tmp_path / "empty.jsonl")], str(tmp_path / "web"), tokenizer=model)
    assert not Path(f"{tmp_path}/web.json").exists()


def test_a_missing_input_or_a_truncated_gzip_file_is_named(model, tmp_path):
    with refuses("--input", tmp_path / "gone.jsonl", "not a file or folder"):
        prepare_corpus([str(tmp_path / "gone.jsonl")], str(tmp_path / "web"), tokenizer=model)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with refuses("--input", cut, "cannot be read"):
        prepare_corpus([str(cut)], str(tmp_path / "web"), tokenizer=model)


def command(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    verb.run(parser.parse_args(arguments))


def test_the_command_trains_a_tokenizer_prepares_and_verifies(tmp_path):
    path = write_jsonl(tmp_path / "web.jsonl", [sentence(i) for i in range(300)])
    output = str(tmp_path / "web")
    command("--input", str(path), "--train-tokenizer", "330", "--output", output, "--workers", "1")
    assert len(load_tokenizer(output + ".tokenizer")) == 330
    command("--output", output, "--verify")
    with open(output + ".bin", "r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(bytes([first[0] ^ 1]))
    with refuses("corpus", None, r"web\.bin has changed"):
        command("--output", output, "--verify")


def test_verify_finds_a_different_tokenizer(model, word_level, tmp_path):
    small = write_jsonl(tmp_path / "small.jsonl", [sentence(1)])
    corpus = prepare_corpus([str(small)], str(tmp_path / "web"), tokenizer=model)
    load_tokenizer(word_level).save_pretrained(corpus_tokenizer_path(corpus))
    with refuses("corpus", None, r"web\.tokenizer is not the tokenizer"):
        verify_corpus(corpus.prefix)


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
    [
        (["--output", "x"], "--input", None),
        (["--output", "x", "--input", "a.txt"], "--tokenizer", None),
        (["--output", "x", "--input", "a.txt", "--tokenizer", "t", "--workers", "0"], "--workers", 0),
        (["--output", "x", "--input", "a.txt", "--train-tokenizer", "0"], "--train-tokenizer", 0),
        (["--output", "x", "--input", "a.txt", "--tokenizer", ""], "--tokenizer", ""),
        (["--output", "x", "--input", "a.txt", "--tokenizer", "t", "--by", ""], "--by", ""),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, setting, value):
    with refuses(setting, value):
        command(*arguments)


def test_help_imports_no_heavy_library():
    program = "import sys, megatron_slm.commands.prepare; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"
