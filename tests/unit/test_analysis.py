"""The figures of observed tokens, each against a direct computation."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.analysis.dynamics import CLASSES, class_curves, most_fluctuating, trends
from megatron_slm.analysis.quality import fit_quality
from megatron_slm.analysis.selections import Selections, by_token, highest, overlaps, perplexities
from megatron_slm.analysis.tables import dynamics_tables, selection_tables
from megatron_slm.analysis.texts import kind_of
from megatron_slm.data.observed import Observations
from megatron_slm.errors import UserError

RANDOM = np.random.default_rng(3)


def observations(num_tokens: int = 60, steps: tuple[int, ...] = (0, 10, 20, 40)) -> Observations:
    losses = RANDOM.random((len(steps), num_tokens)).astype(np.float32) * 4
    mask = RANDOM.random((len(steps), num_tokens)) < 0.5
    mask[0] = False
    columns = {
        "corpus": np.repeat(np.array([0, 1], dtype=np.int16), num_tokens // 2),
        "offset": np.arange(num_tokens, dtype=np.int64),
        "document": np.arange(num_tokens, dtype=np.int64) // 10,
        "position": np.arange(num_tokens, dtype=np.int32) % 10,
        "document_length": np.full(num_tokens, 10, dtype=np.int32),
        "token": RANDOM.integers(0, 2, num_tokens).astype(np.int32),
    }
    facts = {"corpora": [{"name": "math"}, {"name": "web"}]}
    has = np.array([False, *[True] * (len(steps) - 1)])
    return Observations(facts, columns, list(steps), losses, mask, has, losses[0], {})


def paper_class(steps: list[int], losses: list[float], mean_of_last: float, change: float) -> str:
    """The definition of appendix D.1, token by token."""
    a, b = np.polyfit(steps, losses, 1)
    start, end = a * steps[0] + b, a * steps[-1] + b
    if end - start < -change:
        return "H->L"
    if end - start > change:
        return "L->H"
    return "L->L" if losses[-1] <= mean_of_last else "H->H"


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 7), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_classes_are_those_of_the_paper(num_steps: int, change: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    steps = sorted(draw.choice(1000, num_steps, replace=False).tolist())
    losses = (draw.random((num_steps, 50)) * 3).astype(np.float32)
    found = trends(steps, losses, change)
    mean = float(losses[-1].mean())
    for token in range(50):
        expected = paper_class(steps, losses[:, token].tolist(), mean, change)
        if abs(abs(found.end_N[token] - found.start_N[token]) - change) > 1e-6 and abs(losses[-1, token] - mean) > 1e-6:
            assert CLASSES[found.class_N[token]] == expected
    assert sum(found.shares()) == pytest.approx(1)


def test_a_token_is_learned_where_half_of_its_drop_has_passed() -> None:
    falls, rises = [4.0, 3.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]
    found = trends([0, 10, 20, 30], np.array([falls, rises], dtype=np.float32).T)
    assert found.learned_N[0] == pytest.approx(15.0), "half of 4 lies between 3 at step 10 and 1 at step 20"
    assert math.isnan(found.learned_N[1])


def test_curves_are_the_means_of_each_class() -> None:
    observed = observations()
    found = trends(observed.steps, observed.loss_SN)
    curves = class_curves(found, observed.loss_SN)
    for index in range(4):
        rows = [token for token in range(60) if found.class_N[token] == index]
        for step in range(4):
            mean = np.mean([observed.loss_SN[step, row] for row in rows]) if rows else math.nan
            assert curves[index, step] == pytest.approx(mean, nan_ok=True)


def test_the_widest_spread_comes_first() -> None:
    steady, wild = [1.0, 1.0, 1.0, 1.0], [0.5, 1.5, 0.5, 1.4]
    found = trends([0, 1, 2, 3], np.array([steady, wild, [3.0] * 4], dtype=np.float32).T, change=0.9)
    assert most_fluctuating(found, "L->L", 2) == [1, 0]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_the_highest_scores_are_selected_and_ties_go_to_the_first(scores: list[float], ratio: float) -> None:
    count = math.floor(ratio * len(scores) + 0.5)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert set(np.flatnonzero(highest(np.array(scores, dtype=np.float32), ratio))) == set(order[:count])


def test_perplexities_and_overlaps_are_counted_token_by_token() -> None:
    observed = observations()
    selections = Selections(observed.steps[1:], observed.selected_SN[1:])
    table = perplexities(selections, observed.loss_SN)
    overlap = overlaps(selections.mask_KN, selections.mask_KN)
    for k, mask in enumerate(selections.mask_KN):
        chosen = {token for token in range(60) if mask[token]}
        for step in range(4):
            mean = sum(float(observed.loss_SN[step, token]) for token in chosen) / len(chosen)
            assert table[k, step] == pytest.approx(math.exp(mean))
        for other, other_mask in enumerate(selections.mask_KN):
            others = {token for token in range(60) if other_mask[token]}
            assert overlap[k, other] == pytest.approx(len(chosen & others) / len(chosen | others))


def test_shares_of_groups_are_counted_token_by_token() -> None:
    observed = observations(200)
    texts = [("12", " word")[token] for token in observed.columns["token"]]
    tables = {table.name: table for table in selection_tables(observed, texts, first=0)}
    selected = observed.selected_SN[1:]
    kinds = {"digits": 0, "words": 1}
    for name, count, *shares in tables["by_kind"].rows:
        rows = observed.columns["token"] == kinds[str(name)]
        assert count == rows.sum()
        assert shares == pytest.approx(selected[:, rows].mean(1).tolist())
    for name, count, *shares in tables["by_source"].rows:
        rows = observed.columns["corpus"] == observed.corpora.index(str(name))
        assert count == rows.sum()
        assert shares == pytest.approx(selected[:, rows].mean(1).tolist())
    assert sum(int(row[1]) for row in tables["by_position"].rows) == 200
    most = by_token(observed, texts, Selections(observed.steps[1:], selected))
    assert [group.num_tokens for group in most] == [
        int((observed.columns["token"] == t).sum()) for t in _order(most, texts)
    ]


def _order(groups: list, texts: list[str]) -> list[int]:
    return [0 if group.name == "12" else 1 for group in groups]


KINDS = {
    " 12": "digits",
    "3.5": "digits",
    "-": "punctuation",
    " word": "words",
    "don't": "words",
    "é": "words",
    "слово": "other scripts",
    "数": "other scripts",
    "<div>": "markup and symbols",
    " = ": "markup and symbols",
    "€": "markup and symbols",
    ".": "punctuation",
    ' "': "punctuation",
    "\n\n": "whitespace",
    "": "parts of characters",
}


@pytest.mark.parametrize("text", KINDS)
def test_kinds_of_tokens(text: str) -> None:
    assert kind_of(text) == KINDS[text]


def test_the_fit_finds_the_coefficients_and_its_interval_holds_them() -> None:
    draw = random.Random(5)
    loss = np.linspace(1.0, 3.0, 40)
    quality = np.array([math.log(2.0 * x + 0.5) + draw.gauss(0, 0.01) for x in loss])
    fit = fit_quality(loss, quality)
    assert fit is not None
    assert fit.a == pytest.approx(2.0, abs=0.1)
    assert fit.a_low < 2.0 < fit.a_high
    assert fit.r_squared > 0.99
    assert fit_quality(loss[:3], quality[:3]) is None


def test_few_steps_and_no_selection_are_named() -> None:
    observed = observations()
    with pytest.raises(UserError, match="a trend needs three"):
        dynamics_tables(observed, ["a"] * 60, first=20, change=0.2)
    none = observations(steps=(0,))
    with pytest.raises(UserError, match="no selection is recorded"):
        selection_tables(none, ["a"] * 60, first=0)
