"""Do thoughts hold a frontier (arXiv 2505.12514)? Probability of the concepts of the question's graph by their distance."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from matplotlib import pyplot as plt
from torch import Tensor

from experiments.plots import save_figure
from experiments.probes.base import GRAPH, Probed, Series, empty, graph_of, in_order

FARTHEST = 4
KINDS = (*(f"distance {number}" for number in range(1, FARTHEST + 1)), "unreachable")
MOST_RANKS, MOST_HEIGHT = 3, 3


def frontier(probed: Probed) -> Series:
    """For each thought the mean probability of a concept, by its distance from the person asked about, in percent.

    Read from the language-model head. A concept is every token that holds its name; one that takes several tokens is not read,
    nor is its kind in that question. Beside those that can be reached: those of the same graph that cannot.
    """
    return _by_distance(probed, ((f"thought {thought}", place, row) for thought, place, row in _read_thoughts(probed)))


def tree(probed: Probed) -> Series:
    """As `frontier`, of the token that comes after k thoughts and the end marker: where would the next step start?"""
    reads = ((f"after {count}", *read) for count in range(probed.thoughts + 1) for read in after(probed, count))
    return _by_distance(probed, reads)


def ranks(probed: Probed) -> Series:
    """How thought k shares its probability among the concepts k steps away, where there are two or more, in percent.

    together: theirs of all. first 1, first 2, ..: the share of the likeliest, of the two likeliest, ... of that. leads: whether
    the likeliest lies on a shortest way to the target; blind: whether one drawn at random would.
    """
    ways, vocabulary = [Ways(record) for record in probed.records(*GRAPH, "target")], words(probed)
    found: Series = {}
    for thought, place, chances in _read_thoughts(probed):
        names = ways[place].at(thought)
        if len(names) < 2 or not vocabulary.keys() >= {*names}:
            continue
        mass = mass_of(names, vocabulary, chances)
        leads = np.array([ways[place].leads(name) for name in names])
        shares = np.cumsum(np.sort(mass)[::-1])[:MOST_RANKS] / mass.sum()
        measured = {
            "together": mass.sum(),
            **{f"first {rank}": share for rank, share in enumerate(shares, start=1)},
            "the likeliest leads": leads[mass.argmax()],
            "a blind choice leads": leads.mean(),
        }
        for name, value in measured.items():
            found.setdefault(f"thought {thought}, {name}", empty(len(ways)))[place] = 100 * value
    return in_order(found)


def height(probed: Probed) -> Series:
    """Right after k thoughts, how likely the concepts k + 1 steps away are by their height and whether they lead on.

    Their probability among one another, in percent, where there are two or more. Height: the fewest steps to a concept that
    leads nowhere (Coconut, section 5.3); a choice is easier to judge the lower it is.
    """
    ways, vocabulary = [Ways(record) for record in probed.records(*GRAPH, "target")], words(probed)
    kinds = [(number, which) for number in range(MOST_HEIGHT + 1) for which in (True, False)]
    sums = {kind: np.zeros((2, len(ways))) for kind in kinds}  # shares, and how many
    for count in range(probed.thoughts):
        for place, chances in after(probed, count):
            names = ways[place].at(count + 1)
            if len(names) < 2 or not vocabulary.keys() >= {*names}:
                continue
            mass = mass_of(names, vocabulary, chances)
            for name, share in zip(names, mass / mass.sum(), strict=True):
                sums[min(ways[place].height(name), MOST_HEIGHT), ways[place].leads(name)][:, place] += share, 1
    found = {}
    for (number, leads), (total, each) in sums.items():
        if each.any():
            least = " or more" if number == MOST_HEIGHT else ""
            name = f"height {number}{least}, {'leads to the target' if leads else 'does not'}"
            found[name] = np.where(each > 0, 100 * total / np.maximum(each, 1), np.nan)
    return found


def graph_after(probed: Probed, path: Path) -> None:
    """The first question's graph after k thoughts: darker is likelier as the next step's start; the true path is red."""
    record, vocabulary = probed.records(*GRAPH)[0], words(probed)
    graph, root = graph_of(record)
    route = nx.shortest_path(graph, root, record["idx_to_symbol"][record["target"]]) if "target" in record else []
    true = set(itertools.pairwise(route))
    layers = dict(enumerate(nx.topological_generations(graph)))
    places = nx.multipartite_layout(graph, subset_key=layers, align="horizontal")
    wide = probed.thoughts + 1
    figure, panels = plt.subplots(1, wide, figsize=(3 * wide, 3.4), layout="constrained", squeeze=False)
    for count, axes in enumerate(panels[0]):
        _, chances = next(after(probed, count))
        nx.draw_networkx(
            graph,
            {name: (x, -y) for name, (x, y) in places.items()},
            ax=axes,
            node_color=mass_of(graph, vocabulary, chances),
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


class Ways:
    """A question's graph: what can be reached, and what lies on a shortest way to the target."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.graph, root = graph_of(record)
        target = record["idx_to_symbol"][record["target"]]
        self.distance = nx.single_source_shortest_path_length(self.graph, root)
        self.to_target = nx.single_source_shortest_path_length(self.graph.reverse(copy=False), target)
        self.whole = self.distance.get(target)

    def at(self, distance: int) -> list[str]:
        return [name for name, found in self.distance.items() if found == distance]

    def leads(self, name: str) -> bool:
        return name in self.to_target and self.distance[name] + self.to_target[name] == self.whole

    def height(self, name: str) -> int:
        below = nx.single_source_shortest_path_length(self.graph, name)
        return min(found for other, found in below.items() if not self.graph.out_degree(other))


