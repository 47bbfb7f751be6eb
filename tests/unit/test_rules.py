"""Every rule of selection in one process, against plain Python."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_slm.selection import (
    Rule,
    SelectionSettings,
    find_score,
    ratio_at,
    select_tokens,
    selected_loss,
    token_uniform,
)
from megatron_slm.selection.scores import built_in_scores
from megatron_slm.selection.select import sequence_scores
from megatron_slm.selection.settings import RankedScore, rule_in_words
from tests.rules import COLUMNS, expected, random_case

INF, NAN = math.inf, math.nan
RISES_WITH = {
    "excess": {"student.loss": 1, "reference.loss": -1},
    "loss_drop": {"student.loss": -1, "reference.loss": 1},
    "random": {"uniform": 1},
    "reference_entropy": {"reference.entropy": -1},
    "reference_loss": {"reference.loss": -1},
    "student_entropy": {"student.entropy": 1},
    "student_loss": {"student.loss": 1},
}


@pytest.mark.parametrize("name", built_in_scores())
def test_a_score_rises_and_falls_with_the_columns_that_its_description_names(name):
    lower = {column: torch.full((1, 1), 0.5) for column in COLUMNS}
    change = {}
    for column in COLUMNS:
        higher = lower | {column: torch.full((1, 1), 0.75)}
        change[column] = int((find_score(name)(higher) - find_score(name)(lower)).sign())
    assert {column: sign for column, sign in change.items() if sign} == RISES_WITH[name]
    assert set(find_score(name).needs) == RISES_WITH[name].keys()
    assert "It rises with" in find_score(name).__doc__ or "It falls with" in find_score(name).__doc__


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32))
def test_any_rule_on_any_pool_equals_sorts_and_loops(seed: int):
    """Cases are drawn from seeds, because Hypothesis's draws of a whole pool repeat themselves and reach few rules."""
    case = random_case(random.Random(seed))
    mask, weights, planned = expected(case, [list(range(len(case.valid)))])
    rule = Rule(case.settings)
    signals = {name: case.signals[name] for name in rule.needs}
    selection = rule.choose(signals, case.valid, case.ratio, position=case.position)
    assert selection.mask.tolist() == mask
    torch.testing.assert_close(selection.weights, torch.tensor(weights).view(case.valid.shape), rtol=1e-6, atol=1e-6)
    assert rule.plan([case.valid, case.valid], case.ratio).tolist() == [planned, planned]
    assert selection.num_selected == sum(map(sum, mask)) and selection.num_valid == case.valid.sum()
    names = [part.score for part in case.settings.of] or [case.settings.score]
    nan = torch.stack([find_score(name)(case.signals).isnan() for name in names]).any(0)
    assert selection.num_nan == (case.valid & nan).sum()
    if selection.weights.any():
        assert selection.weights.double().sum().item() == pytest.approx(planned, rel=1e-6)


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_plain_rule_is_select_tokens(chance: random.Random):
    case = random_case(chance)
    rule = Rule(SelectionSettings(ratio=case.ratio))
    found = rule.choose(case.signals, case.valid, position=case.position)
    score = find_score("excess")(case.signals)
    plain = select_tokens(score, case.valid, case.ratio, position=case.position)
    for name, value in vars(plain).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, equal_nan=True)


def signals_of(loss: list[list[float]], entropy: list[list[float]] | None = None) -> dict[str, torch.Tensor]:
    columns = {"student.loss": torch.tensor(loss)}
    return columns if entropy is None else columns | {"student.entropy": torch.tensor(entropy)}


def both_ways(combine: str, ratio: float = 0.25) -> Rule:
    of = [RankedScore("student_loss", ratio), RankedScore("student_entropy", ratio)]
    return Rule(SelectionSettings(combine=combine, of=of, ratio=0.5))


def test_the_weights_of_a_union_and_of_an_intersection_sum_to_the_plan():
    signals = signals_of([[4.0, 3.0, 2.0, 1.0]], [[3.0, 4.0, 1.0, 2.0]])
    valid = torch.ones(1, 4).bool()
    union = both_ways("union").choose(signals, valid)
    assert union.mask.tolist() == [[True, True, False, False]] and union.weights.sum() == 2
    both = both_ways("intersection", 0.75).choose(signals, valid)
    assert both.mask.tolist() == [[True, True, False, False]] and both.weights.sum() == 2
    assert union.threshold.isnan() and union.num_selected == 2


def test_an_empty_intersection_has_no_weight_and_no_nan():
    signals = signals_of([[4.0, 3.0, 2.0, 1.0]], [[1.0, 2.0, 3.0, 4.0]])
    selection = both_ways("intersection").choose(signals, torch.ones(1, 4).bool())
    assert not selection.mask.any() and selection.weights.tolist() == [[0.0] * 4]
    loss = torch.ones(1, 4, requires_grad=True)
    selected_loss(loss, selection).backward()
    assert loss.grad.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("count", [1, 2])
