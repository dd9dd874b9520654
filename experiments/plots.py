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

from systems.writing import replacing

Numbers = Mapping[str, Any]  # one condition: accuracy, low, high (of its 95% interval), ...
Point = tuple[float, Numbers]  # a place on the x axis and what was measured there
ACCURACY = "accuracy in %"
REFERENCES = {"clean": ("black", "-"), "greedy": ("#4a78b5", "--"), "chance": ("grey", ":")}
# Of the thoughts; not the rank, as its scale is another.
HEALTH = ("thought_norm", "thought_distance", "thought_cosine", "thought_change", "question_cosine")
STAGE_COLOURS = ("#e8eef7", "#cddcee", "#b2cae6", "#97b8dd", "#7ca6d4")


def epoch_curves(runs: dict[str, list[dict[str, Any]]], path: Path, title: str, chance: float | None = None) -> None:
    """Loss, answer accuracy and, if it has thoughts, their health by epoch; stages and health are the first run's.

    Epochs are counted as they were trained: a stage that was left early leaves no gap.
    runs: name -> rows of kind "epoch" of metrics.jsonl. chance: in %, drawn as a line.
    The last stage's accuracy is the one that needs no written steps.
    """
    first_name, first = next(iter(runs.items()))
    measured = [name for name in HEALTH if any(name in row for row in first)]
    count = 3 if measured else 2
    figure, panels = plt.subplots(count, 1, figsize=(8, 3 * count), sharex=True, layout="constrained")
    above, below = panels[:2]
    for axes in panels:
        _shade_stages(axes, first)
        axes.grid(alpha=0.3)
    for number, (name, rows) in enumerate(runs.items()):
        epochs = range(1, len(rows) + 1)
        colour = f"C{number}"
        above.plot(epochs, [row["train_loss"] for row in rows], colour, label=f"{name}, training")
        above.plot(epochs, [row["val_loss"] for row in rows], colour, linestyle="--", label=f"{name}, validation")
        below.plot(epochs, [100 * row["accuracy"] for row in rows], colour, marker=".", label=name)
    for name in measured:
        values = [row.get(name, np.nan) for row in first]
        panels[2].plot(range(1, len(first) + 1), values, marker=".", label=name.replace("_", " "))
    references(below, {"chance": chance})
    above.set(ylabel="cross entropy per labelled token", title=title)
    above.set_ylim(bottom=0)
    below.set(ylabel="validation accuracy in %", ylim=(0, 108))
    panels[-1].set(xlabel="epochs trained")
    above.legend(fontsize=8)
    below.legend(fontsize=8, loc="lower right")
    if measured:
        panels[2].set(ylabel=f"thoughts of {first_name}")
        panels[2].legend(fontsize=8, loc="upper left")
    save_figure(figure, path)


def _shade_stages(axes: Axes, rows: list[dict[str, Any]]) -> None:
    stages = [row["stage"] for row in rows]
    for stage in sorted(set(stages)):
        first, last = stages.index(stage) + 1, len(stages) - stages[::-1].index(stage)
        axes.axvspan(first - 0.5, last + 0.5, color=STAGE_COLOURS[stage % len(STAGE_COLOURS)], zorder=0, linewidth=0)
        place = ((first + last) / 2, 0.985)
        axes.text(*place, f"stage {stage}", transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8)


def grouped(
    series: Mapping[str, Mapping[str, Numbers]],
    path: Path,
    title: str,
    xlabel: str = "",
    legend: str = "",
    points: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: Numbers | None = None,
    lines: Mapping[str, float | None] | None = None,
) -> Axes:
    """Accuracy with its 95% interval: label -> group -> numbers. A group has one bar of each label that has numbers for it.

    points: the style of each label's points, which then stand for bars. baseline: the model's own, drawn as a line with its
    interval. lines: accuracies by their names in REFERENCES.
    """
    groups = list(dict.fromkeys(group for members in series.values() for group in members))
    with drawing(path, (8.5, 4.6), lines or {}, legend, xlabel=xlabel, ylabel=ACCURACY, title=title) as axes:
        axes.grid(visible=False, axis="x")
        width = 0.8 / max(1, len(series))
        for number, (label, members) in enumerate(series.items()):
            shift = width * (number - (len(series) - 1) / 2)
            drawn = [(groups.index(group) + shift, one) for group, one in members.items()]
            if points is None:
                heights = [one["accuracy"] for _, one in drawn]
                axes.bar([x for x, _ in drawn], heights, 0.95 * width, color=f"C{number}", alpha=0.75, label=label)
                with_intervals(axes, drawn, color="black", linestyle="none", elinewidth=1)
            else:
                with_intervals(axes, drawn, label=label, **points[label])
        if baseline is not None and baseline["accuracy"] is not None:
            axes.axhspan(baseline["low"], baseline["high"], color="black", alpha=0.1, linewidth=0)
            axes.axhline(baseline["accuracy"], color="black", linewidth=1, label="none: the model's own")
        longest = max((len(group.split("\n")[0]) for group in groups), default=0)
        axes.set_xticks(range(len(groups)), groups, rotation=20 if longest > 12 else 0)
    return axes


