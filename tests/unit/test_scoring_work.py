"""The windows that score a corpus: every token once, in the context that the manifest describes; and imports."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_slm.data.corpus import Corpus, open_corpus, write_index
from megatron_slm.errors import UserError
from megatron_slm.reference.imports import open_import
from megatron_slm.reference.scoring import DocumentWork, Work

EOD = 1


def write_corpus(prefix: Path, lengths: list[int], ended: bool = True) -> Corpus:
    """Write documents of these lengths. Token ids are distinct, and the last of each document is end-of-document."""
    tokens = np.arange(sum(lengths)) + 10
    if ended:
        tokens[np.cumsum(lengths) - 1] = EOD
    Path(f"{prefix}.bin").write_bytes(tokens.astype("uint16").tobytes())
    Path(f"{prefix}.lengths").write_bytes(np.array(lengths, dtype=np.int32).tobytes())
    write_index(Path(f"{prefix}.idx"), "uint16", Path(f"{prefix}.lengths"))
    Path(f"{prefix}.tokenizer").mkdir(exist_ok=True)
    described = {"num_documents": len(lengths), "num_tokens": len(tokens), "num_bytes": 1, "tokenizer_fingerprint": ""}
    described |= {"sha256": {".bin": "", ".idx": ""}, "format_version": 1}
    Path(f"{prefix}.json").write_text(json.dumps(described))
    return open_corpus(str(prefix))


def contexts(work: Work) -> dict[int, list[int]]:
    """Return, for each row that is scored, the tokens before it in its sequence, and then its label."""
    found: dict[int, list[int]] = {}
    end = 0
    for number in range(work.num_shards):
        shard = work.shard(number)
        assert shard.start == end or shard.stop == shard.start
        end = max(end, shard.stop)
        for make in shard.batches:
            batch, row_BT = make()
            for b, t in batch.valid_BT.nonzero().tolist():
                row = int(row_BT[b, t])
                assert row not in found and shard.start <= row < shard.stop
                assert batch.position_ids_BT[b, : t + 1].tolist() == list(range(t + 1))
                found[row] = [*batch.tokens_BT[b, : t + 1].tolist(), int(batch.labels_BT[b, t])]
    assert end == work.rows
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    ended=st.booleans(),
    window=st.integers(1, 9),
    batch_tokens=st.integers(1, 40),
    shard_tokens=st.integers(1, 60),
)
@example(lengths=[3, 0, 4, 0, 0, 2], ended=True, window=4, batch_tokens=4, shard_tokens=50)
def test_every_token_is_scored_once_after_its_own_document(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    ended: bool,
    window: int,
    batch_tokens: int,
    shard_tokens: int,
) -> None:
    """Corpora from elsewhere have empty documents, and documents without an end-of-document token."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "c", lengths, ended)
    text = np.fromfile(f"{corpus.prefix}.bin", dtype="uint16").tolist()
    found = contexts(DocumentWork(corpus, EOD, window, batch_tokens, shard_tokens))
    row = 0
    for length in lengths:
        document = [EOD, *text[row : row + length]]
        for place in range(length):
            *context, label = found[row + place]
            assert label == document[place + 1]
            assert context == document[place + 1 - len(context) : place + 1]
            if place < window:
                assert len(context) == place + 1
            assert window - window // 2 < len(context) <= window or len(context) == place + 1 or window == 1
        row += length


def test_windows_of_one_length_stand_side_by_side(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [3, 8, 3, 8, 3, 8])
    shapes = [tuple(make().batch.tokens_BT.shape) for make in DocumentWork(corpus, EOD, 8, 16, 100).shard(0).batches]
    assert shapes == [(2, 8), (2, 8), (2, 3)]


def read_all(path: Path, corpus: Corpus, shard_tokens: int, first: int = 0) -> np.ndarray:
    source = open_import(path, corpus, shard_tokens)
    parts = [source.values(number, lambda done: None) for number in range(first, source.num_shards)]
    assert [part.start for part in parts] == [shard_tokens * number for number in range(first, source.num_shards)]
    return np.concatenate([part.values_NC[:, 0] for part in parts])


