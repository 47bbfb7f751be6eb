"""Selection over 1 to 4 ranks: it equals that of a sort, and is the same on any number of ranks, bit for bit."""

import math
import random
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from megatron_slm.dist import World
from megatron_slm.selection import select_tokens
from megatron_slm.selection.select import score_quantiles
from tests.gloo import run_ranks
from tests.unit.test_selection import AWKWARD, INF, NAN, same, sorted_selection

WORLD_SIZES = (1, 2, 3, 4)
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Case:
    """A pool, and its split over the ranks.

    cuts       shares of the pool at which ranks 1, 2 and 3 begin, so that ranks differ in size and some are empty; with
               fewer ranks, the later cuts are ignored
    positions  position of each token; its tokens are then dealt to the ranks one by one, in turn. None to split the
               pool at the cuts and use the default positions
    """

    name: str
    scores: torch.Tensor
    valid: torch.Tensor
    ratio: float
    cuts: tuple[float, ...] = (0.25, 0.5, 0.75)
    positions: torch.Tensor | None = None

    def held(self, rank: int, size: int) -> torch.Tensor:
        """Return the indices of the tokens of one rank."""
        everything = torch.arange(len(self.scores))
        if self.positions is not None:
            return everything[rank::size]
        cuts = [0, *sorted(int(cut * len(self.scores)) for cut in self.cuts[: size - 1]), len(self.scores)]
        return everything[cuts[rank] : cuts[rank + 1]]


@cache
def cases() -> list[Case]:
    return [*named_cases(), *(random_case(seed) for seed in range(50))]


def named_cases() -> list[Case]:
    def case(name: str, scores: list[float], ratio: float = 0.5, valid: list[bool] | None = None, **options) -> Case:
        valid = [True] * len(scores) if valid is None else valid
        return Case(name, torch.tensor(scores).float(), torch.tensor(valid).bool(), ratio, **options)

    halves = [True] * 8 + [False] * 8
    many = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul(8).round().div(8)
    shuffled = torch.randperm(20_000, generator=torch.Generator().manual_seed(1)) * 2**40
    return [
        case("all equal", [1.0] * 16),
        case("all equal, on one rank", [1.0] * 16, cuts=(1.0, 1.0, 1.0)),
        case("all equal, none on the first ranks", [1.0] * 16, cuts=(0.0, 0.0, 0.0)),
        case("all equal, interleaved", [1.0] * 16, positions=torch.arange(16)),
        case("all equal, highest position first", [1.0] * 16, positions=torch.arange(16).flip(0)),
        case("zeros of both signs", [0.0, -0.0] * 8),
        case("denormals", [2.0**-149, -(2.0**-149), 0.0, 2.0**-140] * 4),
        case("infinities", [INF, -INF, INF, 1.0] * 4),
        case("NaN", [NAN, 1.0, -INF, NAN] * 4, 0.8),
        case("only NaN", [NAN] * 16),
        case("no valid token on the last ranks", list(range(16, 0, -1)), valid=halves, cuts=(0.5, 0.7, 0.8)),
        case("no valid token on the first rank", [*[9.0] * 8, *range(8)], valid=halves[::-1], cuts=(0.5, 0.5, 0.9)),
        case("no valid token", [1.0] * 16, valid=[False] * 16),
        case("no token", [], valid=[]),
        case("everything", list(range(16)), 1.0),
        case("one", list(range(16)), 1e-9),
        Case("many ties", many, torch.ones(20_000).bool(), 0.6, cuts=(0.1, 0.7, 0.71)),
        Case("many ties, far positions", many, many < 2, 0.6, positions=shuffled),
    ]


def random_case(seed: int) -> Case:
    chance = random.Random(seed)
    count = chance.randrange(40)
    distinct = [*chance.choices(AWKWARD, k=3), chance.gauss(0, 1), chance.gauss(0, 1)]
    scores = [chance.choice(distinct) if chance.random() < 0.7 else chance.gauss(0, 1) for _ in range(count)]
    likely = chance.choice((0.1, 0.7, 1.0))
    return Case(
        f"random {seed}",
        torch.tensor(scores),
        torch.tensor([chance.random() < likely for _ in range(count)]).bool(),
        chance.choice((0.5, 1.0, 1.0 - chance.random())),
        cuts=(chance.random(), chance.random(), chance.random()),
        positions=torch.tensor(chance.sample(range(2**62), count)).long() if seed % 2 else None,
    )


