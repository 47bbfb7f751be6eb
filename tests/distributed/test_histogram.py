"""The histogram and the quantiles of the excess loss, over the tokens of all ranks."""

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_slm.dist import World, gather_objects
from megatron_slm.training.objective import Choice
from megatron_slm.training.statistics import StepStatistics
from megatron_slm.types import Batch
from tests.distributed.test_data_parallel import in_pairs
from tests.gloo import run_ranks

LENGTH = 50


def pool_of(world: World, number: int, empty: bool) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Return a batch whose size, valid tokens and losses differ between ranks; some losses lie on the edge of a bin."""
    draw = torch.Generator().manual_seed(100 * number + world.data.rank)
    shape = (1 + world.data.rank, LENGTH)
    valid = torch.rand(shape, generator=draw) < 0.3 + 0.2 * world.data.rank
    student, reference = (4 * torch.randn(shape, generator=draw) for _ in range(2))
    reference[:, ::5], student[:, ::5] = 0, torch.randint(-9, 9, (LENGTH // 5,), generator=draw) / 4
    student[:, 1::7] += 40 * (-1) ** number
    ids = torch.zeros(shape, dtype=torch.long)
    source = torch.zeros(shape[0], dtype=torch.long)
    batch = Batch(ids, ids, valid & (not empty), ids, source, source, ids, source * 0)
    return batch, {"student.loss": student, "reference.loss": reference}


def statistics_of_pools(world: World, empty: bool) -> tuple[StepStatistics, np.ndarray]:
    """Return the statistics of two pools, not yet reduced, and the excess losses of this rank."""
    statistics, mine = StepStatistics(1, world), []
    for number in range(2):
        batch, signals = pool_of(world, number, empty)
        choice = Choice(batch.valid_BT, {"loss": batch.valid_BT.float()}, torch.tensor(0.0), batch.valid_BT)
        statistics.add(batch, signals, choice)
        mine.append((signals["student.loss"] - signals["reference.loss"])[batch.valid_BT].double().numpy())
    return statistics, np.concatenate(mine)


def histogram_of_pools(world: World, empty: bool) -> dict[str, Any]:
    statistics, mine = statistics_of_pools(world, empty)
    return {"found": statistics.excess_histogram(), "values": np.concatenate(gather_objects(mine))}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_histogram_counts_the_tokens_of_all_ranks(ranks: int) -> None:
    for answer in run_ranks(histogram_of_pools, ranks, False):
        found, values = answer["found"], answer["values"]
        assert values.min() < -16 and values.max() > 16
        expected, edges = np.histogram(values.clip(-16, 16), bins=np.linspace(-16, 16, 129))
        assert found.counts == expected.tolist() and found.edges == edges.tolist()
        assert sum(found.counts) == len(values)
        assert found.total == pytest.approx(values.sum()) and found.squares == pytest.approx((values**2).sum())


def test_a_step_without_a_valid_token_has_an_empty_histogram() -> None:
    assert run_ranks(histogram_of_pools, 1, True)[0]["found"].counts == []


QUANTILES = (0.01, 0.4, 0.5, 0.9, 0.999)


def quantiles_of_pools(world: World, empty: bool) -> tuple[list[float], list[float], np.ndarray]:
    """Return the quantiles over all ranks, the sums of two numbers of each rank, and the values of all ranks."""
    statistics, mine = statistics_of_pools(world, empty)
    sums = statistics.reduce(world.rank, 1.0)
    return statistics.excess_quantiles(QUANTILES), sums, np.concatenate(gather_objects(mine))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_quantiles_are_those_of_a_sort_over_all_ranks(ranks: int) -> None:
    for found, sums, values in run_ranks(quantiles_of_pools, ranks, False):
        ranked = np.sort(values.astype(np.float32))[::-1]
        kept = [max(1, math.floor((1 - q) * len(ranked) + 0.5)) for q in QUANTILES]
        assert found == [float(ranked[k - 1]) for k in kept]
        assert sums == [sum(range(ranks)), ranks]


def sums_and_quantiles(world: World) -> tuple[dict[str, float], list[float]]:
    statistics, _ = statistics_of_pools(in_pairs(world) if world.size == 4 else world, False)
    statistics.reduce()
    return statistics.sums, statistics.excess_quantiles(QUANTILES)


def test_tokens_that_two_ranks_hold_count_once() -> None:
    (expected, quantiles), _ = run_ranks(sums_and_quantiles, 2)
    for sums, found in run_ranks(sums_and_quantiles, 4):
        assert found == quantiles and sums == pytest.approx(expected)


def test_a_step_without_a_valid_token_has_no_quantiles() -> None:
    found, _, _ = run_ranks(quantiles_of_pools, 2, True)[0]
    assert len(found) == len(QUANTILES) and all(map(math.isnan, found))


def count_all_reduces(world: World) -> tuple[int, int]:
    """Return the all-reduces of the step's sums, and those of the quantiles of its record."""
    statistics, _ = statistics_of_pools(world, False)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as counted:
        statistics.reduce(0.0)
        in_the_step = counted.call_count
        statistics.excess_quantiles(QUANTILES)
        return in_the_step, counted.call_count - in_the_step


def test_a_record_adds_two_all_reduces_to_those_of_the_step() -> None:
    assert run_ranks(count_all_reduces, 2) == [(1, 2)] * 2
