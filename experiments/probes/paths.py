"""What does the model write after k thoughts (Coconut, section 5.1)? Paths through the question's graph, and bare answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from matplotlib import pyplot as plt

from experiments.across_seeds import Numbers
from experiments.plots import save_figure, shades
from experiments.probes.base import GRAPH, Probed, Series, graph_of

KINDS = ("correct path", "longer path", "wrong target", "hallucination", "correct label", "incorrect label")


def paths(probed: Probed) -> Series:
    """For each number of thoughts and kind of what is written whether it is that, in percent.

    A path: steps were written. It is correct if it goes on from what can be reached to the target by a shortest way, and the
    answer is right; a hallucination if a step is no edge of the graph, or does not go on from the one before. A label: the
    answer alone.
    """
    records = probed.records(*GRAPH, "target")
    found: Series = {}
    for count in range(probed.thoughts + 1):
        answers = probed.evaluator.predict(probed.model, probed.stage, count if probed.thoughts else "gold")
        said = [kind_of(record, one.output, one.correct) for record, one in zip(records, answers, strict=True)]
        for kind in KINDS:
            found[f"{count} thoughts, {kind}"] = np.array([100.0 * (one == kind) for one in said])
    return found


def kind_of(record: dict[str, Any], output: str, correct: bool) -> str:
    """One of KINDS. output: what was written after the thoughts."""
    graph, root = graph_of(record)
    target = record["idx_to_symbol"][record["target"]]
    lines = [line for line in output.split("#")[0].splitlines() if line.strip()]
    if not lines:
        return "correct label" if correct else "incorrect label"
    route: list[str] = []
    for line in lines:
        named = [word for word in re.findall(r"\w+", line) if word in graph]
        goes_on = not route or len(named) == 1 or named[:1] == route[-1:]  # symbols: a step names only where it arrives
        if not named or not goes_on:
            return "hallucination"
        route += named[1:] if route and len(named) > 1 else named
    if not nx.has_path(graph, root, route[0]) or not nx.is_path(graph, route):
        return "hallucination"
    if route[-1] != target or not correct:
        return "wrong target"
    return "correct path" if len(route) - 1 == nx.shortest_path_length(graph, route[0], target) else "longer path"


def stacked(found: Mapping[str, Mapping[str, Numbers]], groups: Sequence[str], path: Path) -> None:
    """A panel for each group, a bar for each number of thoughts, stacked by kind; means over seeds."""
    colours = shades(KINDS)
    figure, panels = plt.subplots(1, len(groups), figsize=(3.6 * len(groups) + 2, 3.4), layout="constrained", squeeze=False)
    most = max(int(key.split()[0]) for key in found)
    for group, axes in zip(groups, panels[0], strict=True):
        counts = sorted({int(key.split()[0]) for key, by_group in found.items() if group in by_group})
        below = np.zeros(len(counts))
        for kind in KINDS:
            shares = np.array([found[f"{count} thoughts, {kind}"][group]["mean"] for count in counts])
            axes.bar(counts, shares, bottom=below, color=colours[kind], label=kind, width=0.8)
            below += shares
        axes.set(title=group, xlabel="thoughts given", xticks=counts, xlim=(-0.6, most + 0.6), ylim=(0, 100))
    panels[0][0].set_ylabel("share of questions in %")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(figure, path)
