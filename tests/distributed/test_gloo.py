"""Tests of the test harness: a failure on any rank fails the test."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron_slm.dist import World
from tests.gloo import PRELOADED, RankError, run_ranks


def add_ranks(world: World, start: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor(start + world.rank)
    dist.all_reduce(total)
    return world.rank, total


def misbehave(world: World, how: str) -> None:
    if world.rank == 1:
        if how == "raise":
            raise ValueError("of rank one")
        if how == "die":
            os._exit(7)
        if how == "hang":
            time.sleep(60)
    dist.barrier()


def look_around(world: World) -> tuple[set[str], list[str]]:
    return set(PRELOADED) - sys.modules.keys(), os.listdir(f"/proc/{os.getppid()}/task")


def test_results_are_returned_in_the_order_of_ranks():
    assert run_ranks(add_ranks, 3, 0.5) == [(rank, torch.tensor(4.5)) for rank in range(3)]


@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "rank 1 of 2 raised(.|\n)*misbehave(.|\n)*of rank one"), ("die", "rank 1 of 2 died with exit code 7")],
)
def test_a_rank_that_fails_ends_all_ranks(how, message):
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(misbehave, 2, how)
    assert time.monotonic() - start < 30


def test_ranks_that_hang_are_killed():
    with pytest.raises(RankError, match=r"ranks \[0, 1\] did not answer in time"):
        run_ranks(misbehave, 2, "hang", timeout=3.0)


def test_ranks_are_forked_from_one_thread_that_has_imported_everything():
    missing, threads = run_ranks(look_around, 1)[0]
    assert not missing
    assert len(threads) == 1