def test_a_draw_is_without_replacement_in_proportion_to_the_exponential(count):
    """The probability of each ordered draw is known (Plackett-Luce); 20,000 draws of 3 tokens approach it."""
    score, temperature, draws = torch.tensor([0.0, 1.0, 2.0]), 0.7, 20_000
    rule = Rule(
        SelectionSettings(score="student_loss", scope="sequence", weighting="stochastic", temperature=temperature)
    )
    signals = {"student.loss": score.expand(draws, 3), "uniform": token_uniform(7, torch.arange(draws), 3)}
    kept = rule.choose(signals, torch.ones(draws, 3).bool(), count / 3).mask
    assert (kept.sum(-1) == count).all()
    odds = (score / temperature).exp().tolist()
    chances = [0.0] * 3
    for order in itertools.permutations(range(3), count):
        left, chance = sum(odds), 1.0
        for token in order:
            chance, left = chance * odds[token] / left, left - odds[token]
        for token in order:
            chances[token] += chance
    for found, chance in zip(kept.double().mean(0).tolist(), chances, strict=True):
        assert abs(found - chance) < 4 * math.sqrt(chance * (1 - chance) / draws)


def test_soft_weights_are_hard_at_low_temperature_and_equal_at_high_temperature():
    signals = {"student.loss": torch.randn(8, 16, generator=torch.Generator().manual_seed(0))}
    valid = torch.ones(8, 16).bool()
    hard = Rule(SelectionSettings(score="student_loss", ratio=0.5)).choose(signals, valid)

    def soft(temperature: float) -> torch.Tensor:
        rule = Rule(SelectionSettings(score="student_loss", ratio=0.5, weighting="soft", temperature=temperature))
        chosen = rule.choose(signals, valid)
        assert torch.equal(chosen.mask, hard.mask)
        return chosen.weights

    # The token at the threshold itself weighs a half.
    assert (soft(1e-6) - hard.weights).abs().sum() < 1.1
    torch.testing.assert_close(soft(1e6), torch.full((8, 16), 0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighting", ["hard", "stochastic", "soft"])
def test_the_gradient_of_each_token_is_its_weight_times_the_upstream_gradient(weighting):
    loss = torch.rand(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    signals = {"student.loss": loss.detach(), "uniform": token_uniform(1, torch.arange(4), 8)}
    rule = Rule(SelectionSettings(score="student_loss", ratio=0.5, weighting=weighting))
    selection = rule.choose(signals, torch.arange(32).view(4, 8) % 3 != 0)
    above = torch.arange(32.0).view(4, 8) % 5 - 1
    selected_loss(loss * above, selection).backward()
    torch.testing.assert_close(loss.grad, selection.weights * above)


def test_the_mean_of_a_sequence_does_not_depend_on_its_neighbours():
    scores = torch.randn(33, 1001, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(33, 1001, generator=torch.Generator().manual_seed(1)) < 0.7
    whole = sequence_scores(scores, valid)
    alone = torch.cat([sequence_scores(scores[row : row + 1], valid[row : row + 1]) for row in range(33)])
    assert torch.equal(whole, alone)
    torch.testing.assert_close(whole, (scores * valid).sum(-1) / valid.sum(-1))


def test_whole_sequences_are_kept_and_empty_ones_never_compete():
    signals = signals_of([[9.0, 9.0], [1.0, 3.0], [0.0, 8.0], [1.0, 1.0]])
    valid = torch.tensor([[False, False], [True, True], [True, False], [True, True]])
    rule = Rule(SelectionSettings(score="student_loss", ratio=0.6, unit="sequence"))
    selection = rule.choose(signals, valid)
    assert selection.mask.tolist() == [[False, False], [True, True], [False, False], [True, True]]
    # 3 of 5 valid tokens were planned.
    assert selection.weights.sum() == 3 and selection.threshold == 1.0


def test_as_many_tokens_as_planned_are_selected_from_the_highest_sequences():
    signals = signals_of([[5.0, 5.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    rule = Rule(SelectionSettings(score="student_loss", ratio=0.25, unit="both", sequence_ratio=0.5))
    selection = rule.choose(signals, torch.ones(4, 4).bool())
    assert selection.mask.nonzero().tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]
    assert torch.equal(selection.weights, selection.mask.float())
    more = rule.choose(signals, torch.ones(4, 4).bool(), 0.75)
    assert more.num_selected == 8 and more.weights.max() == 1.5


def test_nan_scores_have_no_soft_weight():
    rule = Rule(SelectionSettings(score="student_loss", ratio=1.0, weighting="soft"))
    selection = rule.choose(signals_of([[NAN, 1.0, -INF, INF]]), torch.ones(1, 4).bool())
    assert selection.weights[0, 0] == 0 and selection.weights.sum() == 4 and selection.num_nan == 1
    nothing = rule.choose(signals_of([[NAN, NAN]]), torch.ones(1, 2).bool())
    assert nothing.weights.tolist() == [[0.0, 0.0]]


def test_a_rule_needs_the_signals_of_its_scores_and_a_draw_random_numbers():
    of = [RankedScore("excess", 0.5), RankedScore("reference_entropy", 0.5)]
    rule = Rule(SelectionSettings(combine="union", of=of, weighting="stochastic"))
    assert rule.needs == ("student.loss", "reference.loss", "reference.entropy", "uniform")


TOKENS = 1000
CURVES = [
    ({}, {0: 0.6, 999: 0.6}),
    ({"start": 0.5}, {0: None, 499: None, 500: 0.6}),
    ({"start": 1.0}, {999: None, 1000: 0.6}),
    ({"schedule": "linear", "schedule_tokens": 100}, {0: 1.0, 25: 0.9, 50: 0.8, 100: 0.6, 5000: 0.6}),
    ({"schedule": "cosine", "schedule_tokens": 100}, {0: 1.0, 50: 0.8, 75: 0.6 + 0.2 * (1 - 0.5**0.5), 100: 0.6}),
    ({"schedule": "linear", "schedule_tokens": 100, "start": 0.1}, {99: None, 100: 1.0, 150: 0.8, 200: 0.6}),
    ({"schedule": "steps", "ratio_steps": [(10, 0.9), (20, 0.3)]}, {0: 1.0, 9: 1.0, 10: 0.9, 19: 0.9, 20: 0.3}),
    ({"schedule": "steps", "ratio_steps": [(10, 0.9)], "start": 0.5}, {10: None, 500: 0.9}),
]


@pytest.mark.parametrize(("options", "curve"), CURVES)
def test_the_ratio_is_a_function_of_consumed_tokens(options, curve):
    found = {tokens: ratio_at(SelectionSettings(**options), tokens, TOKENS) for tokens in curve}
    assert {t: v for t, v in found.items() if v is None} == {t: v for t, v in curve.items() if v is None}
    assert found == {t: v if v is None else pytest.approx(v) for t, v in curve.items()}


@given(
    st.sampled_from(["linear", "cosine"]),
    st.floats(min_value=1e-6, max_value=1.0),
    st.integers(min_value=1, max_value=2000),
    st.floats(min_value=0, max_value=1),
)
def test_a_scheduled_ratio_never_rises_and_ends_exactly_at_the_ratio(schedule, ratio, length, start):
    rule = SelectionSettings(ratio=ratio, schedule=schedule, schedule_tokens=length, start=start)
    ratios = [1.0 if (found := ratio_at(rule, tokens, TOKENS)) is None else found for tokens in range(0, 3100, 100)]
    assert all(ratio <= later <= earlier <= 1 for earlier, later in itertools.pairwise(ratios))
    assert ratios[-1] == ratio


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "top 60% of the tokens by excess; scope global, pool micro_step"),
        ({"unit": "sequence"}, "top 60% of the sequences by mean excess; scope global, pool micro_step"),
        (
            {"unit": "both", "sequence_ratio": 0.8, "weighting": "stochastic", "temperature": 0.5},
            "top 80% of the sequences by mean score, then top 60% of the tokens by excess; "
            "sampled in proportion to exp(score/0.5); scope global, pool micro_step",
        ),
        (
            {"combine": "union", "of": [RankedScore("excess", 0.5), RankedScore("random", 0.125)], "scope": "rank"},
            "union of top 50% of the tokens by excess and top 12.5% of the tokens by random; "
            "scope rank, pool micro_step",
        ),
        (
            {"weighting": "soft", "schedule": "linear", "schedule_tokens": 5000, "start": 0.1, "pool": "step"},
            "top 60% of the tokens by excess; all tokens weighted by sigmoid((score - threshold)/1); "
            "scope global, pool step; linear schedule of the ratio from 100% over 5,000 tokens; "
            "all tokens for the first 10% of the run",
        ),
        (
            {"schedule": "steps", "ratio_steps": [(1000, 0.8), (2000, 0.6)]},
            "top tokens by excess; scope global, pool micro_step; ratio 80% from 1,000 tokens, 60% from 2,000 tokens",
        ),
        (
            {"backward": "rows"},
            "top 60% of the tokens by excess; scope global, pool micro_step; "
            "backward rows, without the unselected tokens",
        ),
    ],
)
def test_a_rule_is_described_in_words(options, words):
    assert rule_in_words(SelectionSettings(**options)) == words


@pytest.mark.parametrize("name", ["scope", "pool", "combine", "unit", "weighting", "schedule"])
def test_a_misspelt_choice_is_not_another_rule(name):
    with pytest.raises(ValidationError) as caught:
        SelectionSettings(**{name: "loud"})
    (error,) = caught.value.errors()
    assert (error["loc"], error["type"], error["input"]) == ((name,), "literal_error", "loud")
