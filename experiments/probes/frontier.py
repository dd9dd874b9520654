"""Do thoughts hold a frontier (arXiv 2505.12514)? Probability of the concepts of the question's graph by their distance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
import numpy as np
from torch import Tensor

from experiments.probes.base import Probed, Series, empty

FARTHEST = 4
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

    def add(self, when: str, place: int, chances: np.ndarray) -> None:
        """chances: (V,) of one question."""
        by_kind: dict[str, list[float]] = {}
        for name, kind in self.kinds[place].items():
            by_kind.setdefault(kind, []).append(float(chances[self.vocabulary.get(name, [])].sum()))
        for kind, each in sorted(by_kind.items()):
            self.found.setdefault(f"{when}, {kind}", empty(len(self.kinds)))[place] = 100 * float(np.mean(each))


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
