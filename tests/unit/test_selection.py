"""Selection in one process, against a sort in plain Python."""

import math
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.errors import UserError
from megatron_slm.selection import find_score, plan_k, score, select_tokens, selected_loss
from megatron_slm.selection.scores import token_uniform
from megatron_slm.selection.select import score_quantiles
from megatron_slm.selection.threshold import order_key, score_of_key

INF, NAN = math.inf, math.nan
SMALLEST, LARGEST = 2.0**-149, (2 - 2.0**-23) * 2.0**127
AWKWARD = (0.0, -0.0, INF, -INF, NAN, -NAN, SMALLEST, -SMALLEST, 2.0**-126, LARGEST, -LARGEST, 1.0, 1 + 2.0**-23, -1.0)


def sorted_selection(scores: list[float], valid: list[bool], positions: list[int], ratio: float):
    """Return the indices and the lowest score that a sort selects, by the definition."""

    def place(index: int) -> tuple[bool, float, int]:
        value = scores[index]
        return (True, 0.0, positions[index]) if math.isnan(value) else (False, -value, positions[index])

    ranked = sorted((index for index, counts in enumerate(valid) if counts), key=place)
    count = max(1, math.floor(ratio * len(ranked) + 0.5))
    chosen = ranked[:count]
    return set(chosen), scores[chosen[-1]] if chosen else NAN


def same(actual: float, expected: float) -> bool:
    return actual == expected or (math.isnan(actual) and math.isnan(expected))


@st.composite
def pools(draw) -> tuple[list[float], list[bool], list[int]]:
    floats = st.floats(width=32) | st.sampled_from(AWKWARD) | st.sampled_from((0.25, 0.5))
    scores = draw(st.lists(floats, max_size=40))
    valid = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    positions = draw(st.permutations(range(len(scores))))
    return scores, valid, [place * draw(st.sampled_from((1, 2**40))) for place in positions]


RATIOS = st.floats(min_value=1e-9, max_value=1.0) | st.sampled_from((0.5, 1.0))


@settings(max_examples=300, deadline=None)
@given(pools(), RATIOS)
def test_mask_threshold_and_counts_equal_a_sort(pool, ratio):
    scores, valid, positions = pool
    if len(set(positions)) < len(positions):
        positions = list(range(len(positions)))
    chosen, threshold = sorted_selection(scores, valid, positions, ratio)
    selection = select_tokens(
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(valid, dtype=torch.bool),
        ratio,
        position=torch.tensor(positions, dtype=torch.int64),
    )
    assert set(selection.mask.nonzero().flatten().tolist()) == chosen
    assert same(selection.threshold.item(), threshold)
    assert selection.num_selected == len(chosen)
    assert selection.num_valid == sum(valid)
    assert selection.num_nan == sum(math.isnan(value) for value, counts in zip(scores, valid, strict=True) if counts)


@settings(max_examples=150, deadline=None)
@given(st.lists(pools(), min_size=1, max_size=4), RATIOS, st.booleans())
def test_scope_sequence_sorts_each_last_dimension_alone(rows, ratio, with_positions):
    length = min(len(scores) for scores, _, _ in rows)
    shape = (len(rows), length)
    scores, valid = (torch.tensor([row[i][:length] for row in rows]).view(shape) for i in (0, 1))
    positions = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(length)) for _ in rows])
    selection = select_tokens(
        scores.float(), valid.bool(), ratio, scope="sequence", position=positions if with_positions else None
    )
    assert selection.threshold.shape == (len(rows),)
    for row in range(len(rows)):
        places = positions[row].tolist() if with_positions else list(range(length))
        chosen, threshold = sorted_selection(scores[row].tolist(), valid[row].tolist(), places, ratio)
        assert set(selection.mask[row].nonzero().flatten().tolist()) == chosen
        assert same(selection.threshold[row].item(), threshold)
    assert selection.num_selected == selection.mask.sum()


@settings(max_examples=150, deadline=None)
@given(pools(), st.lists(st.floats(min_value=0.0, max_value=1.0), min_size=1, max_size=4))
def test_quantiles_are_thresholds_of_a_sort(pool, quantiles):
    scores, valid, _ = pool
    ranked = sorted((v for v, counts in zip(scores, valid, strict=True) if counts and not math.isnan(v)), reverse=True)
    ranked += [NAN] * (sum(valid) - len(ranked))
    found = score_quantiles(torch.tensor(scores).float(), torch.tensor(valid).bool(), tuple(quantiles))
    for q, value in zip(quantiles, found.tolist(), strict=True):
        expected = ranked[max(1, math.floor((1 - q) * len(ranked) + 0.5)) - 1] if ranked else NAN
        assert same(value, expected)


def test_the_quantile_of_one_minus_the_ratio_is_the_threshold():
    scores, valid = torch.randn(1000), torch.rand(1000) < 0.8
    threshold = select_tokens(scores, valid, 0.6).threshold
    assert score_quantiles(scores, valid, (0.4,))[0] == threshold