@pytest.mark.parametrize("shard_tokens", [1, 4, 7, 100])
@pytest.mark.parametrize("first", [0, 1])
def test_imported_log_probabilities_are_losses_of_the_tokens_in_order(
    tmp_path: Path, shard_tokens: int, first: int
) -> None:
    lengths = [3, 1, 9, 2]
    corpus = write_corpus(tmp_path / "c", lengths)
    logprobs = -np.arange(15, dtype=np.float64)
    np.save(tmp_path / "all.npy", logprobs)
    documents = np.split(logprobs, np.cumsum(lengths)[:-1])
    lines = [json.dumps({"logprobs": document.tolist()}) for document in documents]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("all.npy", "all.jsonl"):
        if first * shard_tokens < 15:
            found = read_all(tmp_path / name, corpus, shard_tokens, first)
            assert np.array_equal(found, np.arange(15)[first * shard_tokens :])


def assert_refused(path: Path, corpus: Corpus, reason: str) -> None:
    """Check that reading an import raises an error that names the file and matches `reason`."""
    with pytest.raises(UserError) as caught:
        read_all(path, corpus, 100)
    assert (caught.value.setting, caught.value.value) == ("--import", path)
    assert re.search(reason, caught.value.reason)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"logprobs": [-1, -2, null]}', "line 2 is not|not a log-probability"),
        ('{"logprobs": [-1, -2]}', "line 2 holds 2 log-probabilities, and document 2 of .* has 3 tokens"),
        ('{"logprob": [-1]}', "line 2 is not"),
        ("nonsense", "line 2 is not"),
        ('{"logprobs": [-1, 2, -3]}', "for token 4 is 2.0"),
        ('{"logprobs": [-1, -Infinity, -3]}', "for token 4 is -inf"),
        ('{"logprobs": [-1, -2, -3]}\n{"logprobs": []}', "it has 3 lines, and .* has 2 documents"),
        ("", "it has 1 lines, and .* has 2 documents"),
        (f'{{"logprobs": [-1, -{"9" * 400}, -3]}}', "line 2 is not"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    corpus = write_corpus(tmp_path / "c", [3, 3])
    path = tmp_path / "all.jsonl"
    path.write_text('{"logprobs": [-1, -2, -3]}\n' + (line + "\n" if line else ""))
    assert_refused(path, corpus, reason)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("all.jsonl", b"\xff\xfe"),
        ("all.jsonl.gz", b'{"logprobs": [-1, -2, -3]}'),
        ("all.jsonl.gz", gzip.compress(b'{"logprobs": [-1, -2, -3]}\n' * 2)[:-12]),
        ("all.jsonl.gz", gzip.compress(b'{"logprobs": [-1, -2, -3]}\n' * 2)[:10] + b"nonsense"),
    ],
    ids=["no text", "no gzip", "cut short", "a header alone"],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    corpus = write_corpus(tmp_path / "c", [3, 3])
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, corpus, "cannot be read")


def test_files_in_other_formats_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [3, 3])
    np.save(tmp_path / "short.npy", np.zeros(5))
    np.save(tmp_path / "whole.npy", np.zeros(6, dtype=np.int64))
    (tmp_path / "broken.npy").write_text("not an array")
    (tmp_path / "all.csv").write_text("1")
    np.save(tmp_path / "pickled.npy", np.array([{}] * 6), allow_pickle=True)
    (tmp_path / "empty.npy").touch()
    with (tmp_path / "several.npy").open("wb") as stream:
        np.savez(stream, np.zeros(6))
    for name, reason in {
        "short.npy": r"float64 values of shape \[5\], and .* has 6 tokens",
        "whole.npy": "int64 values",
        "broken.npy": "cannot be read as a NumPy array",
        "pickled.npy": "cannot be read as a NumPy array",
        "empty.npy": "cannot be read as a NumPy array",
        "several.npy": "cannot be read as a NumPy array",
        "all.csv": "suffix",
        "none.npy": "not a file",
    }.items():
        assert_refused(tmp_path / name, corpus, reason)
