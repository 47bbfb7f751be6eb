"""The optimizer step depends on its samples alone, not on how they are dealt to ranks and micro-steps."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_slm import score
from tests.gloo import run_ranks
from tests.steps import LENGTH, Case, assert_same_run, continued_length, flat, flipped, run_steps, valid_length

SIX = Case(steps=6)


def on_ranks(world_size: int, case: Case) -> dict:
    results = run_ranks(run_steps, world_size, case)
    for other in results[1:]:
        assert other["losses"] == results[0]["losses"]
        assert torch.equal(flat(results[0]["after"]), flat(other["after"]))
    means = [sums["loss"] / sums["valid"] for sums in results[0]["sums"]]
    assert results[0]["losses"] == pytest.approx(means)
    return results[0]


@cache
def six_steps(world_size: int, micro_batch_size: int, pool: str = "micro_step") -> dict:
    return on_ranks(world_size, replace(SIX, micro_batch_size=micro_batch_size, pool=pool))


@pytest.mark.parametrize("pool", ["micro_step", "step"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_do_not_change_the_run(world_size: int, pool: str) -> None:
    assert_same_run(six_steps(1, 4, pool), six_steps(world_size, 4 // world_size, pool))


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulation_does_not_change_a_run_that_pools_the_step(micro_batch_size: int) -> None:
    assert_same_run(six_steps(1, 4, "step"), six_steps(2, micro_batch_size, "step"))


def test_three_ranks_share_six_samples() -> None:
    case = Case(steps=3, global_batch_size=6, micro_batch_size=1)
    assert_same_run(on_ranks(1, replace(case, micro_batch_size=3)), on_ranks(3, case))


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_stages_and_the_plain_backend_do_what_zero_3_does(stage: int | None) -> None:
    assert_same_run(six_steps(2, 2), on_ranks(2, replace(SIX, micro_batch_size=2, stage=stage)))


def test_a_replicated_reference_scores_as_a_sharded_one() -> None:
    case = Case(steps=2, micro_batch_size=2)
    sharded, replicated = on_ranks(2, case), on_ranks(2, replace(case, shard=False))
    for sample, chosen in sharded["chosen"].items():
        assert (chosen["reference.loss"] == replicated["chosen"][sample]["reference.loss"]).all()
    assert torch.equal(flat(sharded["after"]), flat(replicated["after"]))


def test_ratio_one_is_causal_language_modeling() -> None:
    case = Case(steps=3, micro_batch_size=2)
    selective, causal = on_ranks(2, replace(case, ratio=1.0)), on_ranks(2, replace(case, objective="clm"))
    assert torch.equal(flat(selective["after"]), flat(causal["after"]))


def test_the_planned_count_is_the_selected_count_in_every_scope() -> None:
    for scope in ("global", "rank", "sequence"):
        for pool in ("micro_step", "step"):
            result = on_ranks(2, Case(steps=2, micro_batch_size=2, scope=scope, pool=pool, stage=None))
            assert result["planned"] == result["selected"] == [int(sums["selected"]) for sums in result["sums"]]


def test_the_random_score_is_the_same_on_any_number_of_ranks() -> None:
    case = Case(score="random", micro_batch_size=4, stage=None)
    one, two = on_ranks(1, case), on_ranks(2, replace(case, micro_batch_size=2))
    assert flipped(one["chosen"], two["chosen"]) == (0, 0)


def without_context(sample: int, min_context: int) -> torch.Tensor:
    """Return which labels of a sample lack context, counted label by label."""
    return torch.tensor(
        [
            token < continued_length(sample) and token < min_context
            for token in range(1, LENGTH + 1)  # token t of the sample follows t tokens, and is label t - 1
        ]
    )


@pytest.mark.parametrize(("world_size", "micro_batch_size", "samples"), [(1, 4, 8), (2, 2, 8), (3, 1, 6), (4, 1, 8)])
def test_tokens_that_lack_context_are_never_selected_and_not_counted(
    world_size: int, micro_batch_size: int, samples: int
) -> None:
    case = Case(steps=2, micro_batch_size=micro_batch_size, global_batch_size=samples, min_context=7)
    result = on_ranks(world_size, case)
    competing = {}
    for sample, chosen in result["chosen"].items():
        lacking = without_context(sample, 7)
        valid = torch.arange(LENGTH) < valid_length(torch.tensor(sample))
        competing[sample] = int((valid & ~lacking).sum())
        assert not (torch.from_numpy(chosen["mask"]) & lacking).any()
    assert sum(competing.values()) < sum(int(valid_length(torch.tensor(sample))) for sample in competing)
    at_once = world_size * micro_batch_size
    for step in range(case.steps):
        pools = [range(first, first + at_once) for first in range(step * samples, (step + 1) * samples, at_once)]
        counts = [sum(competing[sample] for sample in pool) for pool in pools]
        planned = sum(max(int(count > 0), math.floor(0.6 * count + 0.5)) for count in counts)
        assert result["planned"][step] == result["selected"][step] == planned
        assert result["sums"][step]["competing"] == sum(counts)
        # All valid tokens are in the mean loss, whether they compete or not.
        mine = range(step * samples, (step + 1) * samples)
        assert result["sums"][step]["valid"] == sum(int(valid_length(torch.tensor(sample))) for sample in mine)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_leaving_out_tokens_that_lack_context_is_the_same_on_any_number_of_ranks(unit: str) -> None:
    case = Case(steps=2, pool="step", min_context=5, rule={"unit": unit})
    one = on_ranks(1, case)
    for world_size in (2, 4):
        assert_same_run(one, on_ranks(world_size, replace(case, micro_batch_size=4 // world_size)))


@score(needs=("student.loss",))
def all_tied(signals: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.zeros_like(signals["student.loss"])


@pytest.mark.parametrize("pool", ["micro_step", "step"])
def test_ties_are_broken_by_the_order_of_samples_however_they_are_dealt(pool: str) -> None:
    case = Case(score=f"{__name__}:all_tied", pool=pool, stage=None)
    one, two = on_ranks(1, case), on_ranks(2, replace(case, micro_batch_size=2))
    assert flipped(one["chosen"], two["chosen"]) == (0, 0)
    assert one["planned"] == [int(sums["selected"]) for sums in one["sums"]]


def test_a_rank_without_a_valid_token_takes_part() -> None:
    assert valid_length(torch.tensor([0])) == 0
    two = on_ranks(2, Case(global_batch_size=2, micro_batch_size=1))
    one = on_ranks(1, Case(global_batch_size=2, micro_batch_size=2))
    assert_same_run(one, two)


def test_activation_checkpointing_does_not_change_the_run() -> None:
    case = Case(steps=2, micro_batch_size=2)
    assert_same_run(on_ranks(2, case), on_ranks(2, replace(case, checkpointing=True)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains_with_float32_losses(stage: int) -> None:
    result = on_ranks(2, Case(steps=2, micro_batch_size=2, precision=torch.bfloat16, stage=stage))
    chosen = next(iter(result["chosen"].values()))
    assert chosen["student.loss"].dtype == "float32" and chosen["student.loss"].shape == (LENGTH,)
    assert all(update.applied for update in result["updates"])
    assert (flat(result["after"]) - flat(result["before"])).norm() > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_has_the_direction_of_the_float32_gradient(stage: int) -> None:
    """From equal weights, and over ranks and micro-steps that are summed."""
    half = Case(micro_batch_size=2, objective="clm", precision=torch.bfloat16, stage=stage)
    found = on_ranks(2, half)
    full = replace(half, precision=torch.float32, stage=None, initial=found["before"])
    expected = on_ranks(2, full)
    assert torch.equal(flat(found["before"]), flat(expected["before"]))
    one, other = flat(found["gradient"]), flat(expected["gradient"])
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99
    assert float(one.norm()) == pytest.approx(float(other.norm()), rel=0.05)
