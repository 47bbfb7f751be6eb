"""Prepared corpora: what `open_corpus` accepts, and the errors for the rest."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.corpus import (
    Corpus,
    corpus_tokenizer_path,
    describe,
    file_sha256,
    map_tokens,
    open_corpus,
    open_documents,
    unique_names,
    verify_checksums,
)
from tests.refusal import refuses
from tests.texts import open_tokens

KEYS = {"format_version", "tokenizer_fingerprint", "num_documents", "num_tokens", "num_bytes", "sha256"}
DOCUMENTS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 1]]


@pytest.fixture(scope="module", params=[np.uint16, np.int32], ids=["uint16", "int32"])
def written(request, tmp_path_factory) -> Path:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("written") / "math"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=request.param)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    sha256 = {suffix: file_sha256(Path(f"{prefix}{suffix}")) for suffix in (".bin", ".idx")}
    Path(f"{prefix}.json").write_text(describe(Corpus(str(prefix), "math", 3, 11, 40, "ab" * 32, sha256)))
    Path(f"{prefix}.tokenizer").mkdir()
    return prefix


@pytest.fixture
def prefix(written, tmp_path) -> str:
    shutil.copytree(written.parent, tmp_path / "data")
    return str(tmp_path / "data" / "math")


def edit(path: str, position: int, value: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(position)
        stream.write(value)


def test_a_corpus_opens_with_its_tokens(prefix):
    corpus = open_corpus(prefix)
    assert (corpus.prefix, corpus.name, corpus.num_documents, corpus.num_tokens) == (prefix, "math", 3, 11)
    assert corpus_tokenizer_path(corpus) == Path(prefix + ".tokenizer")
    tokens = open_tokens(corpus)
    assert [tokens[i].tolist() for i in range(len(tokens))] == DOCUMENTS
    documents = open_documents(corpus)
    assert documents.starts().tolist() == [0, 4, 6] and documents.length_D.tolist() == [4, 2, 5]
    assert [documents.between(*tokens) for tokens in ((0, 4), (3, 5), (6, 7), (0, 11))] == [
        slice(0, 1), slice(0, 2), slice(2, 3), slice(0, 3)
    ]  # fmt: skip
    assert map_tokens(corpus).tolist() == [token for document in DOCUMENTS for token in document]
    verify_checksums(corpus)


def test_the_description_has_exactly_the_documented_keys(prefix):
    assert set(json.loads(Path(prefix + ".json").read_text())) == KEYS | {
        *("sources", "licenses", "skipped", "tokenizer_probe", "end_token")
    }


@pytest.mark.parametrize("later", [set(), {"sources", "licenses", "skipped"}])
def test_a_description_of_an_earlier_version_opens_as_well(prefix, later):
    fields = json.loads(Path(prefix + ".json").read_text()) | {"format_version": 1}
    Path(prefix + ".json").write_text(json.dumps({key: fields[key] for key in KEYS | later}))
    corpus = open_corpus(prefix)
    assert (corpus.sources, corpus.licenses, corpus.skipped) == ({}, {}, 0)
    assert (corpus.tokenizer_probe, corpus.end_token) == ("", None)


def test_a_corpus_may_be_moved(prefix, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    verify_checksums(open_corpus(str(tmp_path / "elsewhere" / "math")))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json", ".tokenizer"])
def test_a_missing_part_is_named(prefix, suffix):
    Path(prefix + suffix).rename(prefix + ".away")
    with refuses("corpus", prefix, rf"math\{suffix} is missing"):
        open_corpus(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named(prefix, suffix, change):
    content = Path(prefix + suffix).read_bytes()
    Path(prefix + suffix).write_bytes(content[:change] if change < 0 else content + b"x")
    with refuses("corpus", prefix, rf"math\{suffix} has \d+ bytes instead of \d+"):
        open_corpus(prefix)


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, b"XXXX", "not an index"),
        (9, b"\x07", "not an index"),
        (17, b"\x03", "not an index"),
        (18, b"\x09", "has 9 documents"),
    ],
    ids=["magic", "version", "dtype", "count"],
)
def test_a_corrupted_index_header_is_found(prefix, position, value, reason):
    edit(prefix + ".idx", position, value)
    with refuses("corpus", prefix, rf"math\.idx .*{reason}"):
        open_corpus(prefix)


def test_an_index_truncated_inside_its_header_is_found(prefix):
    Path(prefix + ".idx").write_bytes(b"MMIDIDX\x00\x00\x01")
    with refuses("corpus", prefix, r"math\.idx is truncated"):
        open_corpus(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_changed_byte_is_found_by_the_checksums_alone(prefix, suffix):
    last = Path(prefix + suffix).stat().st_size - 1
    edit(prefix + suffix, last, b"\x01")
    corpus = open_corpus(prefix)
    with refuses("corpus", prefix, rf"math\{suffix} has changed"):
        verify_checksums(corpus)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 1}', "cannot be read"),
        ('{"format_version": 3}', "format version 3"),
    ],
)
def test_a_foreign_description_is_refused(prefix, content, reason):
    Path(prefix + ".json").write_text(content)
    with refuses("corpus", prefix, rf"math\.json .*{reason}"):
        open_corpus(prefix)


@pytest.mark.parametrize("sums", [{}, {".bin": "ab" * 32}, {".idx": "ab" * 32}])
def test_a_description_without_both_checksums_is_refused(prefix, sums):
    """Without them, nothing could be verified, and the fingerprint of an order would not depend on its tokens."""
    fields = json.loads(Path(prefix + ".json").read_text())
    Path(prefix + ".json").write_text(json.dumps(fields | {"sha256": sums}))
    with refuses("corpus", prefix, "SHA-256"):
        open_corpus(prefix)


@pytest.mark.parametrize("sums", [None, "ab" * 32])
def test_checksums_that_are_not_an_object_are_refused(prefix, sums):
    fields = json.loads(Path(prefix + ".json").read_text())
    Path(prefix + ".json").write_text(json.dumps(fields | {"sha256": sums}))
    with refuses("corpus", prefix, "cannot be read"):
        open_corpus(prefix)


def test_an_empty_corpus_is_refused(prefix):
    fields = json.loads(Path(prefix + ".json").read_text())
    Path(prefix + ".json").write_text(json.dumps(fields | {"num_tokens": 0, "num_documents": 0}))
    with refuses("corpus", prefix, "the corpus is empty"):
        open_corpus(prefix)


def test_repeated_names_are_numbered():
    assert unique_names(["a/math", "b/web", "c/math", "d/math"]) == ["math", "web", "math-2", "math-3"]
    assert unique_names(["a/x", "b/x", "c/x-2"]) == ["x", "x-2", "x-2-2"]
