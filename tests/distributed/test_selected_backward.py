"""Rows and replay at every stage of ZeRO: the result does not depend on the number of ranks."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.test_step import on_ranks
from tests.steps import Case, assert_same_run, flat, flipped

WAYS = ("rows", "replay")
FIVE = Case(steps=5, ratio=0.5)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {way: on_ranks(1, replace(FIVE, backward=way, stage=None)) for way in WAYS}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_under_zero_3_equal_one_plain_process(alone: dict[str, dict], way: str, world_size: int) -> None:
    if world_size == 3:
        six = replace(FIVE, steps=2, global_batch_size=6, micro_batch_size=1, backward=way)
        expected = on_ranks(1, replace(six, micro_batch_size=3, stage=None))
        assert_same_run(expected, on_ranks(3, six))
        return
    assert_same_run(alone[way], on_ranks(world_size, replace(FIVE, backward=way, micro_batch_size=4 // world_size)))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_every_stage_equals_the_plain_backend(alone: dict[str, dict], way: str, stage: int) -> None:
    assert_same_run(alone[way], on_ranks(2, replace(FIVE, backward=way, micro_batch_size=2, stage=stage)))


def test_rows_and_replay_have_the_same_gradient_which_is_not_the_exact_one(alone: dict[str, dict]) -> None:
    rows, replay = (flat(alone[way]["gradient"]) for way in WAYS)
    exact = flat(on_ranks(1, replace(FIVE, steps=1, stage=None))["gradient"])
    assert (rows - replay).norm() <= 1e-5 * rows.norm()
    assert (rows - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("way", WAYS)
def test_a_pool_of_the_whole_step_runs_its_batches_again(way: str) -> None:
    case = replace(FIVE, steps=2, backward=way, pool="step")
    expected = on_ranks(1, replace(case, micro_batch_size=8, stage=None))
    assert_same_run(expected, on_ranks(2, replace(case, micro_batch_size=2)))


@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_under_zero_3_changes_nothing(alone: dict[str, dict], way: str) -> None:
    assert_same_run(alone[way], on_ranks(2, replace(FIVE, backward=way, micro_batch_size=2, checkpointing=True)))


@pytest.mark.parametrize("way", WAYS)
def test_ranks_without_a_selected_token_take_part(way: str) -> None:
    """Two sequences select one token in all, and one of them has no valid token."""
    case = Case(global_batch_size=2, micro_batch_size=1, ratio=0.01, backward=way)
    one = on_ranks(1, replace(case, micro_batch_size=2, stage=None))
    two = on_ranks(2, case)
    assert one["selected"] == two["selected"] == [1]
    # Not the weights: of one token most gradients are round-off, of which AdamW makes whole steps.
    gradient = flat(one["gradient"])
    assert (gradient - flat(two["gradient"])).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_selects_all_tokens_is_exact(way: str) -> None:
    case = Case(steps=2, micro_batch_size=2, objective="clm")
    assert torch.equal(flat(on_ranks(2, case)["after"]), flat(on_ranks(2, replace(case, backward=way))["after"]))


@pytest.mark.parametrize("way", WAYS)
def test_bf16_under_zero_3_selects_and_updates_as_the_exact_student(way: str) -> None:
    case = Case(micro_batch_size=2, precision=torch.bfloat16)
    found, exact = on_ranks(2, replace(case, backward=way)), on_ranks(2, case)
    assert all(update.applied for update in found["updates"])
    assert flipped(exact["chosen"], found["chosen"])[0] == 0
    assert torch.nn.functional.cosine_similarity(flat(found["gradient"]), flat(exact["gradient"]), dim=0) > 0.5
