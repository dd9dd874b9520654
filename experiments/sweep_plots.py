"""Figures of noise experiments, from the numbers of `experiments.summary`: accuracies in percent, None where there is none.

Every function writes one figure to a path, whose ending chooses the format, and returns it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.plots import save_figure
from experiments.statistics import Decay
from experiments.summary import CLEAN, noise_axis

Numbers = Mapping[str, Any]  # one condition: accuracy, low, high, noise_ratio, diversity, ...
Point = tuple[float, float, float, float]  # place on the x axis, accuracy, and the bounds of its 95% interval
ACCURACY = "accuracy in %"
WIDE_RANGE = 20  # positive values further apart than this are drawn on a logarithmic axis
MARKERS = "osD^vP*X"
FIT_STYLES = ("-", "--", ":")
REFERENCES = {"clean": ("black", "-"), "greedy": ("#4a78b5", "--"), "chance": ("grey", ":")}
HALF = "#b04a4a"


# --- accuracy against noise ---


def accuracy_by_scale(
    setting: Mapping[str, Any],
    noise_type: str,
    path: Path,
    title: str,
    clean: Numbers | None = None,
    greedy: float | None = None,
    chance: float | None = None,
) -> Figure:
    """Accuracy at each scale with its 95% interval, the fitted decays with R², half of the clean accuracy and where it is lost.

    setting: a `summary.setting_result`. clean: the clean condition, drawn at 0 where the scales have none without noise.
    greedy, chance: accuracies drawn as lines.
    """
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    points = _points(setting["results"], "noise_axis", clean)
    places = [point[0] for point in points]
    if _noise_axis(axes, places):
        axes.set_xticks(places)
    _with_intervals(axes, points, color="black", linestyle="none", marker="o", label="measured, 95% interval")
    _draw_fits(axes, places, setting["fits"])
    _draw_half(axes, points, setting["half_scale"], noise_type)
    _references(axes, greedy=greedy, chance=chance)
    axes.set(xlabel=_scale_label(noise_type), ylabel=ACCURACY, ylim=(-2, 105), title=title)
    _legend(axes)
    return save_figure(figure, path)


def noise_types(
    settings: Mapping[str, Mapping[str, Any]],
    path: Path,
    title: str,
    clean: Numbers | None = None,
    greedy: float | None = None,
    chance: float | None = None,
) -> Figure:
    """Several noise settings in one figure, against the noise that was measured: norm of the noise by norm of the thought.

    settings: name -> `summary.setting_result`. clean, greedy, chance: as in `accuracy_by_scale`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    curves = {name: _points(setting["results"], "noise_ratio", clean) for name, setting in settings.items()}
    _noise_axis(axes, [point[0] for curve in curves.values() for point in curve])
    for number, (name, curve) in enumerate(curves.items()):
        _with_intervals(axes, curve, label=name, linewidth=1.2, **_style(number))
    _references(axes, clean=None if clean is None else clean["accuracy"], greedy=greedy, chance=chance)
    axes.set(xlabel="measured norm of the noise by norm of the thought", ylabel=ACCURACY, ylim=(-2, 105), title=title)
    _legend(axes)
    return save_figure(figure, path)


def _points(results: Mapping[str, Numbers], measure: str, clean: Numbers | None) -> list[Point]:
    """What was measured, the least noise first; no noise stands at 0."""
    places = [(0.0 if one["noise_axis"] == 0 else one[measure], one) for one in results.values()]
    if clean is not None and all(place != 0 for place, _ in places):
        places.append((0.0, clean))
    known = [(place, one) for place, one in places if place is not None and one["accuracy"] is not None]
    return sorted((place, one["accuracy"], one["low"], one["high"]) for place, one in known)


def _noise_axis(axes: Axes, places: Sequence[float]) -> bool:
    """Whether the axis is logarithmic, with 0 shown: where the values are far apart."""
    axes.grid(alpha=0.3)
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
    return "1 / noise scale (norm of the noise by norm of the thought)" if noise_type == "snr" else "noise scale"


def _with_intervals(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    x, values = [point[0] for point in points], [point[1] for point in points]
    below = [max(0, value - low) for _, value, low, _ in points]
    above = [max(0, high - value) for _, value, _, high in points]
    axes.errorbar(x, values, yerr=[below, above], **{"capsize": 3, "markersize": 5, "elinewidth": 0.8, **style})


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


def _references(axes: Axes, **accuracies: float | None) -> None:
    for name, accuracy in accuracies.items():
        if accuracy is not None:
            colour, style = REFERENCES[name]
            axes.axhline(accuracy, color=colour, linestyle=style, linewidth=1, label=name)


def _legend(axes: Axes, **options: Any) -> None:
    """Beside the axes; what was measured stands before lines that help to read it."""
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    entries.sort(key=lambda entry: not isinstance(entry[0], Container))
    if entries:
        handles, labels = zip(*entries, strict=True)
        axes.legend(handles, labels, fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), **options)


