"""Figures of noise experiments, from the numbers of `experiments.summary`: accuracies in percent, None where there is none.

Every function writes one figure to a path, whose ending chooses the format, and returns its axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.noise.summary import CLEAN, control_of, noise_axis
from experiments.plots import ACCURACY, Numbers, Point, drawing, grouped, point, references, shades, with_intervals
from experiments.significance import Decay
from noise import noise_rows

WIDE_RANGE = 20  # positive values further apart than this are drawn on a logarithmic axis
MARKERS = "osD^vP*X"
FIT_STYLES = ("-", "--", ":")
HALF = "#b04a4a"


# --- accuracy against noise ---


def accuracy_by_scale(
    setting: Mapping[str, Any], noise_type: str, path: Path, title: str, clean: Numbers | None = None, **lines: float | None
) -> Axes:
    """Accuracy at each scale with its 95% interval, the fitted decays with R², half of the clean accuracy and where it is lost.

    setting: a `summary.setting_result`. clean: the clean condition, drawn at 0 where the scales have none without noise.
    lines: accuracies by their names in `plots.REFERENCES`.
    """
    labels = {"xlabel": _scale_label(noise_type), "ylabel": ACCURACY, "title": title}
    with drawing(path, (8, 4.6), **labels) as axes:
        points = _points(setting["results"], "noise_axis", clean)
        places = [one[0] for one in points]
        if _noise_axis(axes, places):
            axes.set_xticks(places)
        with_intervals(axes, points, color="black", linestyle="none", marker="o", label="measured, 95% interval")
        _draw_fits(axes, places, setting["fits"])
        _draw_half(axes, points, setting["half_scale"], noise_type)
        references(axes, **lines)
    return axes


def noise_types(
    settings: Mapping[str, Mapping[str, Any]], path: Path, title: str, clean: Numbers | None = None, **lines: float | None
) -> Axes:
    """Several noise settings in one figure, against the noise that was measured: norm of the noise by norm of the thought.

    settings: name -> `summary.setting_result`. clean, lines: as in `accuracy_by_scale`.
    """
    labels = {"xlabel": "measured norm of the noise by norm of the thought", "ylabel": ACCURACY, "title": title}
    with drawing(path, (8.5, 4.8), **labels) as axes:
        curves = {name: _points(setting["results"], "noise_ratio", clean) for name, setting in settings.items()}
        _noise_axis(axes, [one[0] for curve in curves.values() for one in curve])
        for number, (name, curve) in enumerate(curves.items()):
            with_intervals(axes, curve, label=name, linewidth=1.2, **_style(number))
        references(axes, clean=None if clean is None else clean["accuracy"], **lines)
    return axes


def _points(results: Mapping[str, Numbers], measure: str, clean: Numbers | None) -> list[Point]:
    """What was measured, the least noise first; no noise stands at 0."""
    places = [(0.0 if one["noise_axis"] == 0 else one[measure], one) for one in results.values()]
    if clean is not None and all(place != 0 for place, _ in places):
        places.append((0.0, clean))
    known = [(place, one) for place, one in places if place is not None and one["accuracy"] is not None]
    return sorted(point(place, one) for place, one in known)


def _noise_axis(axes: Axes, places: Sequence[float]) -> bool:
    """Whether the axis is logarithmic, with 0 shown: where the values are far apart."""
    positive = [place for place in places if place > 0]
    if not positive or max(positive) / min(positive) <= WIDE_RANGE:
        return False
    least = 10 ** math.floor(math.log10(min(positive)))  # below this the axis is linear
    axes.set_xscale("symlog", linthresh=least, linscale=0.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(-0.3 * least if min(places) <= 0 else 0.8 * min(positive), 1.4 * max(positive))
    return True


def _scale_label(noise_type: str) -> str:
    reciprocal = noise_rows(noise_type)[0].reciprocal
    return "1 / noise scale (norm of the noise by norm of the thought)" if reciprocal else "noise scale"


def _style(number: int) -> dict[str, Any]:
    return {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}


def _draw_fits(axes: Axes, places: Sequence[float], fits: Mapping[str, Any]) -> None:
    grid = _grid(places)
    for number, (formula, fit) in enumerate(fits.items()):
        if fit is not None:
            curve = Decay(formula, tuple(fit["parameters"]), fit["r_squared"])
            quality = "" if curve.r_squared is None else f", R² = {curve.r_squared:.2f}"
            axes.plot(grid, curve.at(grid), FIT_STYLES[number % 3], color=f"C{number}", label=f"{formula}{quality}")


def _grid(places: Sequence[float]) -> list[float]:
    """Values dense enough for a smooth curve on a linear axis as on a logarithmic one."""
    positive = [place for place in places if place > 0]
    if not positive:
        return list(places)
    even = np.linspace(min(places), max(places), 150)
    return np.unique(
        [*even, *np.linspace(min(places), min(positive), 20), *np.geomspace(min(positive), max(positive), 150)]
    ).tolist()


def _draw_half(axes: Axes, points: Sequence[Point], half_scale: float | None, noise_type: str) -> None:
    if points and points[0][0] == 0:
        axes.axhline(points[0][1] / 2, color=HALF, linewidth=1, linestyle="-.", label="half of the clean accuracy")
    if half_scale is not None:
        label = f"half is lost at scale {half_scale:.3g}"
        axes.axvline(noise_axis(noise_type, half_scale), color=HALF, linewidth=1, linestyle=":", label=label)


# --- branches ---


def coverage_curves(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str, emphasised: Sequence[str] = (CLEAN,)
) -> Axes:
    """Accuracy of the answered questions against their share, one point for each number of branches that must agree.

    curves: name -> `coverage` of a `summary.condition_summary`, in order of their noise. emphasised: those drawn black, with
    the numbers of branches written at their points.
    """
    colours = shades([name for name in curves if name not in emphasised])
    labels = {"xlabel": "coverage: questions answered in %", "ylabel": "accuracy of the answered in %", "title": title}
    legend = "points from the right:\nat least 1, 2, ... branches agree"
    with drawing(path, (8, 4.8), legend, xlim=(-2, 104), ylim=(-2, 107), **labels) as axes:
        for number, (name, points) in enumerate(curves.items()):
            answered = [(one["coverage"], one["accuracy"], one["threshold"]) for one in points if one["accuracy"] is not None]
            x, y = [one[0] for one in answered], [one[1] for one in answered]
            if name in emphasised:
                dashes = FIT_STYLES[list(emphasised).index(name) % 3]
                axes.plot(x, y, dashes, color="black", marker="o", linewidth=2.2, zorder=3, label=name)
                _write_thresholds(axes, answered)
            else:
                axes.plot(x, y, color=colours[name], marker=MARKERS[number % len(MARKERS)], markersize=5, label=name)
    return axes


def _write_thresholds(axes: Axes, points: Sequence[tuple[float, float, int]]) -> None:
    """Not where the last one stands in the way."""
    last = (math.inf, math.inf)
    for coverage, accuracy, threshold in reversed(points):
        if math.dist(last, (coverage, accuracy)) > 4:
            last = (coverage, accuracy)
            _write_at(axes, *last, f"≥ {threshold}", "black")


def _write_at(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=7, color=colour)


def diversity_scatter(
    settings: Mapping[str, Mapping[str, Any]], path: Path, title: str, measure: str = "diversity", chance: float | None = None
) -> Axes:
    """Accuracy against the mean path diversity, one point with its 95% interval for each scale, which is written beside it.

    settings: name -> `summary.setting_result`. measure: diversity (distance of thoughts), all_steps, late_half or normalised.
    """
    unit = "by the thoughts' mean norm" if measure == "normalised" else "mean distance of two branches' thoughts"
    labels = {"xlabel": f"path diversity ({unit}); numbers: noise scale", "ylabel": ACCURACY, "title": title}
    with drawing(path, (8.5, 4.8), **labels) as axes:
        places: list[float] = []
        for number, (name, setting) in enumerate(settings.items()):
            known = {scale: one for scale, one in setting["results"].items() if None not in (one["accuracy"], one[measure])}
            points = [point(one[measure], one) for one in known.values()]
            with_intervals(axes, points, label=name, linewidth=0.5, **_style(number))
            for scale, (x, y, *_) in zip(known, points, strict=True):
                _write_at(axes, x, y, f"{float(scale):g}", f"C{number % 10}")
            places += [one[0] for one in points]
        _noise_axis(axes, places)
        references(axes, chance=chance)
    return axes


# --- controls ---


PARTS = {
    "all": "all thoughts",
    "first": "the first, later ones\nrecomputed from it",
    "after": "the first, later ones\nleft as they were",
}


def control_bars(
    controls: Mapping[str, Numbers], path: Path, title: str, baseline: Numbers | None = None, chance: float | None = None
) -> Axes:
    """Accuracy with 95% interval of each control, "zero/all" and so on: a group for what stands in place of the thoughts.

    baseline: the condition with the model's own thoughts, decoded as the controls are; drawn as a line with its interval.
    """
    series: dict[str, dict[str, Numbers]] = {}
    for key, one in controls.items():
        kind, part = control_of(key) or (key, "")
        if one["accuracy"] is not None:
            series.setdefault(PARTS.get(part, part), {})[kind] = one
    xlabel = "what stands in place of thoughts"
    return grouped(series, path, title, xlabel, baseline=baseline, legend="replaced:", chance=chance)
