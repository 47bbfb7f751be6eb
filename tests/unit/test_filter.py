"""The documents that a filtering keeps: ranks, sums over documents, and the keep-list."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from megatron_slm.data.corpus import Corpus, write_index
from megatron_slm.data.keep_list import open_keep_list, write_keep_list
from megatron_slm.data.samples import order_fingerprint
from megatron_slm.data.settings import DataSettings
from megatron_slm.errors import UserError
from megatron_slm.reference.filtering import (
    DocumentExcess,
    Measured,
    StoredLosses,
    document_excess,
    highest,
    least_share,
)
from megatron_slm.reference.store import BLOCK_ROWS, ScoreFile
from tests.refusal import refuses
from tests.unit.test_store import write_scores

MEANS = st.lists(st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 0.5, 3.0]), min_size=1, max_size=40)


@given(MEANS, st.floats(0.001, 1.0))
def test_the_documents_of_highest_mean_are_kept_exactly_and_ties_go_to_the_earlier(
    means: list[float], keep: float
) -> None:
    count = max(1, math.floor(keep * len(means) + 0.5))
    best = sorted(range(len(means)), key=lambda number: (-means[number], number))[:count]
    assert np.flatnonzero(highest(np.array(means), keep)).tolist() == sorted(best)


@given(MEANS, st.data())
def test_the_least_share_keeps_one_of_some_documents_and_less_keeps_none(
    means: list[float], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(means) - 1))
    some = slice(start, data.draw(st.integers(start + 1, len(means))))
    mean_D = np.array(means)
    least = least_share(mean_D, some)
    assert highest(mean_D, least)[some].sum() == 1
    if least > 1 / len(means):  # one document is always kept
        assert not highest(mean_D, least - 1 / len(means))[some].any()


def make_corpus(folder: Path, lengths: list[int], mask: list[bool] | None = None) -> Corpus:
    """Write a corpus with documents of these lengths; all token ids are 0."""
    number = len(list(folder.glob("*.idx")))
    prefix, tokens = str(folder / f"corpus{number}"), sum(lengths)
    np.array(lengths, dtype=np.int32).tofile(folder / "lengths")
    write_index(Path(f"{prefix}.idx"), "uint16", folder / "lengths")
    Path(f"{prefix}.bin").write_bytes(bytes(2 * tokens))
    sha256 = {".bin": f"b{number}", ".idx": f"i{number}"}
    if mask is not None:
        Path(f"{prefix}.mask").write_bytes(bytes(mask))
        sha256 |= {".mask": "m"}
    return Corpus(prefix, f"corpus{number}", len(lengths), tokens, 1, "t", sha256)


def make_losses(path: Path, values: np.ndarray, column: int = 0) -> StoredLosses:
    """Write a file that holds these losses in the given column."""
    columns = np.stack([np.full_like(values, 77.0), values][1 - column :], axis=-1)
    write_scores(path, columns, "float32")
    return StoredLosses(ScoreFile(path, *columns.shape, "float32"), column)  # type: ignore[call-arg]


def brute_force(lengths: list[int], excess: np.ndarray, counts: np.ndarray) -> DocumentExcess:
    ends = np.cumsum(lengths)
    parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    totals = [float(excess[part][counts[part]].sum()) for part in parts]
    return DocumentExcess(np.array(totals), np.array([int(counts[part].sum()) for part in parts]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum), st.integers(1, 12), st.data())
def test_sums_over_documents_equal_those_of_one_document_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], stretch: int, data: st.DataObject
) -> None:
    """For documents of any length, 0 included, and stretches of any size; sums of eighths are exact."""
    folder, tokens = tmp_path_factory.mktemp("corpus"), sum(lengths)
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    draw = np.random.default_rng(tokens)
    base, reference = (draw.integers(0, 64, tokens).astype(np.float32) / 8 for _ in range(2))
    base[draw.random(tokens) < 0.1] = np.inf
    corpus = make_corpus(folder, lengths, mask)
    reports: list[int] = []
    losses = make_losses(folder / "a", base, column=1), make_losses(folder / "b", reference)
    found = document_excess(Measured(corpus, *losses), reports.append, stretch)
    counts = np.isfinite(base) & (np.ones(tokens, dtype=bool) if mask is None else np.array(mask))
    expected = brute_force(lengths, base.astype(np.float64) - reference, counts)
    assert found.total_D.tolist() == expected.total_D.tolist()
    assert found.count_D.tolist() == expected.count_D.tolist()
    for mean, total, count in zip(found.mean_D, expected.total_D, expected.count_D, strict=True):
        assert mean == (total / count if count else -math.inf)
    assert reports[-1] == tokens


def test_a_long_document_is_read_in_stretches_and_a_corrupted_block_is_an_error(tmp_path: Path) -> None:
    lengths = [3 * BLOCK_ROWS + 7, 5]
    values = np.random.default_rng(0).integers(0, 64, sum(lengths)).astype(np.float32) / 8
    corpus = make_corpus(tmp_path, lengths)
    base, reference = make_losses(tmp_path / "a", values), make_losses(tmp_path / "b", values[::-1].copy())
    found = document_excess(Measured(corpus, base, reference), lambda _: None, 1000)
    excess = values.astype(np.float64) - values[::-1]
    assert found.total_D.tolist() == [excess[: lengths[0]].sum(), excess[lengths[0] :].sum()]
    assert found.mean_over(np.array([True, True])) == excess.sum() / len(excess)
    assert math.isnan(found.mean_over(np.array([False, False])))
    with (tmp_path / "b").open("r+b") as stream:
        stream.seek(4 * (2 * BLOCK_ROWS + 1))
        stream.write(b"\x00\x00\x80\x40")
    corrupted = StoredLosses(ScoreFile(tmp_path / "b", sum(lengths), 1, "float32"), 0)
    with pytest.raises(UserError) as caught:
        document_excess(Measured(corpus, base, corrupted), lambda _: None)
    assert caught.value.value == tmp_path / "b" and f"tokens {2 * BLOCK_ROWS} to" in caught.value.reason


def described(name: str, documents: int) -> Corpus:
    return Corpus(f"data/{name}", name, documents, 10 * documents, 1, "t", {".bin": f"{name} b", ".idx": f"{name} i"})


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.lists(st.booleans(), min_size=1, max_size=30))
def test_a_list_reads_back_as_it_was_written_wherever_the_corpus_lies(
    tmp_path_factory: pytest.TempPathFactory, web: list[bool], books: list[bool]
) -> None:
    folder = tmp_path_factory.mktemp("keep")
    corpora, kept = [described("web", len(web)), described("books", len(books))], [np.array(web), np.array(books)]
    for name in ("a", "b"):
        write_keep_list(folder / name, corpora, kept, {"keep": 0.5})
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    found = open_keep_list(str(folder / "a"))
    moved = dataclasses.replace(corpora[1], prefix="elsewhere/moved")
    assert found.documents(corpora[0]).tolist() == web and found.documents(moved).tolist() == books
    with refuses("data.keep", None, "does not cover data/code, only web, books"):
        found.documents(described("code", 5))


def of_another_version(tensors: dict[str, Any], text: dict[str, Any]) -> None:
    text["format_version"] = 2


def without_its_bits(tensors: dict[str, Any], text: dict[str, Any]) -> None:
    del tensors["web"]


def with_fewer_bits(tensors: dict[str, Any], text: dict[str, Any]) -> None:
    tensors["web"] = tensors["web"][:1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of_another_version, "format version is 2"),
        (without_its_bits, "does not have one bit per document"),
        (with_fewer_bits, "does not have one bit per document"),
    ],
)
def test_a_list_that_says_something_else_is_refused(tmp_path: Path, change: Callable[..., None], expected: str) -> None:
    path = tmp_path / "keep"
    write_keep_list(path, [described("web", 20)], [np.arange(20) < 7], {})
    tensors = load_file(path)
    text = {"format_version": 1, "corpora": [{"name": "web", "documents": 20, "sha256": {}}]}
    change(tensors, text)
    path.write_bytes(save(tensors, {"keep_list": json.dumps(text)}))
    with refuses("data.keep", path, expected):
        open_keep_list(str(path))


@pytest.mark.parametrize("content", [b"", b"text", save({"a": np.zeros(3)}), b"cut"])
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keep"
    if content == b"cut":
        write_keep_list(path, [described("web", 20)], [np.arange(20) < 7], {})
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.write_bytes(content)
    with refuses("data.keep", tmp_path / "keep", "not a keep-list"):
        open_keep_list(str(path))


def test_a_run_without_a_list_has_the_order_that_it_had_before_there_were_lists() -> None:
    """Compare with the fingerprint in the run directories of version 0.1.0."""
    corpora = [
        Corpus("data/web", "web", 300, 31549, 1, "t", {".bin": "b", ".idx": "i"}),
        Corpus("data/books", "books", 60, 6595, 1, "t", {".bin": "c", ".idx": "j"}),
    ]
    data = DataSettings(train=["data/web", "data/books"], seq_length=32, split="98,2,0")
    assert (
        order_fingerprint(data, corpora, 3, 3200) == "dbdbe1b7b34d5a5d05d8ef7e4df1fbf996ce14203b94c4ce6b6dbaae7bf91403"
    )
