"""What all figures share, and those of training runs. Accuracies in percent, None where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure

Numbers = Mapping[str, Any]  # one condition: accuracy, low, high (of its 95% interval), ...
Point = tuple[float, float, float, float]  # place on the x axis, accuracy, and the bounds of its 95% interval
ACCURACY = "accuracy in %"
REFERENCES = {"clean": ("black", "-"), "greedy": ("#4a78b5", "--"), "chance": ("grey", ":")}
STAGE_COLOURS = ("#e8eef7", "#cddcee", "#b2cae6", "#97b8dd", "#7ca6d4")


def epoch_curves(runs: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Loss (above) and answer accuracy (below) by epoch; the stages of the first run are shaded.

    Epochs are counted as they were trained: a stage that was left early leaves no gap.
    runs: name -> rows of kind "epoch" of metrics.jsonl. The last stage's accuracy is the one that needs no written steps.
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    for axes in (above, below):
        _shade_stages(axes, next(iter(runs.values())))
        axes.grid(alpha=0.3)
    for number, (name, rows) in enumerate(runs.items()):
        epochs = range(1, len(rows) + 1)
        colour = f"C{number}"
        above.plot(epochs, [row["train_loss"] for row in rows], colour, label=f"{name}, training")
        above.plot(epochs, [row["val_loss"] for row in rows], colour, linestyle="--", label=f"{name}, validation")
        below.plot(epochs, [100 * row["accuracy"] for row in rows], colour, marker=".", label=name)
    below.axhline(50, color="grey", linestyle=":", label="chance")
    above.set(ylabel="cross entropy per labelled token", title=title)
    above.set_ylim(bottom=0)
    below.set(ylabel="validation accuracy in %", xlabel="epochs trained", ylim=(0, 108))
    above.legend(fontsize=8)
    below.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def _shade_stages(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for stage in sorted({row["stage"] for row in rows}):
        epochs = [number for number, row in enumerate(rows, start=1) if row["stage"] == stage]
        axes.axvspan(epochs[0] - 0.5, epochs[-1] + 0.5, color=STAGE_COLOURS[stage % len(STAGE_COLOURS)], zorder=0, linewidth=0)
        middle = (epochs[0] + epochs[-1]) / 2
        axes.text(middle, 0.985, f"stage {stage}", transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8)


def grouped(
    series: Mapping[str, Mapping[str, Numbers]],
    path: Path,
    title: str,
    xlabel: str = "",
    names: Mapping[str, str] | None = None,
    colours: Sequence[Any] = (),
    points: Mapping[str, Any] | None = None,
    baseline: Numbers | None = None,
    legend: str = "",
    **lines: float | None,
) -> Axes:
    """Accuracy with its 95% interval: label -> group -> numbers. A group has one bar of each label that has numbers for it.

    names: what stands below a group instead of its own name. points: the style of points that stand for bars. baseline: the
    model's own, drawn as a line with its interval. lines: accuracies by their names in REFERENCES.
    """
    groups = list(dict.fromkeys(group for members in series.values() for group in members))
    with drawing(path, (8.5, 4.6), legend, xlabel=xlabel, ylabel=ACCURACY, title=title) as axes:
        axes.grid(visible=False, axis="x")
        width = 0.8 / max(1, len(series))
        for number, (label, members) in enumerate(series.items()):
            shift = width * (number - (len(series) - 1) / 2)
            drawn = [point(groups.index(group) + shift, one) for group, one in members.items()]
            colour = colours[number] if len(colours) else f"C{number}"
            if points is None:
                places, heights = [one[0] for one in drawn], [one[1] for one in drawn]
                axes.bar(places, heights, 0.95 * width, color=colour, alpha=0.75, label=label)
                with_intervals(axes, drawn, color="black", linestyle="none", elinewidth=1)
            else:
                with_intervals(axes, drawn, color=colour, label=label, **points)
        if baseline is not None and baseline["accuracy"] is not None:
            axes.axhspan(baseline["low"], baseline["high"], color="black", alpha=0.1, linewidth=0)
            axes.axhline(baseline["accuracy"], color="black", linewidth=1, label="none: the model's own")
        references(axes, **lines)
        shown = [(names or {}).get(group, group) for group in groups]
        axes.set_xticks(range(len(groups)), shown, rotation=20 if max(map(len, groups), default=0) > 12 else 0)
    return axes


def method_bars(accuracies: dict[str, list[float]], chance: float, path: Path, title: str) -> None:
    """Mean accuracy of each method over its seeds, every seed as a dot; fractions."""
    with drawing(path, (9.5, 3.8), ylabel="test accuracy in %", title=title) as axes:
        means = [100 * sum(values) / len(values) for values in accuracies.values()]
        axes.bar(list(accuracies), means, color="#b2cae6", edgecolor="#4a78b5", label="mean over seeds")
        for place, values in enumerate(accuracies.values()):
            offsets = [place + 0.12 * (number - (len(values) - 1) / 2) for number in range(len(values))]
            axes.plot(offsets, [100 * value for value in values], "o", color="#1f3d66", markersize=4)
        references(axes, chance=100 * chance)
        axes.tick_params(axis="x", rotation=25)


# --- shared by all figures ---


@contextmanager
def drawing(path: Path, size: tuple[float, float], legend: str = "", **labels: Any) -> Iterator[Axes]:
    """One panel with a grid. At the end it gets its labels and its legend, and is written to a file.

    The legend stands beside the panel; what was measured comes before lines that help to read it. legend: its title.
    """
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_ylim(-2, 105)
    yield axes
    axes.set(**labels)
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    entries.sort(key=lambda entry: not isinstance(entry[0], Container))
    if entries:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(*zip(*entries, strict=True), fontsize=8, title_fontsize=8, title=legend or None, **place)
    save_figure(figure, path)


def point(place: float, numbers: Numbers) -> Point:
    return place, numbers["accuracy"], numbers["low"], numbers["high"]


def with_intervals(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    x, values = [one[0] for one in points], [one[1] for one in points]
    below = [max(0, value - low) for _, value, low, _ in points]
    above = [max(0, high - value) for _, value, _, high in points]
    axes.errorbar(x, values, yerr=[below, above], **{"capsize": 3, "markersize": 5, "elinewidth": 0.8, **style})


def references(axes: Axes, **accuracies: float | None) -> None:
    for name, accuracy in accuracies.items():
        if accuracy is not None:
            colour, style = REFERENCES[name]
            axes.axhline(accuracy, color=colour, linestyle=style, linewidth=1, label=name)


def shades(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each name, from dark to light."""
    return dict(zip(names, plt.get_cmap("viridis")(np.linspace(0, 0.88, len(names))), strict=True))


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write a figure to a file, whose directory is made, and close it. Another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    plt.close(figure)
    return figure
