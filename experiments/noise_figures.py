"""Figures of the noise types: `python -m experiments.noise_figures NOISE_CHECK_JSON OUT`.

NOISE_CHECK_JSON is what `python -m experiments.noise_check` wrote. Writes to OUT: noise_ratio.png (size of the noise, and what
is left of the thought's direction, by scale), noise_vectors.png (each type on one vector of two dimensions) and
noise_schedules.png (the share of the scale in later passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.checks.noise_laws import NoiseSetting, expected_cosine, expected_ratio
from experiments.plots import save_figure
from noise import NOISES, SCHEDULES, NoiseType, apply_noise_to_hidden_states, derived_generator, schedule_factor
from systems.arguments import Parser
from systems.files import read_typed
from utils import UserError, entry_point, get_logger

MARKERS = ("o", "D", "v", "x", "s", "^", "+", "1")  # types that fall on one line differ in all three
DASHES: tuple[Any, ...] = ("-", "-", "-", (0, (5, 3)), "-", "-", (0, (1, 2)), (0, (1, 4)))
VECTOR = (1.6, 1.2)  # of length 2
DRAWS = 250
EXAMPLE_NORMS = (10.0, 10.0, 14.0, 20.0, 20.0, 10.0, 6.0, 5.0)  # of eight thoughts


def ratio_figure(result: dict[str, Any], path: Path) -> Figure:
    """Lines are the formulas, points what was measured on the thoughts of `result`, the content of noise_check.json."""
    norms = result["norms"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.1), layout="constrained")
    for number, kind in enumerate(NOISES.values()):
        name = NoiseSetting(kind.noise_type, kind.direction, 0).name
        measured = [row for row in result["float32"]["settings"] if row["name"] == name and row["ratio"] > 0]
        if not measured:
            continue
        scales = np.geomspace(min(row["scale"] for row in measured), max(row["scale"] for row in measured), 200)
        settings = [NoiseSetting(kind.noise_type, kind.direction, scale) for scale in scales]
        ratios = [expected_ratio(one, norms["mean_inverse_square"], norms["width"]) for one in settings]
        kept = np.array([expected_cosine(one, ratio) for one, ratio in zip(settings, ratios, strict=True)])
        kept[kept == 0] = np.nan  # a zero thought has no direction
        colour, marker, dashes = f"C{number % 10}", MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
        for axes, line, key in ((left, ratios, "ratio"), (right, kept, "cosine")):
            axes.plot(scales, line, color=colour, linestyle=dashes, linewidth=1.3)
            points = [(row["scale"], row[key]) for row in measured if row[key] is not None]
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, label=name)
    left.set(xscale="log", yscale="log", xlabel="scale s", ylabel="‖n‖ / ‖h‖", title="Norm of the noise by norm of the thought")
    right.set(xscale="log", xlabel="scale s", ylabel="cos(h, h')", ylim=(-0.04, 1.04), title="What is left of the direction")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(
        f"Lines: formulas. Points: measured on {norms['all']['count']:,} thoughts (width {norms['width']}, ‖h‖ = "
        f"{norms['all']['mean']:.1f} ± {norms['all']['deviation']:.2f})",
        fontsize=9,
    )
    return save_figure(figure, path)


def vector_figure(path: Path) -> Figure:
    rows = -(-len(NOISES) // 4)
    figure, grid = plt.subplots(rows, 4, figsize=(10.5, 2.8 * rows), layout="constrained", sharex=True, sharey=True)
    for number, (axes, kind) in enumerate(zip(grid.flat, NOISES.values(), strict=False)):
        _draw_vector(axes, kind, f"C{number % 10}")
    return save_figure(figure, path)


def _draw_vector(axes: Axes, kind: NoiseType, colour: str) -> None:
    """The vector as an arrow, and where noise takes it."""
    setting = NoiseSetting(kind.noise_type, kind.direction, 2.0 if kind.reciprocal else 0.5)
    hidden, generator = torch.tensor([VECTOR]).repeat(DRAWS, 1), derived_generator("figure", setting.name)
    perturbed, _ = apply_noise_to_hidden_states(hidden, setting.scale, kind.noise_type, kind.direction, generator)
    axes.plot(*perturbed.T.tolist(), "o", color=colour, markersize=4, alpha=0.35, markeredgewidth=0)
    if len(places := perturbed.round(decimals=4).unique(dim=0)) <= 4:  # each once more, so that it is seen
        axes.plot(*places.T.tolist(), "o", color=colour, markersize=8)
    axes.annotate("", VECTOR, (0, 0), arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.5})
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set(aspect="equal", xlim=(-0.7, 3.5), ylim=(-0.7, 3.1))
    axes.set_title(f"{setting.name}, s = {setting.scale:g}\n{kind.written}", fontsize=10)


def schedule_figure(path: Path) -> Figure:
    """Eight passes of which the first is the first noisy one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    for schedule in SCHEDULES:
        if schedule != "adaptive":
            _draw_schedule(left, schedule, (1.0,) * len(EXAMPLE_NORMS))
    for schedule in ("exponential", "adaptive"):
        _draw_schedule(right, schedule, EXAMPLE_NORMS)
    right.bar(range(1, 9), [norm / 20 for norm in EXAMPLE_NORMS], color="#dddddd", zorder=0, label="norm of the thought / 20")
    left.set(ylabel="share of the scale", title="Schedules (noise_at_step = 1, 8 thoughts)")
    right.set(title="adaptive follows the norms (an example)")
    for axes in (left, right):
        axes.set(xlabel="latent pass", ylim=(-0.04, 1.1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return save_figure(figure, path)


def _draw_schedule(axes: Axes, schedule: str, norms: Sequence[float]) -> None:
    later = len(norms) - 1
    factors = [1.0, *(schedule_factor(schedule, step, later, norms[1 : step + 2]) for step in range(later))]
    colour = f"C{SCHEDULES.index(schedule)}"
    axes.plot(range(1, later + 2), factors, marker="o", markersize=4, color=colour, label=schedule)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.noise_figures", __doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(given)
    result = read_typed(arguments.result, dict[str, Any])
    if not result.get("float32", {}).get("settings"):
        raise UserError(f"{arguments.result}: not what `python -m experiments.noise_check` writes")
    ratio_figure(result, arguments.out / "noise_ratio.png")
    vector_figure(arguments.out / "noise_vectors.png")
    schedule_figure(arguments.out / "noise_schedules.png")
    get_logger().info(f"three figures written to {arguments.out}")


if __name__ == "__main__":
    main()