# --- branches ---


def coverage_curves(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str, emphasised: Sequence[str] = (CLEAN,)
) -> Figure:
    """Accuracy of the answered questions against their share, one point for each number of branches that must agree.

    curves: name -> `coverage` of a `summary.condition_summary`, in order of their noise. emphasised: those drawn black, with
    the numbers of branches written at their points.
    """
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axes.grid(alpha=0.3)
    others = [name for name in curves if name not in emphasised]
    colours = dict(zip(others, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(others))), strict=True))
    for number, (name, points) in enumerate(curves.items()):
        answered = [(one["coverage"], one["accuracy"], one["threshold"]) for one in points if one["accuracy"] is not None]
        x, y = [point[0] for point in answered], [point[1] for point in answered]
        if name in emphasised:
            dashes = FIT_STYLES[list(emphasised).index(name) % 3]
            axes.plot(x, y, dashes, color="black", marker="o", linewidth=2.2, zorder=3, label=name)
            _write_thresholds(axes, answered)
        else:
            axes.plot(x, y, color=colours[name], marker=MARKERS[number % len(MARKERS)], markersize=5, label=name)
    axes.set(xlabel="coverage: questions answered in %", ylabel="accuracy of the answered in %", title=title)
    axes.set(xlim=(-2, 104), ylim=(-2, 107))
    _legend(axes, title="points from the right:\nat least 1, 2, ... branches agree")
    return save_figure(figure, path)


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
) -> Figure:
    """Accuracy against the mean path diversity, one point with its 95% interval for each scale, which is written beside it.

    settings: name -> `summary.setting_result`. measure: diversity (distance of thoughts), all_steps, late_half or normalised.
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    places: list[float] = []
    for number, (name, setting) in enumerate(settings.items()):
        known = {scale: one for scale, one in setting["results"].items() if None not in (one["accuracy"], one[measure])}
        points = [(one[measure], one["accuracy"], one["low"], one["high"]) for one in known.values()]
        _with_intervals(axes, points, label=name, linewidth=0.5, **_style(number))
        for scale, (x, y, *_) in zip(known, points, strict=True):
            _write_at(axes, x, y, f"{float(scale):g}", f"C{number % 10}")
        places += [point[0] for point in points]
    _noise_axis(axes, places)
    _references(axes, chance=chance)
    unit = "by the thoughts' mean norm" if measure == "normalised" else "mean distance of two branches' thoughts"
    axes.set(xlabel=f"path diversity ({unit}); numbers: noise scale", ylabel=ACCURACY, ylim=(-2, 105), title=title)
    _legend(axes)
    return save_figure(figure, path)


# --- controls ---


PARTS = {
    "all": "all thoughts",
    "first": "the first, later ones\nrecomputed from it",
    "after": "the first, later ones\nleft as they were",
}


def control_bars(
    controls: Mapping[str, Numbers], path: Path, title: str, baseline: Numbers | None = None, chance: float | None = None
) -> Figure:
    """Accuracy with 95% interval of each control, "zero/all" and so on: a group for what stands in place of the thoughts.

    baseline: the condition with the model's own thoughts, decoded as the controls are; drawn as a line with its interval.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    measured = {tuple(key.split("/")): one for key, one in controls.items() if one["accuracy"] is not None}
    kinds, parts = (list(dict.fromkeys(key[place] for key in measured)) for place in (0, 1))
    width = 0.8 / max(1, len(parts))
    for number, part in enumerate(parts):
        shift = width * (number - (len(parts) - 1) / 2)
        bars = [
            (kinds.index(kind) + shift, one["accuracy"], one["low"], one["high"])
            for (kind, of), one in measured.items()
            if of == part
        ]
        heights = [bar[1] for bar in bars]
        axes.bar([bar[0] for bar in bars], heights, 0.95 * width, color=f"C{number}", alpha=0.75, label=PARTS.get(part, part))
        _with_intervals(axes, bars, color="black", linestyle="none", elinewidth=1)
    if baseline is not None and baseline["accuracy"] is not None:
        axes.axhspan(baseline["low"], baseline["high"], color="black", alpha=0.1, linewidth=0)
        axes.axhline(baseline["accuracy"], color="black", linewidth=1, label="none: the model's own")
    _references(axes, chance=chance)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(xlabel="what stands in place of thoughts", ylabel=ACCURACY, ylim=(0, 105), title=title)
    _legend(axes, title="replaced:")
    return save_figure(figure, path)
