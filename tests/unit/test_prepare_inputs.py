"""Inputs: all file formats give the same corpus, and sources and licenses are counted."""

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_slm.data.corpus import MAX_LABELS, Corpus, add_label, counts, open_corpus
from megatron_slm.prepare.documents import Fields, RawDocument, decode_document, lookup
from megatron_slm.prepare.inputs import find_dataset, find_files, read_chunks
from megatron_slm.prepare.prepare import Options, prepare_corpora
from tests.texts import contents, open_tokens, sentence

pytestmark = pytest.mark.usefixtures("in_this_process")

RECORDS = [
    {"text": sentence(i), "meta": {"source": ("wiki", "arXiv")[i % 2]}, "license": "CC0" if i % 3 else "MIT"}
    for i in range(400)
]


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_records(path: Path, records: list[dict] = RECORDS) -> Path:
    """Write records in the format that the suffixes of ``path`` name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".parquet" in path.suffixes:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=150)
        content = sink.getvalue().to_pybytes()
    else:
        content = lines(records)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


def prepared(inputs: list[str], output: Path, model: str, **options) -> Corpus:
    return prepare_corpora(find_files(inputs), str(output), Options(tokenizer=model, **options))[0]


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    prepared([str(write_records(folder / "web.jsonl"))], folder / "web", model)
    return contents(folder / "web")


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_file_format_gives_the_same_corpus(kind, compression, model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write_records(tmp_path / f"web{kind}{compression}")
    prepared([str(path)], tmp_path / "out", model)
    assert contents(tmp_path / "out") == expected


SKIPPABLE = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"  # a zstd frame without content


def in_blocks(content: bytes, window: int | None = None) -> bytes:
    """Return a zstd frame that does not state its content size, and may require a window of 2**window bytes."""
    encoder = zstandard.ZstdCompressor().compressobj()
    blocks = [encoder.compress(content[start : start + 5000]) for start in range(0, len(content), 5000)]
    frame = bytearray(b"".join(blocks) + encoder.flush())
    if window:
        frame[5] = (window - 10) << 3  # RFC 8878, section 3.1.1.1.2
    return bytes(frame)


@pytest.mark.parametrize(
    ("suffix", "parts"),
    {
        "members": (".gz", lambda a, b: gzip.compress(a) + gzip.compress(b"") + gzip.compress(b)),
        "frames": (".zst", lambda a, b: zstandard.compress(a) + zstandard.compress(b"") + zstandard.compress(b)),
        "skippable": (".zst", lambda a, b: SKIPPABLE + zstandard.compress(a) + SKIPPABLE + in_blocks(b) + SKIPPABLE),
        "long-28": (".zst", lambda a, b: in_blocks(a + b, 28)),
        "long-31": (".zst", lambda a, b: in_blocks(a, 31) + in_blocks(b, 31)),
    }.values(),
    ids=["members", "frames", "skippable", "long-28", "long-31"],
)
@pytest.mark.parametrize("option", ["input", "dataset"])
def test_every_member_and_frame_of_a_file_is_read(option, suffix, parts, model, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"web.jsonl{suffix}").write_bytes(parts(lines(RECORDS[:150]), lines(RECORDS[150:])))
    folder = str(tmp_path / "set")
    inputs = find_files([folder]) if option == "input" else find_dataset(folder, None, "train")
    prepare_corpora(inputs, str(tmp_path / "out"), Options(tokenizer=model))
    assert contents(tmp_path / "out") == expected


def test_a_folder_is_read_in_sorted_order_without_other_files(model, expected, tmp_path, caplog):
    web = tmp_path / "web"
    write_records(web / "b.parquet", RECORDS[100:250])
    write_records(web / "c" / "deep.jsonl.zst", RECORDS[250:])
    write_records(web / "a.jsonl", RECORDS[:100])
    write_records(web / ".hidden.jsonl")
    write_records(web / ".web.preparing" / "tokenizer.json")
    write_records(tmp_path / "elsewhere" / "e.jsonl")
    (web / "link").symlink_to(tmp_path / "elsewhere")
    (web / "picture.png").write_bytes(b"\x89PNG")
    with caplog.at_level("INFO", "megatron_slm"):
        prepared([str(web)], tmp_path / "out", model)
    assert contents(tmp_path / "out") == expected
    assert "1 files with other suffixes are skipped" in caplog.text
    assert f"{web / 'link'} is a link to a folder and is not followed" in caplog.text


def test_a_text_file_is_one_document(model, tmp_path):
    for name in ("a.txt", "b.md", "c.txt.gz", "d.unknown"):
        content = f"the text of {name}".encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    corpus = prepared([str(tmp_path / n) for n in ("a.txt", "b.md", "c.txt.gz", "d.unknown")], tmp_path / "out", model)
    assert corpus.num_documents == 4
    assert (corpus.sources, corpus.licenses) == ({}, {})


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_local_data_set_is_streamed_shard_by_shard(form, model, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for number, part in enumerate(np.array_split(np.arange(400), 3)):
        write_records(tmp_path / "set" / f"part-{number}.{form}", [RECORDS[i] for i in part])
    inputs = find_dataset(str(tmp_path / "set"), None, "train")
    assert len(inputs) == 3
    prepare_corpora(inputs, str(tmp_path / "out"), Options(tokenizer=model))
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("folder", ["set", "set[v2]", "se*", "s?t", "a[1]/set", "a::b", "back\\slash"])
def test_a_data_set_is_read_whatever_its_files_are_named(folder, model, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names = ["a.jsonl", "b[1].jsonl.gz", "b]1*.jsonl", "c?.jsonl", "d::e.jsonl", "f\\g.jsonl.zst"]
    for name, part in zip(names, np.array_split(np.arange(400), len(names)), strict=True):
        write_records(tmp_path / folder / name, [RECORDS[i] for i in part])
    for other in ("set[v2]", "set", "seat", "setv"):  # a pattern would match these too
        write_records(tmp_path / other / "z.jsonl", RECORDS[:3]) if other != folder else None
    inputs = find_dataset(str(tmp_path / folder), None, "train")
    assert len(inputs) == len(names)
    prepare_corpora(inputs, str(tmp_path / "out"), Options(tokenizer=model))
    assert contents(tmp_path / "out") == expected


def test_files_whose_plain_names_collide_are_all_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("a[1].jsonl", "a^1`.jsonl", "a[1`.jsonl"):
        write_records(tmp_path / "set" / name, RECORDS[:5])
    assert [len(list(shard.read(None))) for shard in find_dataset(str(tmp_path / "set"), None, "train")] == [5, 5, 5]


def test_the_configurations_of_a_data_set_are_found_under_special_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set[v2]"
    for name in ("one", "two"):
        write_records(folder / name / "a.jsonl", RECORDS[: len(name) * 2 + (name == "two")])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [len(list(find_dataset(str(folder), name, "train")[0].read(None))) for name in ("one", "two")] == [6, 7]


def test_the_index_equals_the_one_that_megatron_writes(model, tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    corpus = prepared([str(write_records(tmp_path / "web.jsonl"))], tmp_path / "out", model)
    tokens = open_tokens(corpus)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for number in range(len(tokens)):
        builder.add_document(torch.from_numpy(tokens[number].copy()), [len(tokens[number])])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"out{suffix}").read_bytes()


def test_sources_and_licenses_are_counted(model, tmp_path):
    write_records(tmp_path / "web.jsonl")
    with open(tmp_path / "web.jsonl", "a") as stream:
        stream.write(json.dumps({"text": "of no known source", "meta": "none"}) + "\n")
    corpus = open_corpus(prepared([str(tmp_path / "web.jsonl")], tmp_path / "out", model).prefix)
    tokens = open_tokens(corpus)
    wiki = {
        "documents": 200,
        "tokens": sum(len(tokens[i]) for i in range(0, 400, 2)),
        "bytes": sum(len(record["text"].encode()) for record in RECORDS[::2]),  # type: ignore[misc]
    }
    assert list(corpus.sources) == ["wiki", "arXiv"]
    assert corpus.sources["wiki"] == wiki
    assert {label: count["documents"] for label, count in corpus.licenses.items()} == {"MIT": 134, "CC0": 266}
    assert sum(count["documents"] for count in corpus.sources.values()) == corpus.num_documents - 1


def test_labels_after_the_first_thousand_are_counted_together():
    tally = {}
    for number in range(MAX_LABELS + 7):
        add_label(tally, str(number), counts(1, 10, 100))
    add_label(tally, "3", counts(1, 10, 100))
    assert len(tally) == MAX_LABELS + 1
    assert tally["other"] == counts(7, 70, 700)
    assert tally["3"] == counts(2, 20, 200)


@pytest.mark.parametrize(
    ("record", "source", "license"),
    [
        ({"source": "a", "meta": {"source": "b"}}, "a", None),
        ({"meta": {"source": "b", "licence": "MIT"}}, "b", "MIT"),
        ({"meta": '{"source": "b"}', "license": "CC0", "licence": "MIT"}, None, "CC0"),
        ({"source": ["a"], "license": None}, None, None),
        ({"source": 3, "meta.license": "x"}, "3", "x"),
    ],
)
def test_labels_are_found_where_data_sets_keep_them(record, source, license):
    document = decode_document(RawDocument("f", 1, {"text": "t", **record}), Fields())
    assert (document.source, document.license) == (source, license)


def test_a_dotted_path_leads_into_nested_records():
    record = {"a": {"b": {"c": 1}}, "a.b": 2}
    assert [lookup(record, path) for path in ("a.b.c", "a.b", "a.x", "a.b.c.d", "x")] == [1, 2, None, None, None]


def test_large_inputs_end_their_chunk_and_small_ones_share_one(tmp_path):
    for name, size in (("a", 40), ("b", 40), ("c", 300_000), ("d", 0), ("e", 2_500_000), ("f", 30)):
        documents = [{"text": "x" * (size // 2)}] * 2 if size else []
        (tmp_path / f"{name}.jsonl").write_bytes(lines(documents))
    chunks = list(read_chunks(find_files([str(tmp_path)]), Fields()))
    assert [(len(chunk.documents), chunk.finished) for chunk in chunks] == [
        (4 + 2, 3),
        (0, 4),
        (1, None),
        (1, None),
        (0, 5),
        (2, 6),
    ]
    assert chunks[-1].position == sum(path.stat().st_size for path in tmp_path.iterdir())
