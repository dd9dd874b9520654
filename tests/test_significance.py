"""Comparisons and fits against values by hand and against other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from evaluation import interval
from experiments.significance import (
    CURVES,
    EXPONENTIAL,
    HYPERBOLIC,
    LINEAR,
    fit_decay,
    half_scale,
    holm,
    least_difference,
    mcnemar,
    paired_difference,
    questions_for_margin,
    status,
)


@pytest.mark.parametrize(
    ("accuracy", "word"),
    [(1, "Good"), (0.6, "Good"), (0.599, "Degraded"), (0.2, "Degraded"), (0.199, "Broken"), (0, "Broken")],
)
def test_status_words(accuracy: float, word: str) -> None:
    assert status(accuracy) == word


def test_the_wilson_interval_by_its_formula() -> None:
    correct, total, z = 81, 263, 1.959963984540054
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    assert interval(correct, total) == pytest.approx((centre - half, centre + half))


def pairs(both: int, first: int, second: int, none: int) -> tuple[list[bool], list[bool]]:
    return [True] * (both + first) + [False] * (second + none), [True] * both + [False] * first + [True] * second + [
        False
    ] * none


@pytest.mark.parametrize(("first", "second", "p"), [(0, 0, 1), (1, 0, 1), (5, 5, 1), (0, 6, 2 / 64), (1, 8, 2 * (1 + 9) / 512)])
def test_mcnemar_by_hand(first: int, second: int, p: float) -> None:
    result = mcnemar(*pairs(10, first, second, 7))
    assert result == {"only_first": first, "only_second": second, "p_value": pytest.approx(p)}


def test_the_least_difference_by_its_formula() -> None:
    """Half a question is added to each cell, then Wald's interval over the differences of 102 questions."""
    values = np.repeat([-1, 1, 0], [8, 3, 89])
    mean, square = (values.sum()) / 102, (np.square(values).sum() + 1) / 102
    assert least_difference(8, 3, 100) == pytest.approx(mean - 1.959964 * math.sqrt((square - mean**2) / 102))
    assert least_difference(0, 0, 0) == -math.inf


def test_how_often_the_least_difference_is_too_high() -> None:
    """Of questions of which 6 in 100 are lost and 2 gained: in 3.2% of the samples, where 2.5% are promised."""
    draws = np.random.default_rng(0).multinomial(200, [0.06, 0.02, 0.92], size=20_000)
    cells, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    too_high = [least_difference(int(lost), int(gained), 200) > -0.04 for lost, gained in cells]
    assert 0.01 < counts[too_high].sum() / len(draws) < 0.035


def test_how_many_questions_show_that_nothing_is_lost() -> None:
    for differing in (0, 0.02, 0.05):
        needed = questions_for_margin(0.02, differing)
        change = differing / 2
        assert least_difference(change * needed, change * needed, needed) > -0.02
        assert least_difference(change * (needed - 1), change * (needed - 1), needed - 1) <= -0.02
    assert questions_for_margin(0.02, 0) == 96


def test_mcnemar_needs_the_same_questions() -> None:
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([3 * 0.01, 2 * 0.03, 2 * 0.03, 4 * 0.005])
    assert holm([0.7, 0.6]) == [1, 1]
    assert holm([]) == []


def test_the_paired_bootstrap_agrees_with_scipy() -> None:
    first, second = pairs(60, 10, 30, 50)
    difference, low, high = paired_difference(first, second)
    differences = np.subtract(second, first, dtype=int)
    expected = bootstrap((differences,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert difference == pytest.approx(20 / 150)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.015)


def test_the_paired_bootstrap_repeats() -> None:
    first, second = pairs(60, 10, 30, 50)
    assert paired_difference(first, second, seed=3) == paired_difference(first, second, seed=3)
    assert paired_difference(first, first) == (0, 0, 0)
    assert paired_difference(second, first)[0] == -paired_difference(first, second)[0]
    with pytest.raises(ValueError, match="at least one question"):
        paired_difference([], [])


SCALES = [0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
TRUE = {EXPONENTIAL: (0.9, 0.7), HYPERBOLIC: (0.8, 1.5, 2.0), LINEAR: (0.7, 0.05)}


@pytest.mark.parametrize("formula", CURVES)
def test_a_fit_finds_the_curve_that_made_the_points(formula: str) -> None:
    accuracies = CURVES[formula].values(np.array(SCALES), *TRUE[formula]).tolist()
    found = fit_decay(formula, SCALES, accuracies)
    assert found is not None
    assert found["parameters"] == pytest.approx(TRUE[formula], rel=1e-3)
    assert found["r_squared"] == pytest.approx(1)


def test_the_formulas_by_hand() -> None:
    assert CURVES[EXPONENTIAL].values(2, 0.9, 0.7) == pytest.approx(0.9 * math.exp(-1.4))
    assert CURVES[HYPERBOLIC].values(2, 0.8, 1.5, 2.0) == pytest.approx(0.8 / 7)
    assert CURVES[LINEAR].values(2, 0.7, 0.05) == pytest.approx(0.6)


def test_the_linear_fit_agrees_with_polyfit() -> None:
    accuracies = [0.8, 0.81, 0.7, 0.75, 0.6, 0.5, 0.3, 0.2, 0.1]
    slope, intercept = np.polyfit(SCALES, accuracies, 1)
    found = fit_decay(LINEAR, SCALES, accuracies)
    assert found is not None
    assert found["parameters"] == pytest.approx((intercept, -slope), rel=1e-5)
    assert found["r_squared"] == pytest.approx(np.corrcoef(SCALES, accuracies)[0, 1] ** 2)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SCALES), st.floats(0, 1)), max_size=9))
def test_a_fit_of_anything_ends_in_numbers_or_nothing(points: list[tuple[float, float]]) -> None:
    for formula in CURVES:
        found = fit_decay(formula, [x for x, _ in points], [y for _, y in points])
        assert found is None or np.isfinite(found["parameters"]).all()
        assert found is None or found["r_squared"] is None or found["r_squared"] <= 1


def test_what_cannot_be_fitted() -> None:
    assert [fit_decay(formula, [0], [1]) for formula in CURVES] == [None] * 3
    assert fit_decay(HYPERBOLIC, [0, 1], [1, 0.5]) is None
    assert fit_decay(LINEAR, [0, math.inf], [1, 0.5]) is None
    constant = fit_decay(LINEAR, [0, 1, 2], [0.5, 0.5, 0.5])
    assert constant is not None
    assert constant["r_squared"] is None
    with pytest.raises(ValueError, match="zip"):
        fit_decay(LINEAR, [0, 1], [1])


@pytest.mark.parametrize(
    ("scales", "accuracies", "half"),
    [
        ([0, 1, 2], [0.8, 0.6, 0.2], 1.5),
        ([2, 0, 1], [0.2, 0.8, 0.6], 1.5),
        ([0, 1, 2], [0.8, 0.4, 0.0], 1),
        ([0, 1, 2, 3], [0.8, 0.2, 0.7, 0.1], 2 / 3),
        ([0, 1, 2], [0.8, 0.7, 0.4], None),
        ([0, 1, 2, 3], [0.4, 0.8, 0.3, 0.1], 2.5),  # half of that at the smallest scale, not of the highest
        ([0, 1], [0.0, 0.0], None),
        ([], [], None),
    ],
)
def test_the_scale_where_half_is_lost(scales: list[float], accuracies: list[float], half: float | None) -> None:
    assert half_scale(scales, accuracies) == (None if half is None else pytest.approx(half))