def after(probed: Probed, thoughts: int) -> Iterator[tuple[int, np.ndarray]]:
    """Of each question: its place, and the probabilities (V,) of what follows so many thoughts and the end marker."""
    for places, batch, _ in probed.batches(thoughts):
        yield from zip(places, probabilities(probed, probed.think(batch).hidden[:, -1]), strict=True)


def _read_thoughts(probed: Probed) -> Iterator[tuple[int, int, np.ndarray]]:
    """Of each thought: its number, its question's place, and the probabilities (V,) of all tokens."""
    for places, states in probed.states():
        for place, chances in zip(places, probabilities(probed, states), strict=True):  # (N, V)
            yield from ((thought, place, row) for thought, row in enumerate(chances, start=1))


def probabilities(probed: Probed, states: Tensor) -> np.ndarray:
    """Of each token, (..., V)."""
    return probed.model.project(states).float().softmax(dim=-1).cpu().numpy()


def _by_distance(probed: Probed, read: Iterable[tuple[str, int, np.ndarray]]) -> Series:
    """The mean probability of a concept by its kind, in percent. read: when, a question's place, its probabilities (V,)."""
    kinds, vocabulary = [_kinds_of(record) for record in probed.records(*GRAPH)], words(probed)
    found: Series = {}
    for when, place, chances in read:
        if f"{when}, {KINDS[0]}" not in found:  # in this order, whichever a question has first
            found |= {f"{when}, {kind}": empty(len(kinds)) for kind in KINDS}
        for kind, names in kinds[place].items():
            if vocabulary.keys() >= {*names}:
                found[f"{when}, {kind}"][place] = 100 * mass_of(names, vocabulary, chances).astype(float).mean()
    return found


def _kinds_of(record: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the concepts by their kind."""
    graph, root = graph_of(record)
    reached = nx.single_source_shortest_path_length(graph, root)
    kinds: dict[str, list[str]] = {}
    for name, leading_here in graph.in_degree:
        if leading_here:
            kind = f"distance {min(reached[name], FARTHEST)}" if name in reached else "unreachable"
            kinds.setdefault(kind, []).append(name)
    return kinds


def words(probed: Probed) -> dict[str, list[int]]:
    """The tokens in which each word stands."""
    tokenizer = probed.evaluator.tokenizer
    found: dict[str, list[int]] = {}
    for token in range(len(tokenizer)):
        for word in str(tokenizer.decode([token])).replace(".", " ").replace("?", " ").split():
            found.setdefault(word, []).append(token)
    return found


def mass_of(names: Iterable[str], vocabulary: Mapping[str, list[int]], chances: np.ndarray) -> np.ndarray:
    """Of each name the probability of all tokens that hold it."""
    return np.array([chances[vocabulary.get(name, [])].sum() for name in names])
