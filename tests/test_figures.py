"""What the figures of noise experiments show: the data on the axes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.lines import Line2D

from experiments import plots
from experiments.noise import figures
from experiments.significance import EXPONENTIAL, HYPERBOLIC, LINEAR
from noise import NOISES

NOWHERE = Path("not written")


@pytest.fixture(autouse=True)
def figures_stay_open(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Writing a file takes a second: one test does it."""
    if "tmp_path" not in request.fixturenames:
        monkeypatch.setattr(plots, "save_figure", lambda figure, path: figure)
    yield
    plt.close("all")


def numbers(
    accuracy: float | None, axis: float = 0.0, ratio: float | None = None, diversity: float | None = None
) -> dict[str, Any]:
    """A condition's numbers; its interval reaches 8 down and 5 up."""
    bounds = {"low": None, "high": None} if accuracy is None else {"low": accuracy - 8, "high": accuracy + 5}
    return {"accuracy": accuracy, **bounds, "noise_axis": axis, "noise_ratio": ratio, "diversity": diversity}


GAUSSIAN = {
    "results": {
        "0.0": numbers(80, 0, None, 0.0),
        "5.0": numbers(8, 5, 21, 30.0),
        "0.1": numbers(78, 0.1, 0.2, 2.0),
        "1.0": numbers(50, 1, 2.1, 20.0),
        "2.0": numbers(None, 2),
    },
    "fits": {
        EXPONENTIAL: {"parameters": [80.0, 0.5], "r_squared": 0.987},
        HYPERBOLIC: None,
        LINEAR: {"parameters": [70.0, 6.0], "r_squared": None},
    },
    "half_scale": 3.1428,
}
SNR = {
    "results": {"4.0": numbers(75, 0.25, 0.24), "1.0": numbers(60, 1, 0.98), "0.5": numbers(30, 2, 2.1)},
    "fits": {EXPONENTIAL: None, HYPERBOLIC: None, LINEAR: None},
    "half_scale": 0.625,
}


def line(axes: Axes, label: str) -> Line2D:
    return next(one for one in axes.lines if str(one.get_label()).startswith(label))


def level(axes: Axes, label: str) -> float:
    """Of a horizontal line."""
    first, second = line(axes, label).get_ydata()
    assert first == second
    return float(first)


