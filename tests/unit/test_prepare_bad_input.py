"""Bad input: the command prints an error, exits with status 2, and leaves existing files unchanged."""

import gzip
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_slm.__main__ import main
from megatron_slm.prepare.prepare import prepare_corpus
from tests.texts import sentence, write_jsonl
from tests.unit.test_prepare_merge_adopt import encoded, megatron_corpus

pytestmark = pytest.mark.usefixtures("in_this_process")

LINES = b"".join(json.dumps({"text": sentence(i)}).encode() + b"\n" for i in range(100))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """Return a tokenizer of 300 pieces."""
    folder = tmp_path_factory.mktemp("other")
    path = write_jsonl(folder / "x.jsonl", [sentence(i) for i in range(100)])
    prepare_corpus([str(path)], str(folder / "x"), train_size=300)
    return str(folder / "x.tokenizer")


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in ``folder``, expect exit status 2 and unchanged files, and return the error output."""
    before = snapshot(folder)
    with pytest.raises(SystemExit) as end:
        main(["prepare", *arguments])
    assert end.value.code == 2
    assert snapshot(folder) == before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path


def parquet(records: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


TABLE = parquet([{"text": sentence(i), "meta": {"source": "a"}} for i in range(100)])
NULL = parquet([{"text": "a"}, {"text": None}])
FILES = {
    "cut.jsonl.gz": gzip.compress(LINES)[:-30],
    "no.jsonl.gz": LINES,
    "cut.jsonl.zst": zstandard.compress(LINES)[:-30],
    "no.jsonl.zst": LINES,
    "zero.jsonl.gz": b"",
    "zero.jsonl.zst": b"",
    "tail.jsonl.gz": gzip.compress(LINES) + b"tail",
    "tail.jsonl.zst": zstandard.compress(LINES) + b"tail",
    "second.jsonl.gz": gzip.compress(LINES) + gzip.compress(LINES)[:3],
    "second.jsonl.zst": zstandard.compress(LINES) + zstandard.compress(LINES)[:3],
    "sum.jsonl.gz": gzip.compress(LINES)[:-8] + bytes(8),
    "unsummed.jsonl.gz": gzip.compress(LINES)[:-8],
    "zero.parquet": b"",
    "cut.parquet": TABLE[:-30],
    "no.parquet": LINES,
    "broken.parquet": TABLE[:100] + bytes(400) + TABLE[500:],
    "table.parquet": TABLE,
    "null.parquet": NULL,
    "bad.jsonl": LINES + b"{bad\n[1]\n",
    "good.jsonl": LINES,
    "latin.txt": "caf\xe9".encode("latin-1"),
    "empty.jsonl": b"",
}
T = "--tokenizer MODEL --output out/web"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (f"--input cut.jsonl.gz {T}", "--input is cut.jsonl.gz, but it cannot be read"),
        (f"--input no.jsonl.gz {T}", "--input is no.jsonl.gz, but it cannot be read"),
        (f"--input cut.jsonl.zst {T}", "--input is cut.jsonl.zst, but it cannot be read"),
        (f"--input no.jsonl.zst {T}", "--input is no.jsonl.zst, but it cannot be read"),
        *(
            (f"--input {name}.jsonl.{suffix} {T}", f"--input is {name}.jsonl.{suffix}, but it cannot be read ({reason}")
            for name, suffixes, reason in (
                ("zero", ("gz", "zst"), "it is empty"),
                ("tail", ("gz", "zst"), ""),
                ("second", ("gz", "zst"), "it is truncated"),
                ("sum", ("gz",), ""),
                ("unsummed", ("gz",), "it is truncated"),
            )
            for suffix in suffixes
        ),
        (f"--input zero.parquet {T}", "--input is zero.parquet, but it is not a valid parquet file"),
        (f"--input good.jsonl --contamination zero.jsonl.gz {T}", "--contamination is zero.jsonl.gz, but it"),
        (f"--input cut.parquet {T}", "--input is cut.parquet, but it is not a valid parquet file"),
        (f"--input no.parquet {T}", "--input is no.parquet, but it is not a valid parquet file"),
        (f"--input broken.parquet {T}", "--input is broken.parquet"),
        (f"--input table.parquet --json-key body {T}", "--json-key is body, but table.parquet has no such column"),
        (f"--input table.parquet --by kind {T}", "--by is kind, but table.parquet has no such column"),
        (f"--input table.parquet --by meta.kind {T}", "--by is meta.kind, but table.parquet:1 has no key"),
        (f"--input null.parquet {T}", "--json-key is text, but null.parquet:2 has null"),
        (f"--input good.jsonl --by source {T}", "--by is source, but good.jsonl:1 has no key"),
        (f"--input latin.txt --by source {T}", "document is latin.txt, but it is not valid UTF-8"),
        (f"--input bad.jsonl {T}", "document is bad.jsonl:101, but it is not valid JSON"),
        (f"--input bad.jsonl --skip-bad 1 {T}", "document is bad.jsonl:102, but it is not a JSON object"),
        (f"--input bad.jsonl --skip-bad -1 {T}", "--skip-bad is -1"),
        (f"--input empty.jsonl {T}", "--input is empty.jsonl, but it holds no text"),
        (f"--input nothing {T}", "--input is nothing, but it is not a file or folder"),
        (f"--input out {T}", "--input is out, but it holds no file of a known kind"),
        (f"--dataset ./gone/set {T}", "--dataset is ./gone/set, but the path does not exist"),
        (f"--dataset nobody/nothing {T}", "--dataset is nobody/nothing, but it cannot be reached"),
        (f"--dataset . --dataset-split nope {T}", "--dataset is ., but its split 'nope' cannot be opened"),
        (f"--input good.jsonl --dataset-split train {T}", "--dataset-split is train, but it does not apply to --input"),
        (f"--input good.jsonl --contamination gone.jsonl {T}", "--contamination is gone.jsonl, but it is not a file"),
        (f"--input good.jsonl --contamination cut.jsonl.gz {T}", "--contamination is cut.jsonl.gz, but it"),
        (f"--input good.jsonl --contamination bad.jsonl {T}", "bad.jsonl:101, but it is not valid JSON"),
        (f"--input good.jsonl --contamination empty.jsonl {T}", "--contamination is empty.jsonl, but it holds no text"),
        (
            "--input good.jsonl --tokenizer gone/to/it --output out/web",
            "tokenizer is gone/to/it, but the path does not exist",
        ),
        (
            "--input good.jsonl --train-tokenizer 9999999 --output out/web",
            "--train-tokenizer is 9999999, but",
        ),
        (
            "--input good.jsonl --tokenizer MODEL --output good.jsonl/web",
            "--output is good.jsonl/web, but it cannot be written",
        ),
        ("--input good.jsonl --tokenizer MODEL --output .", "--output is ., but"),
        ("--input good.jsonl --tokenizer MODEL", "--output is not set"),
        ("--adopt out/old --tokenizer MODEL", "--adopt is out/old, but out/old.idx is missing"),
        ("--adopt out/old --tokenizer MODEL --by source", "--by is source, but it does not apply to --adopt"),
        ("--adopt out/old --tokenizer MODEL --output out/new", "--output is out/new, but it does not apply to --adopt"),
        ("--adopt out/old", "--tokenizer is not set, but --adopt needs it"),
        ("--merge out/a out/b --output out/web", "--merge is out/a, but out/a.json is missing"),
        ("--merge out/a out/b", "--output is not set, but --merge needs it"),
        ("--merge out/a --tokenizer MODEL --output out/web", "it does not apply to --merge"),
        ("--verify --output out/web --workers 2", "--workers is 2, but it does not apply to --verify"),
    ],
)
def test_bad_arguments_give_an_error_and_change_nothing(arguments, sentence, here, model, capsys):
    for name, content in FILES.items():
        if name in arguments or (name == "good.jsonl" and "--dataset ." in arguments):
            (here / name).write_bytes(content)
    words = arguments.replace("MODEL", model).split()
    assert sentence in refused(here, capsys, *words)


def test_a_dangling_link_is_named(here, model, capsys):
    (here / "web").mkdir()
    (here / "web" / "a.jsonl").symlink_to("gone.jsonl")
    said = refused(here, capsys, "--input", "web", "--tokenizer", model, "--output", "out/web")
    assert "--input is web/a.jsonl, but it cannot be read" in said


def test_a_data_set_that_cannot_be_opened_is_named(here, model, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(here / "cache"))
    for name, file, content in (("script", "script.py", b""), ("cut", "a.jsonl.gz", FILES["cut.jsonl.gz"])):
        (here / name).mkdir()
        (here / name / file).write_bytes(content)
        said = refused(here, capsys, "--dataset", f"./{name}", "--tokenizer", model, "--output", "out/web")
        assert f"--dataset is ./{name}, but its split 'train' cannot be opened" in said


@pytest.mark.parametrize("name", ["zero.jsonl.gz", "zero.jsonl.zst", "cut.jsonl.zst", "second.jsonl.zst"])
def test_a_truncated_shard_of_a_data_set_is_named(name, here, model, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(here / "cache"))
    (here / "set").mkdir()
    good = gzip.compress(LINES) if name.endswith(".gz") else zstandard.compress(LINES)
    (here / "set" / f"a.{name}").write_bytes(good)
    (here / "set" / f"b.{name}").write_bytes(FILES[name])
    said = refused(here, capsys, "--dataset", "./set", "--tokenizer", model, "--output", "out/web")
    assert "--dataset is ./set:train shard 2 of 2, but it cannot be read" in said


def test_a_tokenizer_that_cannot_be_loaded_is_named(here, model, capsys):
    (here / "t").mkdir()
    (here / "t" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (here / "t" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (here / "good.jsonl").write_bytes(LINES)
    said = refused(here, capsys, "--input", "good.jsonl", "--tokenizer", "t", "--output", "out/web")
    assert "tokenizer is t, but it cannot be loaded" in said


@pytest.fixture(scope="module")
def made(model, other, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name, tokenizer in (("a", model), ("b", model), ("c", other)):
        path = write_jsonl(folder / f"{name}.jsonl", [sentence(ord(name) + i) for i in range(5)])
        prepare_corpus([str(path)], str(folder / name), tokenizer=tokenizer)
    return folder


@pytest.fixture
def corpora(made, here) -> Path:
    """Return a folder with corpora `a` and `b` of one tokenizer, and `c` of another."""
    shutil.copytree(made, here, dirs_exist_ok=True)
    return here


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--merge a c --output out/m", "--merge is c, but it was prepared with a different tokenizer"),
        ("--merge a b ./a --output out/m", "--merge is a, but it is given twice"),
        ("--merge a b --output a", "--output is a, but a.json already exists"),
        ("--input a.jsonl --tokenizer a.tokenizer --output b", "--output is b, but b.json already exists"),
        ("--adopt a --tokenizer a.tokenizer", "--adopt is a, but it is already a prepared corpus"),
    ],
)
def test_corpora_are_never_mixed_or_overwritten(arguments, sentence, corpora, capsys):
    assert sentence in refused(corpora, capsys, *arguments.split())


def cut_index(prefix: Path) -> None:
    os.truncate(f"{prefix}.idx", 60)


def cut_header(prefix: Path) -> None:
    os.truncate(f"{prefix}.idx", 20)


def longer_tokens(prefix: Path) -> None:
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"\0\0")


def wrong_pointers(prefix: Path) -> None:
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[34 + 4 * 6 + 8] ^= 1
    Path(f"{prefix}.idx").write_bytes(content)


def foreign_tokenizer(prefix: Path) -> None:
    Path(f"{prefix}.tokenizer").mkdir()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_index, "old.idx has 60 bytes instead of"),
        (cut_header, "old.idx is truncated"),
        (longer_tokens, "old.bin has"),
        (wrong_pointers, "old.idx does not point to documents that follow each other"),
        (foreign_tokenizer, "old.tokenizer already exists"),
    ],
)
def test_a_damaged_pair_is_not_adopted(damage: Callable[[Path], None], sentence, here, model, capsys):
    prefix = megatron_corpus(here / "old", encoded(model, [f"text {i}" for i in range(6)]))
    damage(prefix)
    assert sentence in refused(here, capsys, "--adopt", "old", "--tokenizer", model)


def test_a_tokenizer_that_is_too_small_is_not_adopted(here, model, other, capsys):
    megatron_corpus(here / "old", [[[5, 320, 1]], [[6, 1]]])
    said = refused(here, capsys, "--adopt", "old", "--tokenizer", other)
    assert "it holds the id 320" in said


def test_a_negative_id_is_not_adopted(here, model, capsys):
    megatron_corpus(here / "old", [[[5, 1]], [[-6, 1]]], np.int32)
    said = refused(here, capsys, "--adopt", "old", "--tokenizer", model)
    assert "it holds the id -6" in said


def test_several_sequences_per_document_are_not_adopted(here, model, capsys):
    megatron_corpus(here / "old", [[[5, 6], [7, 1]], [[6, 1]]])
    assert "old.idx holds 3 sequences in 2 documents" in refused(here, capsys, "--adopt", "old", "--tokenizer", model)


def test_a_full_disk_is_an_error_and_leaves_no_files(here, model, capsys):
    (here / "long.txt").write_text(sentence(3, 200_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        said = refused(here, capsys, "--input", "long.txt", "--tokenizer", model, "--output", "out/web")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "--output is out/web, but it cannot be written" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("place", ["in", "out"])
def test_folders_without_permission_are_named(place, here, model, capsys):
    (here / "in").mkdir()
    (here / "in" / "good.jsonl").write_bytes(LINES)
    (here / place).chmod(0)
    try:
        with pytest.raises(SystemExit) as end:
            main(["prepare", "--input", "in", "--tokenizer", model, "--output", "out/web"])
    finally:
        (here / place).chmod(0o755)
    assert end.value.code == 2
    assert f"{place}" in capsys.readouterr().err


@pytest.mark.parametrize("trained", [False, True], ids=["given", "trained"])
def test_damaged_files_among_good_ones_are_skipped_logged_and_counted(trained, here, model, capsys, caplog):
    damaged = ["cut.jsonl.zst", "cut.parquet", "second.jsonl.gz", "zero.jsonl.gz", "zero.jsonl.zst"]
    (here / "web").mkdir()
    for name in ("good.jsonl", *damaged):
        (here / "web" / name).write_bytes(FILES[name])
    tokenizer = ("--train-tokenizer", "300") if trained else ("--tokenizer", model)
    command = ["--input", "web", *tokenizer, "--output", "out/web"]
    said = refused(here, capsys, *command, "--skip-bad", "4")
    assert "--input is web/zero.jsonl.zst, but it cannot be read" in said
    with caplog.at_level("WARNING", "megatron_slm"):
        main(["prepare", *command, "--skip-bad", "5"])
    described = json.loads((here / "out" / "web.json").read_text())
    assert (described["skipped"], described["num_documents"]) == (5, 200)  # of good.jsonl and second.jsonl.gz
    assert all(f"skipped: --input is web/{name}, " in caplog.text for name in damaged)


def test_bad_documents_are_skipped_logged_and_counted(here, model, capsys, caplog):
    (here / "bad.jsonl").write_bytes(LINES + b"{bad\n[1]\n" + LINES)
    with caplog.at_level("WARNING", "megatron_slm"):
        main(["prepare", "--input", "bad.jsonl", "--tokenizer", model, "--output", "web", "--skip-bad", "2"])
    described = json.loads((here / "web.json").read_text())
    assert (described["skipped"], described["num_documents"]) == (2, 200)
    assert "skipped: document is bad.jsonl:101, but it is not valid JSON" in caplog.text
    assert "skipped: document is bad.jsonl:102, but it is not a JSON object" in caplog.text
