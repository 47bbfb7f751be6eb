"""Work that fails on one rank fails on all ranks."""

import pytest

from megatron_slm.dist import World, agree, all_reduce_sum, gather_objects
from megatron_slm.errors import AgreedError, UserError
from tests.gloo import run_ranks

TOO_HIGH = UserError("training.lr", 5, "it is too high", "Lower it")


def agreement(world: World, kind: str, culprit: int) -> tuple[str, str]:
    """Return the type and the text of the error that `agree` raises on this rank, or of its result."""

    def work() -> int:
        if world.rank == culprit:
            raise {"user": TOO_HIGH, "defect": OSError("no space left")}[kind]
        return world.rank

    try:
        return "result", str(agree(work))
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_users_error_on_one_rank_is_the_same_error_on_all(culprit: int) -> None:
    assert run_ranks(agreement, 3, "user", culprit) == [(AgreedError.__name__, str(TOO_HIGH))] * 3


def test_another_error_keeps_its_kind_where_it_happened_and_stops_the_others() -> None:
    found = run_ranks(agreement, 3, "defect", 1)
    assert found[1] == ("OSError", "no space left")
    assert found[0] == found[2] == ("RuntimeError", "rank 1 failed: no space left")


def test_without_an_error_each_rank_has_its_own_result() -> None:
    assert run_ranks(agreement, 3, "user", 9) == [("result", "0"), ("result", "1"), ("result", "2")]


def small_collectives(world: World) -> tuple[float, list[int]]:
    import torch

    mine = torch.tensor(float(world.rank))
    return float(all_reduce_sum(mine)) + float(mine), gather_objects(world.rank)


def test_sums_leave_the_value_alone_and_objects_come_in_the_order_of_ranks() -> None:
    assert run_ranks(small_collectives, 3) == [(3.0, [0, 1, 2]), (4.0, [0, 1, 2]), (5.0, [0, 1, 2])]
