"""The order of samples, and how it is dealt to ranks."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.data.corpus import open_corpus, unique_names
from megatron_slm.data.loader import StepLoader, accumulation_steps, make_batch, runs_beside
from megatron_slm.data.samples import Samples, build_samples, cycle_seed
from megatron_slm.data.settings import DataSettings
from megatron_slm.dist import World
from tests.gloo import RankError, run_ranks
from tests.refusal import refuses
from tests.texts import open_tokens

T = 32
EOD = 1  # of the tokenizer that tests/runs.py trains


def build(
    world: World, folder: str, cache: str, train: list[str | float], order_tokens: int, total: int, split: str | None
) -> Samples:
    settings = DataSettings(train=[f"{folder}/{entry}" if isinstance(entry, str) else entry for entry in train])
    settings = replace(settings, seq_length=T, split=split)
    corpora = [open_corpus(f"{folder}/{entry}") for entry in train if isinstance(entry, str)]
    return build_samples(
        settings, corpora, seed=3, order_tokens=order_tokens, total_samples=total, cache=Path(cache), world=world
    )


def samples_of(world: World, *args: Any, split: str | None = None) -> dict[str, Any]:
    samples = build(world, *args, split)  # type: ignore[call-arg]
    return {"fingerprint": samples.fingerprint, "samples": [samples[n] for n in range(len(samples))]}


@pytest.fixture(scope="module")
def blend(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return 200 samples of web and books at 3 to 1, in cycles of 100."""
    cache = tmp_path_factory.mktemp("cache")
    train = [0.75, "web", 0.25, "books"]
    return run_ranks(samples_of, 1, str(corpora), str(cache), train, 100 * T, 200)[0] | {"cache": str(cache)}


def test_every_token_is_found_at_its_offset_in_its_source(corpora: Path, blend: dict) -> None:
    streams = [np.fromfile(corpora / f"{name}.bin", dtype=np.uint16) for name in ("web", "books")]
    assert all(stream[-1] == EOD for stream in streams)
    for sample in blend["samples"]:
        assert sample.text.shape == sample.offset.shape == (T + 1,)
        assert (streams[sample.source][sample.offset] == sample.text).all()


def test_positions_restart_where_documents_do(blend: dict) -> None:
    for sample in blend["samples"]:
        starts = np.flatnonzero(sample.text[:-1] == EOD) + 1
        assert (sample.position[starts] == 0).all() and sample.position[0] == 0
        assert np.flatnonzero(sample.position == 0).tolist() == [0, *starts]
        steps = np.diff(sample.position)
        assert ((steps == 1) | (sample.position[1:] == 0)).all()


def test_tokens_that_continue_an_earlier_document_are_counted(corpora: Path, blend: dict) -> None:
    starts = []
    for name in ("web", "books"):
        index = open_tokens(open_corpus(str(corpora / name))).index  # held: its arrays go with it
        starts.append(set((np.cumsum(index.sequence_lengths) - index.sequence_lengths).tolist()))
    counts = []
    for sample in blend["samples"]:
        begins = [place for place, offset in enumerate(sample.offset) if offset in starts[sample.source]]
        expected = begins[0] if begins else T + 1  # all tokens before the first document that begins here
        assert sample.continued == expected
        counts.append(expected)
    assert 0 in counts and T + 1 in counts and len(set(counts)) > 20


def test_labels_lack_context_up_to_the_first_document_or_the_limit(blend: dict) -> None:
    samples = blend["samples"][:40]
    for reset_attention in (False, True):
        batch = make_batch(samples, list(range(40)), reset_attention)
        for limit in (0, 1, 5, T, 2 * T):
            expected = [
                # Label t is token t + 1, which t + 1 tokens precede.
                [place < sample.continued and place < limit for place in range(1, T + 1)]
                for sample in samples
            ]
            assert batch.lacks_context_BT(limit).tolist() == expected


def test_the_blend_has_its_weights(blend: dict) -> None:
    shares = np.mean([sample.source for sample in blend["samples"][:100]])
    assert shares == pytest.approx(0.25, abs=0.02)


