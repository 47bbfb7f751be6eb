"""Ranks that hold the same tokens: sums over tokens run over the data-parallel ranks, and count each token once."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.dist import DataParallel, World, all_reduce_sum
from tests.gloo import run_ranks
from tests.steps import Case, assert_same_run, run_steps

CASES = {
    "plain": Case(steps=2, stage=None, pool="micro_step"),
    "whole step, combined score": Case(
        steps=2,
        micro_batch_size=2,
        stage=None,
        pool="step",
        min_context=3,
        rule={
            "combine": "union",
            "of": [{"score": "excess", "ratio": 0.4}, {"score": "reference_loss", "ratio": 0.2}],
        },
    ),
    "ZeRO-3": Case(steps=2, micro_batch_size=2, stage=3),
    "clm": Case(steps=2, stage=None, objective="clm"),
}


def in_pairs(world: World) -> World:
    """Return the place of a rank of 4 among 2 data-parallel ranks of 2 ranks each, which hold the same tokens."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    data = DataParallel(world.rank // 2, world.size // 2, groups[world.rank % 2])
    return dataclasses.replace(world, data_parallel=data)


def run_in_pairs(world: World, case: Case) -> dict[str, Any]:
    return run_steps(in_pairs(world), case)


@pytest.mark.parametrize("name", CASES)
def test_pairs_of_ranks_that_hold_the_same_tokens_train_as_single_ranks(name: str) -> None:
    case = CASES[name]
    whole = dataclasses.replace(case, micro_batch_size=2 * case.micro_batch_size)
    alone, two, pairs = run_ranks(run_steps, 1, whole), run_ranks(run_steps, 2, case), run_ranks(run_in_pairs, 4, case)
    for found in pairs:
        if case.objective == "slm" and not case.rule:
            assert_same_run(two[0], found)
            assert_same_run(alone[0], found)
        for expected in (two[0], alone[0]):
            assert found["planned"] == expected["planned"]
            assert found["selected"] == expected["selected"]
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
            assert found["tokens"] == expected["tokens"]
            for sums, expected_sums in zip(found["sums"], expected["sums"], strict=True):
                compared = sums.keys() - {"threshold", "thresholds"}  # of which each rank adds its own
                assert {name: sums[name] for name in compared} == pytest.approx(
                    {name: expected_sums[name] for name in compared}, rel=1e-6
                )
            for sample, chosen in expected["chosen"].items():
                assert (found["chosen"][sample]["mask"] == chosen["mask"]).all()
            for parameter, gradient in expected["gradient"].items():
                difference = (found["gradient"][parameter] - gradient).norm()
                assert difference <= 1e-5 * gradient.norm() + 1e-8, parameter


def sums(world: World) -> tuple[float, float, int]:
    pairs = in_pairs(world)
    own = torch.tensor(10.0**pairs.data.rank)
    return float(all_reduce_sum(own)), float(all_reduce_sum(own, pairs.data.group)), pairs.replicas


def test_a_sum_runs_over_all_ranks_or_over_a_group() -> None:
    assert run_ranks(sums, 4) == [(22.0, 11.0, 2)] * 4


def test_by_default_all_ranks_hold_different_tokens() -> None:
    world = World(2, 4, 2, torch.device("cpu"))
    assert world.data == DataParallel(2, 4, None) and world.replicas == 1
