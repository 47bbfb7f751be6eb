"""Every rule on any number of ranks: the same masks, weights that sum to the plan, and the same gradient."""

import itertools
import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.dist import World
from megatron_slm.selection import Rule
from tests.gloo import run_ranks
from tests.rules import Case, expected, random_case
from tests.steps import Case as Run
from tests.steps import flat, run_steps

WORLD_SIZES = (1, 2, 3, 4)


@cache
def cases() -> list[Case]:
    return [random_case(random.Random(seed)) for seed in range(80)]


def dealt(case: Case, size: int) -> list[list[int]]:
    """Return the rows of each rank: runs of different lengths, some of them empty."""
    rows, chance = list(range(len(case.valid))), random.Random(size)
    cuts = [0, *sorted(chance.choices(range(len(rows) + 1), k=size - 1)), len(rows)]
    return [rows[first:last] for first, last in itertools.pairwise(cuts)]


def choose_cases(world: World) -> list[dict[str, torch.Tensor]]:
    return [choose_case(case, dealt(case, world.size)[world.rank]) for case in cases()]


def choose_case(case: Case, rows: list[int]) -> dict[str, torch.Tensor]:
    rule, valid = Rule(case.settings), case.valid[rows]
    signals = {name: case.signals[name][rows] for name in rule.needs}
    planned = rule.plan([valid], case.ratio)
    return {**vars(rule.choose(signals, valid, case.ratio, position=case.position[rows])), "planned": planned[0]}


@cache
def answers(size: int) -> list[list[dict[str, torch.Tensor]]]:
    """Return the answer of each rank for each case."""
    return list(zip(*run_ranks(choose_cases, size), strict=True))


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_masks_weights_and_counts_are_those_of_sorts_and_loops(size: int) -> None:
    for case, ranks in zip(cases(), answers(size), strict=True):
        mask, weights, planned = expected(case, dealt(case, size))
        found = torch.cat([answer["weights"] for answer in ranks])
        assert torch.cat([answer["mask"] for answer in ranks]).tolist() == mask, case
        torch.testing.assert_close(found, torch.tensor(weights).view(found.shape), rtol=1e-6, atol=1e-6)
        for answer in ranks:
            assert answer["planned"] == planned
            assert answer["num_selected"] == sum(map(sum, mask)) and answer["num_valid"] == case.valid.sum()
        if found.any():
            assert found.double().sum().item() == pytest.approx(planned, rel=1e-6)


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
def test_the_number_of_ranks_changes_no_bit_of_a_mask(size: int) -> None:
    for case, alone, split in zip(cases(), answers(1), answers(size), strict=True):
        if case.settings.scope == "rank":
            continue
        assert torch.equal(alone[0]["mask"], torch.cat([answer["mask"] for answer in split]))
        torch.testing.assert_close(
            alone[0]["weights"], torch.cat([answer["weights"] for answer in split]), rtol=0, atol=1e-6
        )
        if case.settings.scope == "global":
            for answer in split:
                torch.testing.assert_close(answer["threshold"], alone[0]["threshold"], rtol=0, atol=0, equal_nan=True)


COMBINED = [{"score": "reference_loss", "ratio": 0.7}, {"score": "student_entropy", "ratio": 0.5}]
RULES: dict[str, dict[str, Any]] = {
    "a draw": {"weighting": "stochastic", "temperature": 0.5},
    "soft weights": {"weighting": "soft", "temperature": 0.5},
    "sequences": {"unit": "sequence"},
    "soft weights within sequences": {"unit": "both", "sequence_ratio": 0.7, "weighting": "soft"},
    "a union": {"combine": "union", "of": COMBINED},
    "an intersection": {"combine": "intersection", "of": COMBINED},
}


def run_rules(world: World) -> dict[str, Any]:
    case = Run(steps=2, global_batch_size=12, micro_batch_size=6 // world.size, stage=None)
    return {name: run_steps(world, replace(case, rule=rule)) for name, rule in RULES.items()}


@cache
def runs(size: int) -> dict[str, Any]:
    return run_ranks(run_rules, size)[0]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", RULES)
def test_a_run_on_several_ranks_has_the_gradient_of_one(size: int, name: str) -> None:
    one, many = runs(1)[name], runs(size)[name]
    assert one["planned"] == many["planned"] and one["selected"] == many["selected"]
    for sample, chosen in one["chosen"].items():
        assert (chosen["mask"] == many["chosen"][sample]["mask"]).all()
        assert np.abs(chosen["weights"] - many["chosen"][sample]["weights"]).max() < 1e-5
    gradient = flat(one["gradient"])
    assert gradient.norm() > 0
    assert (gradient - flat(many["gradient"])).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", RULES)
def test_what_is_counted_is_what_was_kept_and_what_is_weighed_is_the_plan(name: str) -> None:
    run = runs(2)[name]
    assert run["selected"] == [int(sums["selected"]) for sums in run["sums"]]
    weights = sum(chosen["weights"].sum() for chosen in run["chosen"].values())
    assert float(weights) == pytest.approx(sum(run["planned"]), rel=1e-5)
    if name in ("a union", "an intersection", "sequences"):
        assert run["selected"] != run["planned"]
