"""Figures of one question: what the thoughts of one model say about it."""

from __future__ import annotations

import itertools
from pathlib import Path

import networkx as nx
import torch
from matplotlib import pyplot as plt

from experiments.plots import save_figure
from experiments.probes.base import Probed
from experiments.probes.frontier import GRAPH, ended, probabilities, words
from experiments.probes.layers import final_norm

QUESTION = 0  # the place of the one that is drawn
LONGEST = 12  # letters of a token that a cell shows


def graph_after(probed: Probed, path: Path) -> None:
    """The question's graph after each number of thoughts: darker is likelier as the next step's start; the true path is red."""
    record, vocabulary = probed.records(*GRAPH)[QUESTION], words(probed)
    names = record["idx_to_symbol"]
    graph = nx.DiGraph([(names[a], names[b]) for a, b in record["edges"]])
    route = nx.shortest_path(graph, names[record["root"]], names[record["target"]]) if "target" in record else []
    true = set(itertools.pairwise(route))
    for layer, nodes in enumerate(nx.topological_generations(graph)):
        for node in nodes:
            graph.nodes[node]["layer"] = layer
    places = nx.multipartite_layout(graph, subset_key="layer", align="horizontal")
    figure, panels = plt.subplots(
        1, probed.thoughts + 1, figsize=(3 * (probed.thoughts + 1), 3.4), layout="constrained", squeeze=False
    )
    for count, axes in enumerate(panels[0]):
        _, states = next(ended(probed, count))
        chances = probabilities(probed, states[QUESTION])
        mass = {node: float(chances[vocabulary.get(node, [])].sum()) for node in graph}
        nx.draw_networkx(
            graph,
            {node: (x, -y) for node, (x, y) in places.items()},
            ax=axes,
            node_color=[mass[node] for node in graph],
            cmap="Blues",
            vmin=0,
            vmax=1,
            edgecolors="black",
            edge_color=["red" if edge in true else "grey" for edge in graph.edges],
            font_size=6,
            font_color="black",
            node_size=500,
            alpha=0.8,
        )
        axes.set_title(f"k = {count}", fontsize=9)
        axes.margins(0.3)
        axes.axis("off")
    save_figure(figure, path)


def lens(probed: Probed, path: Path) -> None:
    """The likeliest token of every layer at every thought, and its probability."""
    norm = final_norm(probed.model.decoder)
    _, states = next(probed.layers())
    own = states[QUESTION]  # (L + 1, N, D)
    chances = probed.model.project(torch.cat([norm(own[:-1]), own[-1:]])).float().softmax(dim=-1)
    best = chances.max(dim=-1)
    figure, axes = plt.subplots(figsize=(1.5 + 1.3 * own.shape[1], 1 + 0.45 * own.shape[0]), layout="constrained")
    image = axes.imshow(best.values.cpu(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, tokens in enumerate(best.indices.tolist()):
        for thought, token in enumerate(tokens):
            said = str(probed.evaluator.tokenizer.decode([token])).strip() or repr(probed.evaluator.tokenizer.decode([token]))
            dark = float(best.values[layer, thought]) > 0.6
            axes.text(thought, layer, said[:LONGEST], ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(own.shape[1]), [f"thought {number + 1}" for number in range(own.shape[1])])
    axes.set_yticks(range(own.shape[0]), ["embedding", *(f"layer {number + 1}" for number in range(own.shape[0] - 1))])
    axes.set_title(probed.dataset[QUESTION]["question"][-60:], fontsize=8)
    figure.colorbar(image, label="probability")
    save_figure(figure, path)