@given(st.lists(st.floats(width=32) | st.sampled_from(AWKWARD), min_size=1))
def test_keys_have_the_order_of_the_scores_and_give_them_back(values):
    scores = torch.tensor(values, dtype=torch.float32)
    keys = order_key(scores)
    assert ((keys >= 0) & (keys < 1 << 32)).all()
    assert all(same(a, b) for a, b in zip(score_of_key(keys).tolist(), values, strict=True))
    for a, key_a in zip(values, keys.tolist(), strict=True):
        for b, key_b in zip(values, keys.tolist(), strict=True):
            below = (math.isnan(a) and not math.isnan(b)) or a < b
            assert (key_a < key_b) == below


def test_ties_go_to_the_lowest_position():
    selection = select_tokens(torch.ones(4), torch.ones(4).bool(), 0.5, position=torch.tensor([7, 1, 9, 3]))
    assert selection.mask.tolist() == [False, True, False, True]


def test_ties_go_to_the_lowest_offset_by_default():
    selection = select_tokens(torch.ones(2, 2), torch.tensor([[False, True], [True, True]]), 0.6)
    assert selection.mask.tolist() == [[False, True], [True, False]]


def test_minus_zero_ties_with_zero():
    selection = select_tokens(torch.tensor([-0.0, 0.0, 0.0, -0.0]), torch.ones(4).bool(), 0.5)
    assert selection.mask.tolist() == [True, True, False, False]


def test_nan_is_selected_after_minus_infinity_and_counted():
    scores, valid = torch.tensor([NAN, -INF, NAN, 1.0]), torch.ones(4).bool()
    assert select_tokens(scores, valid, 0.5).mask.tolist() == [False, True, False, True]
    last = select_tokens(scores, valid, 0.75)
    assert last.mask.tolist() == [True, True, False, True]
    assert last.threshold.isnan()
    assert last.num_nan == 2


def test_no_score_of_an_invalid_token_competes():
    selection = select_tokens(torch.tensor([INF, NAN, -5.0]), torch.tensor([False, False, True]), 0.1)
    assert selection.mask.tolist() == [False, False, True]
    assert (selection.num_valid, selection.num_selected, selection.num_nan) == (1, 1, 0)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("scope", ["global", "rank", "sequence"])
def test_without_a_valid_token_nothing_is_selected_and_the_threshold_is_nan(shape, scope):
    selection = select_tokens(torch.ones(shape), torch.zeros(shape).bool(), 0.6, scope=scope)
    assert not selection.mask.any()
    assert selection.threshold.isnan().all()
    assert selection.threshold.shape == (shape[:-1] if scope == "sequence" else ())
    assert (selection.num_valid, selection.num_selected) == (0, 0)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_float_type_are_ranked_as_float32(dtype):
    scores = torch.randn(500, generator=torch.Generator().manual_seed(1)).to(dtype)
    scores = torch.cat([scores, torch.tensor(AWKWARD, dtype=torch.float64).to(dtype)])
    valid = torch.ones_like(scores).bool()
    chosen, threshold = sorted_selection(scores.float().tolist(), valid.tolist(), list(range(len(scores))), 0.6)
    selection = select_tokens(scores, valid, 0.6)
    assert set(selection.mask.nonzero().flatten().tolist()) == chosen
    assert selection.threshold.dtype == torch.float32
    assert same(selection.threshold.item(), threshold)


def test_float64_scores_that_are_one_float32_are_a_tie():
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert select_tokens(scores, torch.ones(2).bool(), 0.5).mask.tolist() == [True, False]


def test_weights_are_the_mask_as_float32():
    selection = select_tokens(torch.randn(2, 50, dtype=torch.float64), torch.rand(2, 50) < 0.9, 0.6)
    assert selection.weights.dtype == torch.float32
    assert torch.equal(selection.weights, selection.mask.float())
    assert {selection.num_selected.dtype, selection.num_valid.dtype, selection.num_nan.dtype} == {torch.int64}


def test_scores_that_require_a_gradient_are_ranked_without_one():
    selection = select_tokens(torch.randn(8, requires_grad=True), torch.ones(8).bool(), 0.5)
    assert not selection.weights.requires_grad
    assert not selection.threshold.requires_grad


@pytest.mark.parametrize(
    ("count", "ratio", "planned"),
    [
        (0, 0.6, 0),
        (1, 1e-9, 1),
        (1, 0.5, 1),
        (3, 0.5, 2),
        (5, 0.5, 3),
        (10, 0.25, 3),
        (10, 0.6, 6),
        (7, 0.6, 4),
        (8, 0.6, 5),
        (9, 1.0, 9),
        (100, 0.004, 1),
        (100_000_010, 0.3, 30_000_003),
        (2**40 + 1, 0.5, 2**39 + 1),
    ],
)
def test_the_plan_rounds_halves_up_in_float64(count, ratio, planned):
    assert plan_k(torch.tensor(count), ratio) == planned


def test_the_plan_keeps_the_shape_of_the_counts():
    assert plan_k(torch.tensor([[0, 1], [10, 11]]), 0.5).tolist() == [[0, 1], [5, 6]]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, NAN])
def test_a_ratio_outside_zero_to_one_is_refused_with_its_value(ratio):
    with pytest.raises(UserError) as caught:
        select_tokens(torch.ones(3), torch.ones(3).bool(), ratio)
    assert caught.value.setting == "ratio" and caught.value.value is ratio


