"""Figures of a run, read from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def accuracy_bars(bars: dict[str, tuple[float, float, float]], chance: float, path: Path, title: str) -> None:
    """Accuracies as fractions with their 95% intervals: name -> (accuracy, low, high)."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    values = [100 * value for value, _, _ in bars.values()]
    errors = [
        [100 * (value - low) for value, low, _ in bars.values()],
        [100 * (high - value) for value, _, high in bars.values()],
    ]
    axes.bar(list(bars), values, yerr=errors, capsize=4, color=[f"C{number}" for number in range(len(bars))])
    axes.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    axes.set(ylabel="test accuracy in %", ylim=(0, 103), title=title)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def method_bars(accuracies: dict[str, list[float]], chance: float, path: Path, title: str) -> None:
    """Mean accuracy of each method over its seeds, every seed as a dot; fractions."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    means = [100 * sum(values) / len(values) for values in accuracies.values()]
    axes.bar(list(accuracies), means, color="#b2cae6", edgecolor="#4a78b5", label="mean over seeds")
    for place, values in enumerate(accuracies.values()):
        offsets = [place + 0.12 * (number - (len(values) - 1) / 2) for number in range(len(values))]
        axes.plot(offsets, [100 * value for value in values], "o", color="#1f3d66", markersize=4)
    axes.axhline(100 * chance, color="grey", linestyle=":", label="chance and depth shortcut")
    axes.set(ylabel="test accuracy in %", ylim=(0, 103), title=title)
    axes.tick_params(axis="x", rotation=25)
    axes.legend(fontsize=8, loc="upper right")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write a figure to a file, whose directory is made, and close it. Another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    plt.close(figure)
    return figure