def select_cases(world: World, scope: str) -> list[dict[str, torch.Tensor]]:
    return [select_case(case, world, scope) for case in cases()]


def select_case(case: Case, world: World, scope: str) -> dict[str, torch.Tensor]:
    held = case.held(world.rank, world.size)
    scores, valid = case.scores[held], case.valid[held]
    positions = None if case.positions is None else case.positions[held]
    selection = select_tokens(scores, valid, case.ratio, scope=scope, position=positions)
    return {**vars(selection), "quantiles": score_quantiles(scores, valid, QUANTILES)}


@cache
def answers(size: int, scope: str) -> list[list[dict[str, torch.Tensor]]]:
    """Return the answer of each rank for each case."""
    return list(zip(*run_ranks(select_cases, size, scope), strict=True))


def joined_mask(case: Case, ranks: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    mask = torch.zeros_like(case.valid)
    for rank, answer in enumerate(ranks):
        mask[case.held(rank, len(ranks))] = answer["mask"]
    return mask


def expected_selection(case: Case, indices: torch.Tensor) -> tuple[set[int], float]:
    """Return the selection of a sort among the tokens at `indices`."""
    positions = indices if case.positions is None else case.positions[indices]
    chosen, threshold = sorted_selection(
        case.scores[indices].tolist(), case.valid[indices].tolist(), positions.tolist(), case.ratio
    )
    return {int(indices[index]) for index in chosen}, threshold


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_mask_threshold_and_counts_equal_a_sort_of_all_scores(size):
    for case, ranks in zip(cases(), answers(size, "global"), strict=True):
        chosen, threshold = expected_selection(case, torch.arange(len(case.scores)))
        assert set(joined_mask(case, ranks).nonzero().flatten().tolist()) == chosen, case.name
        for answer in ranks:
            assert same(answer["threshold"].item(), threshold), case.name
            assert torch.equal(answer["weights"], answer["mask"].float()), case.name
            assert answer["num_selected"] == len(chosen), case.name
            assert answer["num_valid"] == case.valid.sum(), case.name
            assert answer["num_nan"] == (case.valid & case.scores.isnan()).sum(), case.name


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
def test_the_selection_is_bitwise_the_same_on_any_number_of_ranks(size):
    for case, alone, split in zip(cases(), answers(1, "global"), answers(size, "global"), strict=True):
        assert torch.equal(joined_mask(case, alone), joined_mask(case, split)), case.name
        for answer in split:
            for name in ("threshold", "num_selected", "num_valid", "num_nan", "quantiles"):
                torch.testing.assert_close(answer[name], alone[0][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_quantiles_are_over_the_scores_of_all_ranks(size):
    for case, ranks in zip(cases(), answers(size, "global"), strict=True):
        values = case.scores[case.valid].tolist()
        ranked = sorted(values, key=lambda value: (math.isnan(value), 0.0 if math.isnan(value) else -value))
        for q, value in zip(QUANTILES, ranks[0]["quantiles"].tolist(), strict=True):
            place = max(1, math.floor((1 - q) * len(ranked) + 0.5)) - 1
            assert same(value, ranked[place] if ranked else NAN), case.name


@pytest.mark.parametrize("scope", ["rank", "sequence"])
def test_scopes_rank_and_sequence_select_on_each_rank_and_count_over_all_ranks(scope):
    for case, ranks in zip(cases(), answers(2, scope), strict=True):
        for rank, answer in enumerate(ranks):
            held = case.held(rank, 2)
            chosen, threshold = expected_selection(case, held)
            assert set(held[answer["mask"]].tolist()) == chosen, case.name
            assert same(answer["threshold"].item(), threshold), case.name
            assert answer["num_valid"] == case.valid.sum(), case.name
            assert answer["num_selected"] == joined_mask(case, ranks).sum(), case.name


def select_in_pairs(world: World) -> list[tuple[bool, ...]]:
    """Select in two groups at once; all scores of one group are below those of the other."""
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    scores = torch.arange(4.0) + 4 * world.rank
    selection = select_tokens(scores, torch.ones(4).bool(), 0.5, group=pairs[world.rank // 2])
    return selection.mask.tolist()


def test_a_group_selects_among_its_own_ranks():
    assert run_ranks(select_in_pairs, 4) == [[False] * 4, [True] * 4] * 2
