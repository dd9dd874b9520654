"""Figures of noise experiments, from the numbers of `summary`: accuracies in percent, None where there is none.

Every function writes one figure to a path, whose ending chooses the format, and returns its axes. lines: accuracies by their
names in `plots.REFERENCES`. clean: the clean condition, drawn at 0 where the scales have none without noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.noise.controls import PLACES
from experiments.noise.summary import CLEAN
from experiments.plots import ACCURACY, Numbers, Point, drawing, grouped, shades, with_intervals
from experiments.significance import CURVES
from noise import NoiseType

Setting = Mapping[str, Any]  # a `summary.setting_result`
WIDE_RANGE = 20  # positive values further apart than this are drawn on a logarithmic axis
MARKERS = "osD^vP*X"
FIT_STYLES = ("-", "--", ":")
HALF = "#b04a4a"
NOTE: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 5), "fontsize": 7}


# --- accuracy against noise ---


def accuracy_by_scale(
    setting: Setting, kind: NoiseType, path: Path, title: str, clean: Numbers | None = None, **lines: float | None
) -> Axes:
    """Accuracy at each scale with its 95% interval, the fitted decays with R², and where half of the clean accuracy is lost."""
    by_norm = "1 / noise scale (norm of the noise by norm of the thought)"
    xlabel = by_norm if kind.reciprocal else "noise scale"
    with drawing(path, (8, 4.6), lines, xlabel=xlabel, ylabel=ACCURACY, title=title) as axes:
        points = _points(setting["results"], "noise_axis", clean)
        places = [x for x, _ in points]
        if _noise_axis(axes, places):
            axes.set_xticks(places)
        with_intervals(axes, points, color="black", linestyle="none", marker="o", label="measured, 95% interval")
        for number, (formula, fit) in enumerate(setting["fits"].items()):
            if fit is not None:
                quality = "" if fit["r_squared"] is None else f", R² = {fit['r_squared']:.2f}"
                grid = _grid(places)
                curve = CURVES[formula].values(grid, *fit["parameters"])
                axes.plot(grid, curve, FIT_STYLES[number % 3], color=f"C{number}", label=f"{formula}{quality}")
        if points and points[0][0] == 0:
            half = points[0][1]["accuracy"] / 2
            axes.axhline(half, color=HALF, linewidth=1, linestyle="-.", label="half of the clean accuracy")
        if (scale := setting["half_scale"]) is not None:
            place, label = kind.amount(scale), f"half is lost at scale {scale:.3g}"
            axes.axvline(place, color=HALF, linewidth=1, linestyle=":", label=label)
    return axes


def noise_types(
    settings: Mapping[str, Setting], path: Path, title: str, clean: Numbers | None = None, **lines: float | None
) -> Axes:
    """Several noise settings in one figure, against the noise that was measured: norm of the noise by norm of the thought."""
    labels = {"xlabel": "measured norm of the noise by norm of the thought", "ylabel": ACCURACY, "title": title}
    with drawing(path, (8.5, 4.8), {"clean": clean["accuracy"] if clean else None} | lines, **labels) as axes:
        curves = {name: _points(setting["results"], "noise_ratio", clean) for name, setting in settings.items()}
        _noise_axis(axes, [x for curve in curves.values() for x, _ in curve])
        for number, (name, curve) in enumerate(curves.items()):
            with_intervals(axes, curve, label=name, linewidth=1.2, **_style(number))
    return axes


def _points(results: Mapping[str, Numbers], measure: str, clean: Numbers | None) -> list[Point]:
    """What was measured, the least noise first; no noise stands at 0."""
    places = [(0.0 if one["noise_axis"] == 0 else one[measure], one) for one in results.values()]
    if clean is not None and all(place != 0 for place, _ in places):
        places.append((0.0, clean))
    known = [(place, one) for place, one in places if None not in (place, one["accuracy"])]
    return sorted(known, key=lambda point: point[0])


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


def _style(number: int) -> dict[str, Any]:
    return {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}


def _grid(places: Sequence[float]) -> np.ndarray:
    """Values dense enough for a smooth curve on a linear axis as on a logarithmic one."""
    positive = [place for place in places if place > 0]
    if not positive:
        return np.array(places)
    even, near_zero = np.linspace(min(places), max(places), 150), np.linspace(min(places), min(positive), 20)
    return np.unique([*even, *near_zero, *np.geomspace(min(positive), max(positive), 150)])


# --- branches ---


def coverage_curves(
    curves: Mapping[str, Sequence[Numbers]], path: Path, title: str, emphasised: Sequence[str] = (CLEAN,)
) -> Axes:
    """Accuracy of the answered questions against their share, one point for each number of branches that must agree.

    curves: name -> `coverage` of a `summary.condition_summary`, in order of their noise. emphasised: those drawn black, with
    the numbers of branches written at their points.
    """
    colours = shades([name for name in curves if name not in emphasised])
    labels = {"xlabel": "coverage: questions answered in %", "ylabel": "accuracy of the answered in %", "title": title}
    legend = "points from the right:\nat least 1, 2, ... branches agree"
    with drawing(path, (8, 4.8), {}, legend, xlim=(-2, 104), ylim=(-2, 107), **labels) as axes:
        for number, (name, points) in enumerate(curves.items()):
            answered = [one for one in points if one["accuracy"] is not None]
            x, y = ([one[key] for one in answered] for key in ("coverage", "accuracy"))
            style: dict[str, Any] = {"color": colours.get(name), "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
            if name in emphasised:
                style = {"color": "black", "marker": "o", "linewidth": 2.2, "zorder": 3}
                style["linestyle"] = FIT_STYLES[list(emphasised).index(name) % 3]
                _write_thresholds(axes, answered)
            axes.plot(x, y, label=name, **style)
    return axes


def _write_thresholds(axes: Axes, points: Sequence[Numbers]) -> None:
    """Not where the last one stands in the way."""
    last = (math.inf, math.inf)
    for one in reversed(points):
        place = (one["coverage"], one["accuracy"])
        if math.dist(last, place) > 4:
            axes.annotate(f"≥ {one['threshold']}", place, color="black", **NOTE)
            last = place


def diversity_scatter(settings: Mapping[str, Setting], path: Path, title: str, **lines: float | None) -> Axes:
    """Accuracy against the mean path diversity, one point with its 95% interval for each scale, which is written beside it."""
    xlabel = "path diversity (mean distance of two branches' thoughts); numbers: noise scale"
    with drawing(path, (8.5, 4.8), lines, xlabel=xlabel, ylabel=ACCURACY, title=title) as axes:
        places: list[float] = []
        for number, (name, setting) in enumerate(settings.items()):
            known = {scale: one for scale, one in setting["results"].items() if None not in (one["accuracy"], one["diversity"])}
            points = [(one["diversity"], one) for one in known.values()]
            with_intervals(axes, points, label=name, linewidth=0.5, **_style(number))
            for scale, (x, one) in zip(known, points, strict=True):
                axes.annotate(f"{float(scale):g}", (x, one["accuracy"]), color=f"C{number % 10}", **NOTE)
            places += [x for x, _ in points]
        _noise_axis(axes, places)
    return axes


# --- controls ---


def control_bars(
    controls: Mapping[str, Numbers], path: Path, title: str, baseline: Numbers | None = None, **lines: float | None
) -> Axes:
    """Accuracy with 95% interval of each control, "zero/all" and so on: a group for what stands in place of the thoughts.

    baseline: the condition with the model's own thoughts, decoded as the controls are; drawn as a line with its interval.
    """
    series: dict[str, dict[str, Numbers]] = {}
    for key, one in controls.items():
        control, _, place = key.partition("/")
        if one["accuracy"] is not None:
            series.setdefault(PLACES[place], {})[control] = one
    return grouped(series, path, title, "what stands in place of thoughts", "replaced:", baseline=baseline, lines=lines)
