"""Paired comparisons, and how accuracy decays with noise. Accuracies are fractions 0..1.

The 95% interval of one accuracy is `evaluation.interval`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

GOOD, DEGRADED = 0.6, 0.2
RESAMPLES = 10_000  # of a bootstrap
Z_95 = 1.959964  # of the normal distribution, both sides


def status(accuracy: float) -> str:
    """ "Good" from 60%, "Degraded" from 20%, else "Broken"."""
    return "Good" if accuracy >= GOOD else "Degraded" if accuracy >= DEGRADED else "Broken"


# --- paired comparisons ---


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Exact test (McNemar 1947) of two systems on the same questions.

    only_first, only_second: questions that one of them alone got right. p_value: two-sided; 1 where they never differ.
    ValueError: different numbers of questions.
    """
    only_first = sum(one and not other for one, other in zip(first, second, strict=True))
    only_second = sum(other and not one for one, other in zip(first, second, strict=True))
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, corrected step by step (Holm 1979); in the order given."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def paired_difference(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of the second minus that of the first, and the bounds of its 95% interval.

    Percentile bootstrap over questions (Efron 1979), both systems drawn together. A question's difference is -1, 0 or 1, so how
    often each is drawn, from a multinomial, says all about a resample. ValueError: no questions, or different numbers of them.
    """
    differences = np.array([int(other) - int(one) for one, other in zip(first, second, strict=True)])
    if not differences.size:
        raise ValueError("a difference needs at least one question")
    shares = [np.mean(differences == value) for value in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(differences.size, shares, size=RESAMPLES)  # (resamples, 3)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / differences.size, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def least_difference(only_first: float, only_second: float, questions: int) -> float:
    """Lower bound of the 95% interval of the second's accuracy minus the first's, from the counts of `mcnemar`.

    Wald's interval with half a question added to each of the four cells (Agresti and Min 2005). Unlike a bootstrap's it has a
    width where no question differs. Nothing is known of no question: minus infinity.
    """
    if not questions:
        return -math.inf
    total = questions + 2
    difference = (only_second - only_first) / total
    return difference - Z_95 * math.sqrt(max(0.0, (only_first + only_second + 1) / total - difference**2) / total)


def questions_for_margin(margin: float, differing: float) -> int:
    """Questions from which `least_difference` lies above -margin.

    margin: a fraction. differing: share of questions right in one condition alone, as many gained as lost.
    """
    return next(n for n in itertools.count(1) if least_difference(differing * n / 2, differing * n / 2, n) > -margin)


# --- decay with noise ---


@dataclass(frozen=True)
class Curve:
    """values: accuracies at scales x. start: parameters from the highest accuracy and the scale where half is lost."""

    values: Callable[..., np.ndarray]
    start: Callable[[float, float], list[float]]
    bounds: Any


EXPONENTIAL, HYPERBOLIC, LINEAR = "a exp(-b x)", "a / (1 + b x^c)", "a - b x"
CURVES = {
    EXPONENTIAL: Curve(lambda x, a, b: a * np.exp(-b * x), lambda top, half: [max(top, 1e-3), math.log(2) / half], (0, np.inf)),
    HYPERBOLIC: Curve(
        lambda x, a, b, c: a / (1 + b * x**c),
        lambda top, half: [max(top, 1e-3), 1 / half, 1],
        ([0, 0, 0.05], [np.inf, np.inf, 20]),
    ),
    LINEAR: Curve(lambda x, a, b: a - b * x, lambda top, half: [top, 0], (-np.inf, np.inf)),
}


def fit_decay(formula: str, scales: Sequence[float], accuracies: Sequence[float]) -> dict[str, Any] | None:
    """One of CURVES by least squares: parameters, in the order of the formula, and r_squared (None: all accuracies are equal).

    None: fewer different scales than parameters, a value that is not finite, or no fit.
    scales: at least 0; larger ones must mean more noise: for `snr` give 1 / scale. ValueError: not one accuracy for each scale.
    """
    half = half_scale(scales, accuracies) or max(scales, default=0)
    x, y = np.asarray(scales, dtype=float), np.asarray(accuracies, dtype=float)
    if not half or not np.isfinite([x, y]).all():
        return None
    curve = CURVES[formula]
    start = curve.start(y.max(), half)
    if len(np.unique(x)) < len(start):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
            found, _ = curve_fit(curve.values, x, y, p0=start, bounds=curve.bounds, method="trf", max_nfev=2000)
    except (RuntimeError, ValueError, FloatingPointError):
        return None
    total = float(((y - y.mean()) ** 2).sum())
    r_squared = 1 - float(((y - curve.values(x, *found)) ** 2).sum()) / total if total > 1e-15 else None
    return {"parameters": found.tolist(), "r_squared": r_squared}


def half_scale(scales: Sequence[float], accuracies: Sequence[float]) -> float | None:
    """The scale where accuracy first falls below half of that at the smallest scale, interpolated linearly.

    None: it never does. ValueError: not one accuracy for each scale.
    """
    points = sorted(zip(scales, accuracies, strict=True))
    half = points[0][1] / 2 if points else 0.0
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if next_y < half <= y:
            return x + (next_x - x) * (y - half) / (y - next_y)
    return None
