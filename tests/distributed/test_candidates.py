"""The online choice of whole sequences: each rank trains on the best of its own candidates."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm import score
from megatron_slm.dist import World
from megatron_slm.training.candidates import best_rows
from megatron_slm.training.cost import StepTokens
from tests.gloo import run_ranks
from tests.steps import LENGTH, Case, assert_same_run, flat, flipped, run_steps, valid_length

SCORES = st.lists(st.sampled_from([math.nan, -math.inf, -1.0, -0.0, 0.0, 0.5, math.inf]), min_size=1, max_size=12)


@given(SCORES, st.data())
def test_the_highest_rows_are_kept_in_their_order_and_ties_go_to_the_earlier(
    scores: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(scores)))
    key = [(1, 0.0, row) if math.isnan(score) else (0, -score, row) for row, score in enumerate(scores)]
    best = [row for *_, row in sorted(key)[:count]]
    assert best_rows(torch.tensor(scores), count).tolist() == sorted(best)


def run_and_choose(world: World, case: Case) -> dict[str, Any]:
    """Return the records of a run, and the mean excess loss of each candidate of this rank, by a loop."""
    result = run_steps(world, case)
    times, accumulation = case.candidates or 1, len(result["ranked"]) // case.steps
    means: list[dict[int, float]] = []
    for number, (signals, valid_BT) in enumerate(result.pop("ranked")):
        width = times * case.micro_batch_size
        step, micro_step = divmod(number, accumulation)
        first = step * times * case.global_batch_size + (micro_step * world.size + world.rank) * width
        found = {}
        for row in range(width):
            assert valid_BT[row].sum() == valid_length(torch.tensor(first + row))
            excess = (signals["student.loss"][row] - signals["reference.loss"][row])[valid_BT[row]].tolist()
            found[first + row] = math.fsum(excess) / len(excess) if excess else -math.inf
            scored = {f"scored.{name}": signals[f"{name}.loss"][row].numpy() for name in ("student", "reference")}
            result["chosen"].get(first + row, {}).update(scored)
        means.append(found)
    return result | {"means": means}


@pytest.mark.parametrize("pool", ["micro_step", "step"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_rank_trains_on_the_best_of_its_own_candidates(world_size: int, pool: str) -> None:
    """Two micro-steps choose b samples per rank out of 3b; some candidates have no valid token."""
    case = Case(steps=2, micro_batch_size=2, global_batch_size=4 * world_size, candidates=3, pool=pool, stage=None)
    ranks = run_ranks(run_and_choose, world_size, case)
    best: list[set[int]] = [set() for _ in range(case.steps)]
    pools: list[list[int]] = [[] for _ in range(case.steps)]
    for micro_step in range(2 * case.steps):
        taken = []
        for rank in ranks:
            means = rank["means"][micro_step]
            taken += sorted(means, key=lambda sample: (-means[sample], sample))[:2]
        best[micro_step // 2].update(taken)
        pools[micro_step // 2].append(int(valid_length(torch.tensor(taken)).sum()))
    chosen = ranks[0]["chosen"]
    assert set(chosen) == best[0] | best[1] and all(len(samples) == case.global_batch_size for samples in best)
    planned = [[sum(counts)] if pool == "step" else counts for counts in pools]
    assert ranks[0]["planned"] == [sum(math.floor(0.6 * n + 0.5) for n in counts) for counts in planned]
    assert ranks[0]["selected"] == ranks[0]["planned"]
    for rank in ranks:
        for sample in rank["means"][0].keys() & chosen.keys():
            found = rank["chosen"][sample]
            assert np.abs(found["scored.student"] - found["student.loss"]).max() < 1e-5
            assert (found["scored.reference"] == found["reference.loss"]).all()
    trained = case.global_batch_size * LENGTH
    assert ranks[0]["tokens"] == [
        StepTokens(3 * trained, trained, selected, 3 * trained, pool == "step") for selected in ranks[0]["selected"]
    ]
    assert (flat(ranks[0]["after"]) - flat(ranks[0]["before"])).norm() > 0


def without_ranked(world: World, case: Case) -> dict[str, Any]:
    result = run_steps(world, case)
    del result["ranked"]
    return result


@pytest.mark.parametrize("stage", [None, 3])
def test_one_candidate_for_each_sample_is_the_run_without_a_choice(stage: int | None) -> None:
    case = Case(steps=2, micro_batch_size=2, stage=stage)
    plain, chosen = (run_ranks(without_ranked, 2, replace(case, candidates=n))[0] for n in (None, 1))
    assert torch.equal(flat(plain["after"]), flat(chosen["after"])) and plain["losses"] == chosen["losses"]
    trained = case.global_batch_size * LENGTH
    assert plain["tokens"] == [StepTokens(0, trained, selected, trained) for selected in plain["selected"]]


def test_partitioned_weights_choose_as_whole_ones_do() -> None:
    case = Case(steps=2, micro_batch_size=2, candidates=2)
    assert_same_run(*(run_ranks(without_ranked, 2, replace(case, stage=stage))[0] for stage in (None, 3)))


@score(needs=("uniform",))
def own_number(signals: dict[str, torch.Tensor]) -> torch.Tensor:
    return signals["uniform"]


def test_the_score_of_the_run_ranks_and_needs_no_model() -> None:
    """The score is random, and depends on the samples alone."""
    case = Case(steps=1, micro_batch_size=2, candidates=4, score=f"{__name__}:own_number", stage=None)
    wilder = replace(case, model=case.model | {"initializer_range": 0.4})
    one, other = (run_ranks(without_ranked, 2, of)[0]["chosen"] for of in (case, wilder))
    assert set(one) == set(other) and len(one) == 8


def test_every_way_of_the_backward_trains_on_the_same_choice() -> None:
    case = Case(steps=1, micro_batch_size=2, candidates=2)
    exact, *others = (
        run_ranks(without_ranked, 2, replace(case, backward=way))[0] for way in ("exact", "rows", "replay")
    )
    for other in others:
        assert flipped(exact["chosen"], other["chosen"]) == (0, 0) and len(other["chosen"]) == 8
        assert (flat(other["after"]) - flat(other["before"])).norm() > 0
