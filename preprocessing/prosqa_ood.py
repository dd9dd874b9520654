"""ProsQA graphs unlike those of the training set: longer searches, any acyclic graph, many edges.

The published sets of this kind leave out what the person is, so that nothing can be concluded from them. Here the person's
premise stands in the question, exactly one option can be reached, and each graph is asked about for both persons, so that
whatever ignores the person is right in half of the questions.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import networkx as nx
import numpy as np

from preprocessing.prosqa_graphs import Edge, Question

ONE, OTHER = 0, 1  # the persons asked about, and the side of what descends from them alone
SHARED = 2  # descends from anybody; nothing that can be an answer descends from it
OTHERS = 2  # further persons


class Shape(NamedTuple):
    """Steps from the person to both options, nodes and edges of a graph. ProsQA's training set has 3 to 6, 23 and 36.

    train_hops: steps in the training file, whose graphs have any size from two bare paths up to that: small models learn to
    follow an edge in small graphs, or not at all.
    """

    hops: Sequence[int]
    nodes: int
    edges: int
    train_hops: Sequence[int] = ()


SHAPES = {
    "7hop": Shape((7,), 26, 40),
    "8hop": Shape((8,), 28, 42),
    "dag": Shape((3, 4, 5, 6), 23, 36),
    "dense": Shape((3, 4, 5, 6), 24, 70),
    "search": Shape((3, 4), 18, 26, train_hops=(1, 2, 3, 4)),  # small enough to train on a CPU
}


class Node(NamedTuple):
    """side: ONE, OTHER or SHARED, None for further persons. level: 0 of persons. time: edges go from earlier to later."""

    side: int | None
    level: int
    time: float


def draw_size(rng: np.random.Generator, shape: Shape, training: bool) -> tuple[int, int, int]:
    """Hops, nodes and edges of one graph."""
    if not (training and shape.train_hops):
        return int(rng.choice(shape.hops)), shape.nodes, shape.edges
    hops = int(rng.choice(shape.train_hops))
    least = 2 * (hops + 1)
    nodes = int(rng.integers(least, shape.nodes + 1))
    surplus = shape.edges - (shape.nodes - 2)  # beyond the two trees below the persons
    return hops, nodes, nodes - 2 + round(surplus * (nodes - least) / (shape.nodes - least))


def ood_questions(rng: np.random.Generator, shape: str, training: bool = False) -> tuple[Question, Question]:
    """Two questions over one graph with the same two options: one asks for node 0, the other for node 1.

    Two paths of equal length are planted. Further nodes and edges are drawn such that no edge climbs more than one level,
    which keeps the planted paths shortest, and that nothing leads from one person to the other's option.
    """
    hops, node_count, edge_count = draw_size(rng, SHAPES[shape], training)
    nodes, paths = draw_nodes(rng, hops, node_count)
    ends = [path[-1] for path in paths]
    edges = [(int(a), int(b)) for path in paths for a, b in itertools.pairwise(path)]
    allowed = [(a, b) for a in range(len(nodes)) for b in range(len(nodes)) if a not in ends and may_lead(nodes[a], nodes[b])]
    shuffled = [allowed[i] for i in rng.permutation(len(allowed)) if allowed[i] not in edges]
    edges += connecting(shuffled, edges, len(nodes))
    edges += [edge for edge in shuffled if edge not in edges][: max(0, edge_count - len(edges))]
    one, other = paths
    return Question(edges, one, other[-1]), Question(edges, other, one[-1])


def draw_nodes(rng: np.random.Generator, hops: int, count: int) -> tuple[list[Node], list[list[int]]]:
    """`count` nodes, the persons 0 and 1 first, and the planted paths from them."""
    nodes = [Node(ONE, 0, 0), Node(OTHER, 0, 0)]
    paths = [[ONE], [OTHER]]
    for side in (ONE, OTHER):
        for level in range(1, hops + 1):
            paths[side].append(len(nodes))
            nodes.append(Node(side, level, level))
    nodes += [Node(None, 0, 0)] * min(OTHERS, count - len(nodes))
    while len(nodes) < count:
        time = float(rng.uniform(0, hops + 1))
        nodes.append(Node(int(rng.choice([ONE, OTHER, SHARED], p=[0.4, 0.4, 0.2])), int(np.ceil(min(time, hops))), time))
    return nodes, paths


def may_lead(parent: Node, child: Node) -> bool:
    """Whether an edge keeps the graph acyclic, the planted paths shortest, and each option out of the other's reach."""
    sides = parent.side is None or child.side in (parent.side, SHARED)
    return sides and parent.time < child.time and 0 < child.level <= parent.level + 1


def connecting(candidates: Sequence[Edge], edges: Sequence[Edge], nodes: int) -> list[Edge]:
    """One candidate for each concept without a parent and for each person without a child, where there is one."""
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(nodes))
    found = []
    for parent, child in candidates:
        if graph.in_degree(child) == 0 or (graph.in_degree(parent) == graph.out_degree(parent) == 0):
            graph.add_edge(parent, child)
            found.append((parent, child))
    return found