def test_a_second_cycle_is_another_order_of_the_same_length(blend: dict) -> None:
    assert len(blend["samples"]) == 200
    first, second = ([s.offset[0] for s in part] for part in (blend["samples"][:100], blend["samples"][100:]))
    assert first != second


def test_cycles_of_neighbouring_seeds_differ() -> None:
    seeds = {cycle_seed(seed, cycle) for seed in range(100) for cycle in range(100)}
    assert len(seeds) > 9990 and min(seeds) >= 0 and max(seeds) < 2**32


@pytest.mark.parametrize(("split", "left"), [("0.15,99.85,0", 0), ("0.17,99.83,0", 1), ("100,0,0", 300)])
def test_a_split_that_leaves_no_document_is_refused(corpora: Path, tmp_path: Path, split: str, left: int) -> None:
    """megatron-core rounds to whole documents, of which there are 300."""
    args = (str(corpora), str(tmp_path), ["web"], T, 1)
    if left:
        assert len(run_ranks(partial(samples_of, split=split), 1, *args)[0]["samples"]) == 1
    else:
        with pytest.raises(RankError, match=r"data\.split is .*none of the 300 documents of .*web "):
            run_ranks(partial(samples_of, split=split), 1, *args)


def test_a_longer_run_begins_with_the_same_samples(corpora: Path, blend: dict) -> None:
    train = [0.75, "web", 0.25, "books"]
    longer = run_ranks(samples_of, 1, str(corpora), blend["cache"], train, 100 * T, 300)[0]
    assert longer["fingerprint"] == blend["fingerprint"]
    for one, other in zip(blend["samples"], longer["samples"], strict=False):
        assert (one.text == other.text).all() and (one.offset == other.offset).all()


def test_two_ranks_and_a_cold_cache_read_the_same_order(corpora: Path, tmp_path: Path, blend: dict) -> None:
    """Weights are normalised: 3 to 1 equals 0.75 to 0.25, although the fingerprints differ."""
    train = [3.0, "web", 1.0, "books"]
    for found in run_ranks(samples_of, 2, str(corpora), str(tmp_path), train, 100 * T, 100):
        for one, other in zip(found["samples"], blend["samples"], strict=False):
            assert (one.text == other.text).all()


def test_a_cache_that_was_left_unfinished_is_built_again(corpora: Path, tmp_path: Path, blend: dict) -> None:
    train = [0.75, "web", 0.25, "books"]
    args = (str(corpora), str(tmp_path), train, 100 * T, 100)
    run_ranks(samples_of, 1, *args)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "complete").unlink()
    for index in folder.glob("*.npy"):
        index.write_bytes(index.read_bytes()[:50])
    for one, other in zip(run_ranks(samples_of, 1, *args)[0]["samples"], blend["samples"], strict=False):
        assert (one.text == other.text).all()


def test_a_split_keeps_to_its_documents(corpora: Path, tmp_path: Path) -> None:
    first = run_ranks(partial(samples_of, split="25,75,0"), 1, str(corpora), str(tmp_path), ["web"], 400 * T, 400)[0]
    corpus = open_corpus(str(corpora / "web"))
    assert 0 < max(int(s.offset.max()) for s in first["samples"]) < 0.35 * corpus.num_tokens
    assert {sample.source for sample in first["samples"]} == {0}


def test_corpora_without_weights_count_by_their_tokens(corpora: Path, tmp_path: Path) -> None:
    found = run_ranks(samples_of, 1, str(corpora), str(tmp_path), ["web", "books"], 400 * T, 400)[0]
    sizes = [open_corpus(str(corpora / name)).num_tokens for name in ("web", "books")]
    share = np.mean([sample.source for sample in found["samples"]])
    assert share == pytest.approx(sizes[1] / sum(sizes), abs=0.02)