def test_invalid_arguments_are_refused():
    ones, valid = torch.ones(3), torch.ones(3).bool()
    with pytest.raises(ValueError, match="one shape"):
        select_tokens(ones, torch.ones(4).bool(), 0.5)
    with pytest.raises(ValueError, match="one shape"):
        select_tokens(ones, valid, 0.5, position=torch.arange(4))
    with pytest.raises(ValueError, match="valid must be bool"):
        select_tokens(ones, ones, 0.5)
    with pytest.raises(ValueError, match="float tensor"):
        select_tokens(torch.arange(3), valid, 0.5)
    with pytest.raises(UserError) as caught:
        select_tokens(ones, valid, 0.5, scope="world")
    assert (caught.value.setting, caught.value.value) == ("scope", "world")


def test_the_selected_loss_and_its_gradient_equal_a_sum_over_the_selected():
    loss = torch.randn(3, 40, requires_grad=True)
    selection = select_tokens(torch.randn(3, 40), torch.rand(3, 40) < 0.7, 0.6)
    total = selected_loss(loss * 2, selection)
    total.backward()
    rows = list(zip(loss.flatten().tolist(), selection.mask.flatten().tolist(), strict=True))
    assert total.item() == pytest.approx(math.fsum(2 * value for value, chosen in rows if chosen), abs=1e-4)
    assert loss.grad.flatten().tolist() == [2.0 if chosen else 0.0 for _, chosen in rows]


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_an_unselected_loss_that_is_not_finite_has_no_effect(bad):
    inner = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = inner * torch.tensor([1.0, bad, 1.0])
    selection = select_tokens(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3).bool(), 0.6)
    total = selected_loss(loss, selection)
    (gradient,) = torch.autograd.grad(total, loss)
    assert total.item() == 4.0
    assert gradient.tolist() == [1.0, 0.0, 1.0]


def test_an_empty_selection_has_a_zero_loss_with_a_gradient():
    loss = torch.ones(3, requires_grad=True)
    selected_loss(loss, select_tokens(loss, torch.zeros(3).bool(), 0.5)).backward()
    assert loss.grad.tolist() == [0.0, 0.0, 0.0]


def test_uniform_numbers_depend_on_the_token_and_not_on_the_batch():
    samples = torch.tensor([5, 0, 10**12, 7])
    whole = token_uniform(3, samples, 16)
    assert torch.equal(whole, torch.cat([token_uniform(3, part, 16) for part in samples.split([1, 3])]))
    assert torch.equal(whole.flip(0), token_uniform(3, samples.flip(0), 16))
    assert torch.equal(whole[:, :9], token_uniform(3, samples, 9))


def test_uniform_numbers_are_uniform_and_lie_inside_zero_to_one():
    values = token_uniform(1234, torch.arange(256), 512)
    ordered = values.flatten().double().sort().values
    steps = torch.arange(len(ordered)) / len(ordered)
    # Kolmogorov-Smirnov at the level of 0.001.
    assert (ordered - steps).abs().max() < 1.95 / math.sqrt(len(ordered))
    assert values.dtype == torch.float32
    # Odd multiples of 2**-24 alone: 0 and 1 cannot occur.
    assert ((values.double() * 2**24) % 2 == 1).all()


def test_uniform_numbers_of_neighbours_and_of_seeds_are_uncorrelated():
    values = token_uniform(0, torch.arange(256), 512).double() - 0.5
    other = token_uniform(1, torch.arange(256), 512).double() - 0.5
    for left, right in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:]), (values, other)):
        assert (left * right).mean().abs() < 4 / 12 / math.sqrt(left.numel())


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    source = """
        from megatron_slm import score

        @score(needs=("student.entropy",))
        def confident(signals):
            return -signals["student.entropy"]

        def unmarked(signals):
            return signals["student.entropy"]
    """
    (tmp_path / "my_scores.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_scores"
    sys.modules.pop("my_scores", None)


def test_a_score_can_be_in_a_package_of_the_user(user_module):
    found = find_score(f"{user_module}:confident")
    assert found.needs == ("student.entropy",)
    assert found({"student.entropy": torch.tensor([[1.0]])}).item() == -1.0


@pytest.mark.parametrize(
    ("name", "reason", "remedy"),
    [
        ("exess", "no such score", "excess, loss_drop, random, reference_entropy, reference_loss"),
        ("no_such_package:f", "cannot be imported", "PYTHONPATH"),
        ("my_scores:missing", "missing", "spelling"),
        ("my_scores:unmarked", "not marked as a score", "@score"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused_with_a_remedy(user_module, name, reason, remedy):
    with pytest.raises(UserError) as caught:
        find_score(name, "selection.of[0].score")
    assert (caught.value.setting, caught.value.value) == ("selection.of[0].score", name)
    assert reason in caught.value.reason and remedy in caught.value.remedy


def test_marking_a_score_leaves_it_a_plain_function():
    def double(signals):
        return 2 * signals["student.loss"]

    assert score(needs=("student.loss",))(double) is double