def method_bars(accuracies: dict[str, list[float]], chance: float, path: Path, title: str) -> None:
    """Mean accuracy of each method over its seeds, every seed as a dot; fractions."""
    with drawing(path, (9.5, 3.8), {"chance": 100 * chance}, ylabel="test accuracy in %", title=title) as axes:
        means = [100 * sum(values) / len(values) for values in accuracies.values()]
        axes.bar(list(accuracies), means, color="#b2cae6", edgecolor="#4a78b5", label="mean over seeds")
        for place, values in enumerate(accuracies.values()):
            offsets = [place + 0.12 * (number - (len(values) - 1) / 2) for number in range(len(values))]
            axes.plot(offsets, [100 * value for value in values], "o", color="#1f3d66", markersize=4)
        axes.set_xticks(range(len(accuracies)), [*accuracies], rotation=25, ha="right", rotation_mode="anchor")


def learning_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], chance: float, path: Path, title: str) -> None:
    """Validation accuracy by examples trained: method -> seeds -> rows of kind "epoch" of metrics.jsonl.

    The thick line is the median of the seeds at each of the first seed's epochs, the thin ones are the seeds.
    """
    labels = {"xlabel": "examples trained, thousands", "ylabel": "validation accuracy in %", "title": title}
    with drawing(path, (9, 4.6), {"chance": 100 * chance}, **labels) as axes:
        for number, (method, seeds) in enumerate(runs.items()):
            style = f"C{number}" + ("-" if number < 10 else "--")  # there are ten colours
            curves = [([row["examples"] / 1000 for row in rows], [100 * row["accuracy"] for row in rows]) for rows in seeds]
            for curve in curves if len(curves) > 1 else ():
                axes.plot(*curve, style, linewidth=0.6, alpha=0.5)
            middle = np.median([np.interp(curves[0][0], *curve) for curve in curves], axis=0)
            axes.plot(curves[0][0], middle, style, linewidth=2, label=method)


# --- shared by all figures ---


@contextmanager
def drawing(
    path: Path, size: tuple[float, float], lines: Mapping[str, float | None], legend: str = "", **labels: Any
) -> Iterator[Axes]:
    """One panel with a grid. At the end it gets these lines (see `references`), labels and a legend, and is written to a file.

    The legend stands beside the panel; what was measured comes before lines that help to read it. legend: its title.
    """
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_ylim(-2, 105)
    yield axes
    references(axes, lines)
    axes.set(**labels)
    entries = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: not isinstance(entry[0], Container))
    if entries:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(*zip(*entries, strict=True), fontsize=8, title_fontsize=8, title=legend or None, **place)
    save_figure(figure, path)


def with_intervals(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    accuracy, low, high = (np.array([one[key] for _, one in points]) for key in ("accuracy", "low", "high"))
    errors = np.maximum(0, [accuracy - low, high - accuracy])
    axes.errorbar([x for x, _ in points], accuracy, yerr=errors, **{"capsize": 3, "markersize": 5, "elinewidth": 0.8, **style})


def references(axes: Axes, accuracies: Mapping[str, float | None]) -> None:
    for name, accuracy in accuracies.items():
        if accuracy is not None:
            colour, style = REFERENCES[name]
            axes.axhline(accuracy, color=colour, linestyle=style, linewidth=1, label=name)


def shades(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each name, from dark to light."""
    return dict(zip(names, plt.get_cmap("viridis")(np.linspace(0, 0.88, len(names))), strict=True))


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write a figure whole to a file, whose directory is made, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:])
    plt.close(figure)
    return figure