def bars(axes: Axes, label: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Points (x, y) and intervals (low, high) of an error bar plot."""
    found = next(one for one in axes.containers if isinstance(one, ErrorbarContainer) and one.get_label() == label)
    points, _, (segments,) = found.lines
    return [tuple(point) for point in points.get_xydata()], [(low[1], high[1]) for low, high in segments.get_segments()]


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_accuracy_by_scale() -> None:
    axes = figures.accuracy_by_scale(GAUSSIAN, NOISES["gaussian"], NOWHERE, "A title", greedy=83, chance=25)
    points, intervals = bars(axes, "measured, 95% interval")
    assert points == [(0, 80), (0.1, 78), (1, 50), (5, 8)]
    assert intervals == [(72, 85), (70, 83), (42, 55), (0, 13)]
    assert axes.get_xscale() == "symlog"
    assert list(axes.get_xticks()) == [0, 0.1, 1, 5]
    assert (level(axes, "half of the clean accuracy"), level(axes, "greedy"), level(axes, "chance")) == (40, 83, 25)
    assert line(axes, "half is lost").get_xdata()[0] == 3.1428
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("A title", "noise scale", "accuracy in %")
    assert legend(axes)[:3] == ["measured, 95% interval", "a exp(-b x), R² = 0.99", "a - b x"]
    assert "half is lost at scale 3.14" in legend(axes)
    assert not any(HYPERBOLIC in label for label in legend(axes))


def test_the_drawn_fits_are_the_fitted_curves() -> None:
    axes = figures.accuracy_by_scale(GAUSSIAN, NOISES["gaussian"], NOWHERE, "")
    x, y = line(axes, EXPONENTIAL).get_data()
    assert y == pytest.approx(80 * np.exp(-0.5 * x))
    assert (x.min(), x.max()) == (0, 5)
    assert max(np.diff(x[x > 0.1])) < 0.1  # smooth at the end of a linear axis
    assert max(np.diff(np.log(x[(x >= 0.1) & (x < 1)]))) < 0.1  # and at the beginning of a logarithmic one
    x, y = line(axes, LINEAR).get_data()
    assert y == pytest.approx(70 - 6 * x)


def test_snr_is_drawn_over_its_inverse_from_the_clean_condition() -> None:
    axes = figures.accuracy_by_scale(SNR, NOISES["snr"], NOWHERE, "", clean=numbers(78))
    points, _ = bars(axes, "measured, 95% interval")
    assert points == [(0, 78), (0.25, 75), (1, 60), (2, 30)]
    assert level(axes, "half of the clean") == 39
    assert line(axes, "half is lost at scale 0.625").get_xdata()[0] == 1.6
    assert axes.get_xlabel().startswith("1 / noise scale")
    assert axes.get_xscale() == "linear"  # 0.25 to 2
    axes = figures.accuracy_by_scale(SNR, NOISES["snr"], NOWHERE, "")
    assert not any("half of" in label for label in legend(axes))  # without the clean accuracy there is no half of it


def test_the_clean_condition_is_not_drawn_twice() -> None:
    axes = figures.accuracy_by_scale(GAUSSIAN, NOISES["gaussian"], NOWHERE, "", clean=numbers(79))
    assert bars(axes, "measured, 95% interval")[0][:2] == [(0, 80), (0.1, 78)]


def test_noise_types_over_the_measured_noise() -> None:
    settings = {"gaussian": GAUSSIAN, "snr": SNR, "none": {"results": {"1.0": numbers(40, 1, None)}}}
    axes = figures.noise_types(settings, NOWHERE, "Types", clean=numbers(81), greedy=83, chance=50)
    assert bars(axes, "gaussian")[0] == [(0, 80), (0.2, 78), (2.1, 50), (21, 8)]
    assert bars(axes, "snr")[0] == [(0, 81), (0.24, 75), (0.98, 60), (2.1, 30)]
    assert bars(axes, "snr")[1][0] == (73, 86)
    assert bars(axes, "none")[0] == [(0, 81)]  # its noise was not measured
    assert [level(axes, name) for name in ("clean", "greedy", "chance")] == [81, 83, 50]
    assert axes.get_xscale() == "symlog"
    assert legend(axes) == ["gaussian", "snr", "none", "clean", "greedy", "chance"]


def curve(*points: tuple[float, float | None]) -> list[dict[str, Any]]:
    return [{"threshold": number, "coverage": x, "accuracy": y} for number, (x, y) in enumerate(points, start=1)]


def test_coverage_curves() -> None:
    curves = {
        "clean": curve((100, 60), (99, 61), (70, 75), (40, 90), (0, None)),
        "gaussian@0.1": curve((100, 55), (50, 80)),
        "gaussian@1.0": curve((90, 30), (0, None)),
    }
    axes = figures.coverage_curves(curves, NOWHERE, "Coverage")
    assert line(axes, "clean").get_xydata().tolist() == [[100, 60], [99, 61], [70, 75], [40, 90]]
    assert line(axes, "gaussian@0.1").get_xydata().tolist() == [[100, 55], [50, 80]]
    assert line(axes, "gaussian@1.0").get_xydata().tolist() == [[90, 30]]
    assert line(axes, "clean").get_color() == "black"
    assert line(axes, "clean").get_linewidth() > line(axes, "gaussian@0.1").get_linewidth()
    assert tuple(line(axes, "gaussian@0.1").get_color()) != tuple(line(axes, "gaussian@1.0").get_color())
    written = {text.get_text(): text.xy for text in axes.texts}
    assert written == {"≥ 4": (40, 90), "≥ 3": (70, 75), "≥ 2": (99, 61)}  # 1 would stand on 2
    assert "%" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()


def test_several_emphasised_curves_look_different() -> None:
    curves = {"clean": curve((100, 60)), "self_consistency": curve((100, 70))}
    axes = figures.coverage_curves(curves, NOWHERE, "", emphasised=("clean", "self_consistency"))
    assert line(axes, "clean").get_linestyle() != line(axes, "self_consistency").get_linestyle()


def test_diversity_scatter() -> None:
    axes = figures.diversity_scatter({"gaussian": GAUSSIAN, "snr": SNR}, NOWHERE, "Diversity", chance=25)
    points, intervals = bars(axes, "gaussian")
    assert points == [(0, 80), (30, 8), (2, 78), (20, 50)]
    assert intervals[1] == (0, 13)
    assert {text.get_text(): text.xy for text in axes.texts} == {"0": (0, 80), "5": (30, 8), "0.1": (2, 78), "1": (20, 50)}
    assert bars(axes, "snr")[0] == []  # one branch has no diversity
    assert level(axes, "chance") == 25
    assert "scale" in axes.get_xlabel()


def test_control_bars() -> None:
    accuracies = {"zero/all": 40, "zero/first": 80, "mean/all": 50, "mean/first": 90, "pause/all": None, "other/first": 70}
    controls = {key: numbers(value) for key, value in accuracies.items()}
    axes = figures.control_bars(controls, NOWHERE, "Controls", baseline=numbers(85), chance=50)
    groups = [one for one in axes.containers if isinstance(one, BarContainer)]
    heights = [[(round(bar.get_x() + bar.get_width() / 2, 3), bar.get_height()) for bar in group] for group in groups]
    assert heights == [[(-0.2, 40), (0.8, 50)], [(0.2, 80), (1.2, 90), (2.2, 70)]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["zero", "mean", "other"]
    _, _, (segments,) = next(one for one in axes.containers if isinstance(one, ErrorbarContainer)).lines
    assert [(low[1], high[1]) for low, high in segments.get_segments()] == [(32, 45), (42, 55)]
    assert [level(axes, name) for name in ("none", "chance")] == [85, 50]
    assert legend(axes)[0] == "all thoughts"
    assert "\n".join(legend(axes)).index("recomputed") > 0


def test_nothing_measured() -> None:
    empty = {"results": {"0.5": numbers(None, 0.5)}, "fits": SNR["fits"], "half_scale": None}
    figures.accuracy_by_scale(empty, NOISES["gaussian"], NOWHERE, "", clean=numbers(None))
    figures.noise_types({"gaussian": empty}, NOWHERE, "", clean=numbers(None))
    figures.noise_types({}, NOWHERE, "")
    figures.coverage_curves({"clean": []}, NOWHERE, "")
    figures.diversity_scatter({"gaussian": empty}, NOWHERE, "")
    figures.control_bars({"zero/all": numbers(None)}, NOWHERE, "", baseline=numbers(None))


def test_a_figure_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "gaussian.png"
    figures.accuracy_by_scale(GAUSSIAN, NOISES["gaussian"], path, "Gaussian", greedy=83, chance=25)
    assert image.imread(path)[..., :3].std() > 0.05  # something is drawn
    assert list(path.parent.iterdir()) == [path]
    assert not plt.get_fignums()
