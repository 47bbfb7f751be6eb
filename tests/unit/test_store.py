"""The store of scores: its size, its rounding error, and the damage that it detects."""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm.errors import UserError
from megatron_slm.reference.references import MixedReference, NoReference, StoredReference
from megatron_slm.reference.store import (
    BLOCK_ROWS,
    BlockChecksums,
    FileEntry,
    Manifest,
    ScoreFile,
    open_store,
)
from megatron_slm.signals import ENCODINGS, decode, encode
from megatron_slm.types import Batch, TokenSignals

ROWS = 3 * BLOCK_ROWS + 5


def write_scores(path: Path, values_NC: np.ndarray, encoding: str = "fixed16") -> bytes:
    """Write a file as scoring does, and return its table of checksums."""
    codes = encode(values_NC, encoding)
    blocks = BlockChecksums(codes[0].nbytes)
    for piece in np.array_split(np.frombuffer(codes.tobytes(), dtype=np.uint8), 5):
        blocks.feed(piece.tobytes())
    path.write_bytes(codes.tobytes() + blocks.table())
    return blocks.table()


def some_values(rows: int = ROWS, columns: int = 1) -> np.ndarray:
    return np.random.default_rng(rows).gamma(2.0, 2.0, (rows, columns)).astype(np.float32)


def write_store(folder: Path, **changes: object) -> Path:
    """Write a store of the corpus `web`, with changes to its manifest, and return its folder."""
    folder.mkdir()
    table = write_scores(folder / "web.scores", some_values())
    entry = FileEntry("web", ROWS, "data/web", {".bin": "b", ".idx": "i"}, zlib.crc32(table))
    manifest = Manifest("document", ["loss"], "fixed16", 0.0, "", 32, False, "", "t", {"path": "m"}, [entry])
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, **changes).text())  # type: ignore[arg-type]
    return folder


def batch_of(row_BT: list[list[int]], source_B: list[int]) -> Batch:
    """Make a batch whose labels are at these rows; a negative row is not valid."""
    rows = torch.tensor(row_BT)
    return Batch(
        tokens_BT=torch.zeros_like(rows),
        labels_BT=torch.zeros_like(rows),
        valid_BT=rows >= 0,
        position_ids_BT=torch.zeros_like(rows),
        sample_index_B=torch.arange(len(rows)),
        source_B=torch.tensor(source_B),
        label_offset_BT=rows,
        continued_B=torch.zeros(len(rows), dtype=torch.long),
    )


@given(st.lists(st.floats(0, 40, width=32), min_size=1, max_size=50))
def test_two_bytes_keep_the_order_and_stay_within_their_error(values: list[float]) -> None:
    kind = ENCODINGS["fixed16"]
    before = np.sort(np.array(values, dtype=np.float32))
    codes = encode(before, "fixed16")
    after = decode(codes, "fixed16")
    assert codes.itemsize == 2
    assert (np.diff(after) >= 0).all()
    inside = before <= kind.largest
    assert (np.abs(after - before)[inside] <= kind.max_error).all()
    assert (after[~inside] == np.float32(kind.largest)).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_float32_loses_nothing(values: list[float]) -> None:
    before = np.array(values, dtype=np.float32)
    assert np.array_equal(decode(encode(before, "float32"), "float32"), before)


def test_rows_are_read_by_number_in_any_order(tmp_path: Path) -> None:
    values = some_values(columns=2)
    write_scores(tmp_path / "web.scores", values, "float32")
    file = ScoreFile(tmp_path / "web.scores", ROWS, 2, "float32")
    rows = np.random.default_rng(0).permutation(ROWS)[:500]
    assert np.array_equal(file.read(rows), values[rows])


@pytest.mark.parametrize("place", [0, 2 * BLOCK_ROWS - 1, 2 * ROWS - 1, 2 * ROWS + 3])
def test_a_changed_byte_is_an_error_before_its_block_is_used(tmp_path: Path, place: int) -> None:
    path = tmp_path / "web.scores"
    write_scores(path, some_values())
    changed = bytearray(path.read_bytes())
    changed[place] ^= 1
    path.write_bytes(changed)
    file = ScoreFile(path, ROWS, 1, "fixed16")
    block = place // (2 * BLOCK_ROWS) if place < 2 * ROWS else 0
    untouched = [b for b in range(4) if b != block]
    file.read(np.array(untouched) * BLOCK_ROWS)
    with pytest.raises(UserError) as caught:
        file.read(np.array([min(ROWS, (block + 1) * BLOCK_ROWS) - 1]))
    assert caught.value.value == path and f"tokens {block * BLOCK_ROWS} to" in caught.value.reason
    with pytest.raises(UserError) as caught:
        list(file.check_all())
    assert caught.value.value == path


def test_a_file_cut_short_or_missing_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    path = store / "web.scores"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        open_store(str(store)).file_of("web")
    assert caught.value.value == path and f"{path.stat().st_size} bytes" in caught.value.reason
    path.unlink()
    with pytest.raises(UserError) as caught:
        open_store(str(store)).file_of("web")
    assert caught.value.value == path and "cannot be read" in caught.value.reason


