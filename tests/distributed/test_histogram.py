"""The histogram of the excess loss, over the tokens of all ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.dist import World, gather_objects
from megatron_slm.training.objective import Choice
from megatron_slm.training.statistics import StepStatistics
from megatron_slm.types import Batch
from tests.gloo import run_ranks

LENGTH = 50


def pool_of(world: World, number: int, empty: bool) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Return a batch whose size, valid tokens and losses differ between ranks; some losses lie on the edge of a bin."""
    draw = torch.Generator().manual_seed(100 * number + world.rank)
    shape = (1 + world.rank, LENGTH)
    valid = torch.rand(shape, generator=draw) < 0.3 + 0.2 * world.rank
    student, reference = (4 * torch.randn(shape, generator=draw) for _ in range(2))
    reference[:, ::5], student[:, ::5] = 0, torch.randint(-9, 9, (LENGTH // 5,), generator=draw) / 4
    student[:, 1::7] += 40 * (-1) ** number
    ids = torch.zeros(shape, dtype=torch.long)
    source = torch.zeros(shape[0], dtype=torch.long)
    batch = Batch(ids, ids, valid & (not empty), ids, source, source, ids, source * 0)
    return batch, {"student.loss": student, "reference.loss": reference}


def histogram_of_pools(world: World, empty: bool) -> dict[str, Any]:
    statistics, mine = StepStatistics(1, world), []
    for number in range(2):
        batch, signals = pool_of(world, number, empty)
        choice = Choice(batch.valid_BT, {"loss": batch.valid_BT.float()}, torch.tensor(0.0), batch.valid_BT)
        statistics.add(batch, signals, choice)
        mine.append((signals["student.loss"] - signals["reference.loss"])[batch.valid_BT].double().numpy())
    histogram = statistics.excess_histogram()
    return {"found": histogram, "values": np.concatenate(gather_objects(np.concatenate(mine)))}


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
