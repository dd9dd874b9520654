"""Random acyclic graphs and what is asked about them (Coconut, arXiv 2412.06769, appendix on the construction of ProsQA).

Nodes are numbers; how they are named and written is the business of the modules that make records.
"""

import functools
import operator
from collections.abc import Collection, Sequence
from typing import NamedTuple

import networkx as nx
import numpy as np

Edge = tuple[int, int]

MEAN_PARENTS = 1.5  # of the Poisson draw
POOL_SHARE = 0.35  # probability of each of the two one-sided pools of parents
HOP_COUNTS = {3: 202, 4: 217, 5: 69, 6: 12}  # shortest paths asked for, in the published test set; there are no others
# One grown graph in 500 has two answers of 5 hops, one in about 14,000 two of 6: nearly all the time would go to those.
MATCHED_HOPS = (3, 4, 5)
# The appendix does not give the number of nodes. 28, less those that end up without any edge, gives 23.1 +- 2.0 nodes;
# published: 22.8 +- 2.0, at most 28.
DRAWN_NODES = 28


class Question(NamedTuple):
    """Is path[0] a path[-1] or a neg_target? `path` is a shortest path along `edges` (parent, child)."""

    edges: list[Edge]
    path: list[int]
    neg_target: int


def parent_pool(rng: np.random.Generator, labels: Sequence[int]) -> list[int]:
    """Nodes a new node may have as parents; `labels` bit 1: descends from node 0, bit 2: from node 1.

    Probability 0.35: those that descend from node 0 alone; 0.35: from node 1 alone; else all.
    Later parentless nodes (label 0) stand in the third pool only. The appendix's words leave that open; with them in
    every pool the published file's counts are missed (2.6 such nodes per graph instead of 0.5, 1.43 shortest paths).
    """
    side = rng.random()
    if side < 2 * POOL_SHARE:
        wanted = 1 if side < POOL_SHARE else 2
        return [node for node, label in enumerate(labels) if label == wanted]
    return list(range(len(labels)))


def draw_parents(rng: np.random.Generator, labels: Sequence[int], depths: Sequence[int]) -> list[int]:
    """Poisson(1.5) parents out of a pool, without replacement, with weight 1.5 * depth + 1."""
    pool = parent_pool(rng, labels)
    count = min(int(rng.poisson(MEAN_PARENTS)), len(pool))
    if count == 0:
        return []
    weights = np.array([1.5 * depths[node] + 1 for node in pool])
    return sorted(int(node) for node in rng.choice(pool, size=count, replace=False, p=weights / weights.sum()))


def grow_graph(rng: np.random.Generator, nodes: int = DRAWN_NODES) -> list[Edge]:
    """Edges (parent, child) of a random acyclic graph grown from nodes 0 and 1.

    Nodes without any edge are left out and the others numbered anew in the order of their drawing; nodes 0 and 1 stay.
    """
    labels, depths, edges = [1, 2], [0, 0], []
    for node in range(2, nodes):
        parents = draw_parents(rng, labels, depths)
        labels.append(functools.reduce(operator.or_, (labels[parent] for parent in parents), 0))
        depths.append(min((depths[parent] + 1 for parent in parents), default=0))
        edges += [(parent, node) for parent in parents]
    kept = sorted({0, 1}.union(*edges))
    number = {node: index for index, node in enumerate(kept)}
    return [(number[parent], number[child]) for parent, child in edges]


def one_sided_leaves(graph: nx.DiGraph) -> list[dict[int, int]]:
    """For each root (0 and 1): the leaves that descend from it and not from the other root, with their distance to it."""
    distances = [nx.single_source_shortest_path_length(graph, root) for root in (0, 1)]
    leaves = [node for node in graph if graph.out_degree(node) == 0]
    return [
        {leaf: distances[r][leaf] for leaf in leaves if leaf in distances[r] and leaf not in distances[1 - r]} for r in (0, 1)
    ]


def grow_answerable(rng: np.random.Generator) -> tuple[list[Edge], nx.DiGraph, list[dict[int, int]]]:
    """A grown graph that has one-sided leaves of both roots: (edges, graph, the leaves)."""
    while True:
        edges = grow_graph(rng)
        graph = nx.DiGraph(edges)
        if {0, 1} <= graph.nodes and all(sides := one_sided_leaves(graph)):
            return edges, graph, sides


def find_question(rng: np.random.Generator, hops: Collection[int] = HOP_COUNTS) -> Question:
    """A question over a new graph, as in the published files.

    The answer is a leaf farthest from its root, among both roots' one-sided leaves; the other option is any one-sided
    leaf of the other root. Graphs whose answer is not one of `hops` away are drawn anew.
    """
    while True:
        edges, graph, sides = grow_answerable(rng)
        farthest = [max(side.values()) for side in sides]
        root = int(rng.integers(2)) if farthest[0] == farthest[1] else int(np.argmax(farthest))
        if farthest[root] in hops:
            target = int(rng.choice([leaf for leaf, distance in sides[root].items() if distance == farthest[root]]))
            return Question(edges, nx.shortest_path(graph, root, target), int(rng.choice(list(sides[1 - root]))))


def find_matched_questions(rng: np.random.Generator, hops: Collection[int] = MATCHED_HOPS) -> tuple[Question, Question]:
    """Two questions over one new graph with the same two options: one asks for root 0, the other for root 1.

    Whoever ignores the root gives both the same answer and is right once. Besides, both options are a farthest one-sided
    leaf of their root, equally far from it, and equally far from their farthest ancestor. The distance is drawn from the
    published shares of `hops`; without that few questions would have more than 4 hops.
    """
    shares = np.array([HOP_COUNTS[hop] for hop in hops])
    wanted = int(rng.choice(list(hops), p=shares / shares.sum()))
    while True:
        edges, graph, sides = grow_answerable(rng)
        if any(max(side.values()) != wanted for side in sides):
            continue
        if options := matched_leaves(graph, sides, wanted):
            one, other = options[rng.integers(len(options))]
            paths = [nx.shortest_path(graph, root, target) for root, target in enumerate((one, other))]
            return Question(edges, paths[0], other), Question(edges, paths[1], one)


def matched_leaves(graph: nx.DiGraph, sides: Sequence[dict[int, int]], hops: int) -> list[tuple[int, int]]:
    """Pairs of leaves so many hops below root 0 and root 1 that are equally far from their farthest ancestors."""
    ends = [[leaf for leaf, distance in side.items() if distance == hops] for side in sides]
    depth = {leaf: farthest_ancestor(graph, leaf) for leaf in ends[0] + ends[1]}
    return [(one, other) for one in ends[0] for other in ends[1] if depth[one] == depth[other]]


def farthest_ancestor(graph: nx.DiGraph, node: int) -> int:
    """Distance (in edges, along shortest paths) from `node` up to its farthest ancestor."""
    return max(nx.single_source_shortest_path_length(graph.reverse(copy=False), node).values())