def test_a_file_of_another_scoring_is_refused(tmp_path: Path) -> None:
    """Its size and the checksums of its blocks are right, but they are not those in the manifest."""
    store = write_store(tmp_path / "store")
    write_scores(store / "web.scores", some_values() + 1)
    with pytest.raises(UserError) as caught:
        open_store(str(store)).file_of("web")
    assert caught.value.value == store / "web.scores" and "manifest.json" in caught.value.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 1}', "cannot be read"),
        ('{"format_version": 1, "encoding": "fixed16", "files": []}', "cannot be read"),
        ('{"format_version": 3, "encoding": "fixed16"}', "version 3"),
        ('{"format_version": 1, "encoding": "log8"}', "log8"),
        (None, "holds no manifest.json"),
    ],
)
def test_a_folder_without_a_manifest_of_a_known_version_is_refused(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError) as caught:
        open_store(str(tmp_path), "filter.base")
    assert (caught.value.setting, caught.value.value) == ("filter.base", str(tmp_path))
    assert reason in caught.value.reason


def test_a_manifest_of_the_first_version_is_read(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store") / "manifest.json"
    fields = json.loads(path.read_text()) | {"format_version": 1}
    del fields["tokenizer_probe"]
    path.write_text(json.dumps(fields))
    store = open_store(str(tmp_path / "store"))
    assert (store.manifest.tokenizer_fingerprint, store.manifest.tokenizer_probe) == ("t", "")
    assert len(store.file_of("web").read(np.arange(3))) == 3


def test_a_corpus_is_found_by_its_content_and_the_differing_file_is_named(tmp_path: Path) -> None:
    store = open_store(str(write_store(tmp_path / "store")))
    assert store.name_for("elsewhere/moved", {".bin": "b", ".idx": "i", ".mask": "m"}) == "web"
    for prefix, sha256, differs in (("data/new", "ci", ".bin"), ("data/web", "bj", ".idx")):
        with pytest.raises(UserError) as caught:
            store.name_for(prefix, dict(zip((".bin", ".idx"), sha256, strict=True)))
        assert (caught.value.setting, caught.value.value) == ("reference.store", store.path)
        assert prefix in caught.value.reason and f"the {differs} differs" in caught.value.reason


def test_a_stored_reference_reads_each_label_from_its_own_corpus(tmp_path: Path) -> None:
    files = []
    for name, shift in (("web", 0.0), ("books", 20.0)):
        write_scores(tmp_path / name, some_values() % 10 + np.float32(shift), "float32")
        files.append(ScoreFile(tmp_path / name, ROWS, 1, "float32"))
    batch = batch_of([[5, 6, 4000], [7, -1, 9000]], [1, 0])
    loss_BT = StoredReference(files, ["loss"], packed=False).signals([batch], ())[0]["loss"]
    values = some_values()[:, 0] % 10
    expected = np.array([[*(values[[5, 6, 4000]] + np.float32(20.0))], [values[7], 0.0, values[9000]]])
    assert np.array_equal(loss_BT.numpy(), expected.astype(np.float32))


def test_a_packed_store_is_read_by_sample_and_position(tmp_path: Path) -> None:
    write_scores(tmp_path / "order", some_values(12, 2), "float32")
    reference = StoredReference([ScoreFile(tmp_path / "order", 12, 2, "float32")], ["loss", "entropy"], packed=True)
    batch = dataclasses.replace(batch_of([[0] * 4, [0] * 4], [7, 9]), sample_index_B=torch.tensor([2, 0]))
    found = reference.signals([batch], ("entropy",))[0]
    for column, name in enumerate(("loss", "entropy")):
        expected = some_values(12, 2)[:, column].reshape(3, 4)[[2, 0]]
        assert np.array_equal(found[name].numpy(), expected)


def test_reading_past_the_end_of_a_packed_store_is_an_error(tmp_path: Path) -> None:
    write_scores(tmp_path / "order", some_values(12), "float32")
    reference = StoredReference([ScoreFile(tmp_path / "order", 12, 1, "float32")], ["loss"], packed=True)
    batch = dataclasses.replace(batch_of([[0] * 4], [0]), sample_index_B=torch.tensor([3]))
    with pytest.raises(UserError) as caught:
        reference.signals([batch], ())
    assert caught.value.setting == "reference.store" and "12 tokens" in caught.value.reason


class Fixed:
    """A reference with the same losses for every batch."""

    def __init__(self, *losses: float) -> None:
        self._signals = {"loss": torch.tensor([list(losses)])}

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        return [self._signals for _ in batches]


def test_several_references_mix_by_the_formulas() -> None:
    one, other = Fixed(1.0, 4.0, 40.0), Fixed(3.0, 2.0, 50.0)
    batches = [batch_of([[0, 1, 2]], [0])]

    def mixed(mix: str) -> list[float]:
        return MixedReference([one, other], [1.0, 3.0], mix).signals(batches, ())[0]["loss"][0].tolist()  # type: ignore[arg-type]

    assert mixed("mean") == pytest.approx([2.5, 2.5, 47.5])
    assert mixed("minimum") == [1.0, 2.0, 40.0]
    probabilities = 0.25 * np.exp([-1.0, -4.0, -40.0]) + 0.75 * np.exp([-3.0, -2.0, -50.0])
    assert mixed("log_mixture") == pytest.approx(-np.log(probabilities))


def test_the_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    store = open_store(str(write_store(tmp_path / "store")))
    assert json.loads(store.manifest.text()) == json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert isinstance(NoReference().signals([], ()), list)
