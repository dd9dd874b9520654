"""Do thoughts hold a frontier (arXiv 2505.12514)? Probability of the concepts of the question's graph by their distance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
import numpy as np
from torch import Tensor

from experiments.probes.base import Probed, Series, empty

FARTHEST = 4
KINDS = (*(f"distance {number}" for number in range(1, FARTHEST + 1)), "unreachable")
MOST_RANKS, MOST_HEIGHT = 3, 3
GRAPH = ("edges", "root", "idx_to_symbol")  # fields of records that hold a graph


def frontier(probed: Probed) -> Series:
    """For each thought the mean probability of a concept, by its distance from the person asked about, in percent.

    Read from the language-model head. A concept is every token that holds its name. Beside those that can be reached:
    those of the same graph that cannot.
    """
    read = ByDistance(probed)
    for places, states in probed.states():
        for place, chances in zip(places, probabilities(probed, states), strict=True):  # (N, V)
            for thought, row in enumerate(chances, start=1):
                read.add(f"thought {thought}", place, row)
    return read.found


def tree(probed: Probed) -> Series:
    """As `frontier`, of the token that comes after k thoughts and the end marker: where would the next step start?"""
    read = ByDistance(probed)
    for count in range(probed.thoughts + 1):
        for places, states in ended(probed, count):
            for place, row in zip(places, probabilities(probed, states), strict=True):  # (V,)
                read.add(f"after {count}", place, row)
    return read.found


def ranks(probed: Probed) -> Series:
    """How thought k shares its probability among the concepts k steps away, where there are two or more, in percent.

    together: theirs of all. first 1, first 2, ..: the share of the likeliest, of the two likeliest, ... of that. leads: whether
    the likeliest lies on a shortest way to the target; blind: whether one drawn at random would.
    """
    ways, vocabulary = [Ways(record) for record in probed.records(*GRAPH, "target")], words(probed)
    found: Series = {}

    def keep(name: str, place: int, value: float) -> None:
        found.setdefault(name, empty(len(ways)))[place] = 100 * value

    for places, states in probed.states():
        for place, chances in zip(places, probabilities(probed, states), strict=True):
            for thought, row in enumerate(chances, start=1):
                nodes = ways[place].at(thought)
                if len(nodes) < 2:
                    continue
                mass = np.array([row[vocabulary.get(ways[place].names[node], [])].sum() for node in nodes])
                leads = np.array([ways[place].leads(node) for node in nodes])
                keep(f"thought {thought}, together", place, mass.sum())
                for rank, share in enumerate(np.cumsum(np.sort(mass)[::-1])[:MOST_RANKS] / mass.sum(), start=1):
                    keep(f"thought {thought}, first {rank}", place, share)
                keep(f"thought {thought}, the likeliest leads", place, leads[mass.argmax()])
                keep(f"thought {thought}, a blind choice leads", place, leads.mean())
    return dict(sorted(found.items()))


def height(probed: Probed) -> Series:
    """Right after k thoughts, how likely the concepts k + 1 steps away are by their height and whether they lead on.

    Their probability among one another, in percent, where there are two or more. Height: the fewest steps to a concept that
    leads nowhere (Coconut, section 5.3); a choice is easier to judge the lower it is.
    """
    ways, vocabulary = [Ways(record) for record in probed.records(*GRAPH, "target")], words(probed)
    kinds = [(number, which) for number in range(MOST_HEIGHT + 1) for which in (True, False)]
    sums = {kind: np.zeros((2, len(ways))) for kind in kinds}  # shares, and how many
    for count in range(probed.thoughts):
        for places, states in ended(probed, count):
            for place, row in zip(places, probabilities(probed, states), strict=True):
                nodes = ways[place].at(count + 1)
                mass = np.array([row[vocabulary.get(ways[place].names[node], [])].sum() for node in nodes])
                for node, share in zip(nodes, mass / mass.sum() if len(nodes) > 1 else (), strict=False):
                    sums[min(ways[place].height(node), MOST_HEIGHT), ways[place].leads(node)][:, place] += share, 1
    found = {}
    for (number, leads), (total, each) in sums.items():
        if each.any():
            least = "or more" if number == MOST_HEIGHT else ""
            name = f"height {number} {least}".strip() + (", leads to the target" if leads else ", does not")
            found[name] = np.where(each > 0, 100 * total / np.maximum(each, 1), np.nan)
    return found


class Ways:
    """A question's graph: what can be reached, and what lies on a shortest way to the target."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.graph = nx.DiGraph([tuple(edge) for edge in record["edges"]])
        self.names: list[str] = record["idx_to_symbol"]
        self.distance = nx.single_source_shortest_path_length(self.graph, record["root"])
        self.to_target = nx.single_source_shortest_path_length(self.graph.reverse(copy=False), record["target"])
        self.whole = self.distance.get(record["target"])

    def at(self, distance: int) -> list[int]:
        return [node for node, found in self.distance.items() if found == distance]

    def leads(self, node: int) -> bool:
        return node in self.to_target and self.distance[node] + self.to_target[node] == self.whole

    def height(self, node: int) -> int:
        below = nx.single_source_shortest_path_length(self.graph, node)
        return min(found for other, found in below.items() if not self.graph.out_degree(other))


def ended(probed: Probed, thoughts: int) -> Iterator[tuple[list[int], Tensor]]:
    """Of each batch: places of its questions, and the states (B, D) at the end marker after so many thoughts."""
    for places, batch, _ in probed.batches(thoughts):
        yield places, probed.think(batch).hidden[:, -1]


def probabilities(probed: Probed, states: Tensor) -> np.ndarray:
    """Of each token, (..., V)."""
    chances: np.ndarray = probed.model.project(states).float().softmax(dim=-1).cpu().numpy()
    return chances


class ByDistance:
    """Collects in `found` the mean probability of a concept by its kind, in percent."""

    def __init__(self, probed: Probed) -> None:
        self.kinds = [kinds_of(record) for record in probed.records(*GRAPH)]
        self.vocabulary = words(probed)
        self.found: Series = {}
        self.seen: set[str] = set()

    def add(self, when: str, place: int, chances: np.ndarray) -> None:
        """chances: (V,) of one question."""
        by_kind: dict[str, list[float]] = {}
        for name, kind in self.kinds[place].items():
            by_kind.setdefault(kind, []).append(float(chances[self.vocabulary.get(name, [])].sum()))
        for kind in KINDS if when not in self.seen else ():  # in this order, whichever a question has first
            self.found[f"{when}, {kind}"] = empty(len(self.kinds))
        self.seen.add(when)
        for kind, each in by_kind.items():
            self.found[f"{when}, {kind}"][place] = 100 * float(np.mean(each))


def kinds_of(record: dict[str, Any]) -> dict[str, str]:
    """The kind of each concept by its name."""
    graph = nx.DiGraph([tuple(edge) for edge in record["edges"]])
    reached = nx.single_source_shortest_path_length(graph, record["root"])
    kinds = {}
    for node in graph:
        if graph.in_degree(node):
            distance = reached.get(node)
            kinds[record["idx_to_symbol"][node]] = "unreachable" if distance is None else f"distance {min(distance, FARTHEST)}"
    return kinds


def words(probed: Probed) -> dict[str, list[int]]:
    """The tokens in which each word stands."""
    tokenizer = probed.evaluator.tokenizer
    found: dict[str, list[int]] = {}
    for token in range(len(tokenizer)):
        for word in str(tokenizer.decode([token])).replace(".", " ").replace("?", " ").split():
            found.setdefault(word, []).append(token)
    return found