class Numbered:
    """Samples whose tokens equal their number."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, ordinal: int) -> object:
        from megatron_slm.data.samples import Sample

        return Sample(np.full(T + 1, ordinal), np.arange(T + 1), np.arange(T + 1), 0)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 12), (1, 4), (2, 3), (3, 2), (4, 1)])
def test_samples_are_dealt_in_runs_of_the_micro_batch(ranks: int, micro_batch_size: int) -> None:
    dealt: list[list[list[int]]] = []
    for rank in range(ranks):
        world = World(rank, ranks, rank, torch.device("cpu"))
        batches = StepLoader(Numbered(), micro_batch_size, 12, False, world).load(24)
        dealt.append([batch.tokens_BT[:, 0].tolist() for batch in batches])
    in_order = [n for micro_step in zip(*dealt, strict=True) for share in micro_step for n in share]
    assert in_order == list(range(24, 36))
    for share in (share for rank in dealt for share in rank):
        assert share == list(range(share[0], share[0] + micro_batch_size))


def test_seeking_equals_reading_through() -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    through = StepLoader(Numbered(), 2, 4, False, world)
    for consumed in (0, 4, 8):
        read = through.load(consumed)
    sought = StepLoader(Numbered(), 2, 4, False, world).load(8)
    assert (
        [b.sample_index_B.tolist() for b in read] == [b.sample_index_B.tolist() for b in sought] == [[8, 9], [10, 11]]
    )


def test_an_id_outside_the_vocabulary_is_refused_with_its_place() -> None:
    loader = StepLoader(Numbered(), 2, 4, False, World(0, 1, 0, torch.device("cpu")), (), 10, ["web"])
    assert loader.read(4)[1].tokens_BT[1, 0] == 7
    with refuses("data.train", "web", "token 0 of its .bin is 10, and its tokenizer has 10 ids"):
        loader.read(8)


SKIP = [(40, 41), (30, 33), (26, 28), (27, 29), (0, 5)]
"""Unsorted, touching and overlapping; one lies behind."""
LEFT = [n for n in range(24, 100) if not any(first <= n < last for first, last in SKIP)]


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 12), (1, 4), (2, 3), (3, 2)])
def test_the_samples_beside_the_skipped_ones_are_dealt_as_usual(ranks: int, micro_batch_size: int) -> None:
    for step in range(3):
        dealt: list[list[list[int]]] = []
        for rank in range(ranks):
            world = World(rank, ranks, rank, torch.device("cpu"))
            loader, position = StepLoader(Numbered(), micro_batch_size, 12, False, world, SKIP), 24
            for _ in range(step):
                loader.load(position)
                position = loader.end(position)
            batches = loader.load(position)
            assert all((b.tokens_BT[:, 0] == b.sample_index_B).all() for b in batches)
            dealt.append([batch.sample_index_B.tolist() for batch in batches])
        in_order = [n for micro_step in zip(*dealt, strict=True) for share in micro_step for n in share]
        assert in_order == LEFT[12 * step : 12 * (step + 1)]
    assert loader.end(24, 3) == LEFT[35] + 1 and loader.end(24, 0) == 24


def test_a_range_behind_the_position_or_far_ahead_changes_nothing() -> None:
    assert runs_beside([(0, 24), (100, 200)], 24, 12) == [range(24, 36)]
    assert runs_beside([(0, 30), (32, 33)], 24, 4) == [range(30, 32), range(33, 35)]


def test_cycles_are_built_as_far_as_requested(corpora: Path, tmp_path: Path) -> None:
    built = run_ranks(reached, 2, str(corpora), str(tmp_path))
    assert built == [[100, 100, 300]] * 2


def reached(world: World, folder: str, cache: str) -> list[int]:
    """Return the numbers of built samples: of one cycle, and after requests for few and for many."""
    samples = build(world, folder, cache, ["books"], 100 * T, 1, None)
    lengths = [len(samples)]
    for total in (50, 201):
        samples.reach(total)
        lengths.append(len(samples))
    assert samples[299].text.shape == (T + 1,)
    return lengths


def test_a_batch_that_cannot_be_dealt_names_the_settings() -> None:
    assert accumulation_steps(24, 3, 4) == 2
    with refuses("training.global_batch_size", 10, "not a multiple"):
        accumulation_steps(10, 3, 4)


def test_repeated_names_are_made_unique() -> None:
    names = unique_names(["a/web", "b/web", "c/books", "d/web"])
    assert len(set(names)) == 4 and names[0] == "web" and names[2] == "books"
