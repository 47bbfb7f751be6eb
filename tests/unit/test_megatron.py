"""The private names of megatron-core that data/megatron.py relies on."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_slm.data import megatron
from megatron_slm.data.megatron import build_packed_documents
from megatron_slm.prepare.prepare import prepare_corpus
from tests.texts import sentence, write_jsonl

T = 16


@pytest.fixture(scope="module")
def prefixes(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    for name, first in (("a", 0), ("b", 50)):
        path = write_jsonl(folder / f"{name}.jsonl", [sentence(first + i) for i in range(20)])
        prepare_corpus([str(path)], str(folder / name), tokenizer=model)
    return [str(folder / name) for name in "ab"]


def build(prefixes: list[str], cache: Path, **changes: Any) -> Any:
    common = {"split": None, "kept": {}, "seq_length": T, "num_samples": 8, "seed": 1, "cache": cache}
    return build_packed_documents(prefixes, [1.0] * len(prefixes), **(common | changes))


def test_megatron_core_is_the_version_that_the_adapter_was_checked_against() -> None:
    """After an upgrade, check the names in the adapter's docstring, and then change the version there."""
    checked = ".".join(version("megatron-core").split(".")[:2])
    assert f"Checked against megatron-core {checked}." in str(megatron.__doc__)


def test_data_sets_have_the_names_that_the_adapter_reads(prefixes: list[str], tmp_path: Path) -> None:
    found = build(prefixes[:1], tmp_path)
    assert isinstance(found, megatron.PackedDocuments)
    for name in ("shuffle_index", "sample_index", "document_index"):
        assert isinstance(getattr(found, name), np.ndarray), f"GPTDataset.{name} has moved"
    index = found.dataset.index
    assert index.sequence_pointers.dtype == np.int64 and index.dtype_size == 2
    assert len(found.dataset.sequence_lengths) == 20
    item = found[0]
    assert [len(item[name]) for name in ("text", "offset", "position")] == [T + 1] * 3
    stored = np.fromfile(f"{prefixes[0]}.bin", np.uint16)
    assert (stored[item["offset"]] == item["text"]).all()


def test_items_of_a_blend_name_their_source_and_its_indices_are_mapped(prefixes: list[str], tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        found = build(prefixes, tmp_path)
        assert {int(found[number]["dataset_id"]) for number in range(8)} == {0, 1}
        assert isinstance(found.dataset_index, np.memmap) and isinstance(found.dataset_sample_index, np.memmap)
    finally:
        dist.destroy_process_group()


def test_the_rank_that_builds_indices_keeps_no_copy_of_them(prefixes: list[str], tmp_path: Path) -> None:
    """Only the pages of files are shared by the ranks of a host."""
    found = build(prefixes[:1], tmp_path)
    assert all(
        isinstance(index, np.memmap) for index in (found.shuffle_index, found.sample_index, found.document_index)
    )
    assert len(found.indices) == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the flags of mappings are in Linux's /proc")
def test_tokens_are_mapped_for_random_reads(prefixes: list[str], tmp_path: Path) -> None:
    found = build(prefixes[:1], tmp_path)
    mapping = Path("/proc/self/smaps").read_text().partition(f"{prefixes[0]}.bin")[2]
    assert "rr" in mapping.partition("VmFlags:")[2].partition("\n")[0].split(), "no advice for random reads"
    assert len(found) >= 8


def test_documents_outside_the_split_and_the_keep_list_are_not_read(prefixes: list[str], tmp_path: Path) -> None:
    """`split_matrix` reduces the work to the training part, and the keep-list removes documents from that."""
    kept = np.arange(20) % 2 == 0
    found = build(prefixes[:1], tmp_path, split="50,50,0", kept={prefixes[0]: kept})
    assert set(found.document_index.tolist()) == {0, 2, 4, 6, 8}
