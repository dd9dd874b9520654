"""ProsQA as symbols, for training from scratch (Reasoning by Superposition, arXiv 2505.12514).

A question is its edges, each `source target <e>`, then `<q>` and the two options, then `<r>` and the node asked about:
`n4 n7 <e> n7 n2 <e> ... <q> n2 n9 <r> n4`. A step is the node that is reached, the answer is the last one.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from preprocessing.common import Record
from preprocessing.prosqa_graphs import Edge

# An edge's own token comes after its two nodes: a causal model can then gather the edge there.
EDGE, OPTIONS, ROOT = "<e>", "<q>", "<r>"
NODES = tuple(f"n{number}" for number in range(30))
HOPS = (3, 4)
WALK_EDGES, FEW_EDGES, WALK_STEPS = (2, 22), (2, 6), (1, 2, 3, 4)


def walk_record(rng: np.random.Generator) -> Record:
    """Chains of edges, and the way from the head of one of them to its end; there are no options.

    To follow an edge is learned here; with options from the start a small model is content with guessing between the two. Half
    of the graphs have few edges: with them it is learned in about 600 steps of 64, without them not in 1,000 or more.
    """
    left = int(rng.integers(*(FEW_EDGES if rng.random() < 0.5 else WALK_EDGES), endpoint=True))
    chains: list[range] = []
    used = 0  # nodes
    while left and used + 1 < len(NODES):
        length = min(int(rng.choice(WALK_STEPS)), left, len(NODES) - used - 1)
        chains.append(range(used, used + length + 1))
        used, left = used + length + 1, left - length
    edges = [edge for chain in chains for edge in itertools.pairwise(chain)]
    symbols = [NODES[node] for node in rng.permutation(len(NODES))[:used]]
    path = chains[rng.integers(len(chains))]
    order = [edges[i] for i in rng.permutation(len(edges))]
    return {
        **symbolic_record(symbols, path, order),
        "idx_to_symbol": symbols,
        "edges": [list(edge) for edge in edges],
        "root": path[0],
        "target": path[-1],
    }


def symbolic_record(symbols: list[str], path: Sequence[int], order: Sequence[Edge], options: Sequence[int] = ()) -> Record:
    """The record of a question with this path whose edges and options, if there are any, are written in the order given."""
    written = [f"{symbols[parent]} {symbols[child]} {EDGE}" for parent, child in order]
    asked = [OPTIONS, *(symbols[option] for option in options)] if options else []
    return {
        "question": " ".join([*written, *asked, ROOT, symbols[path[0]]]),
        "answer": symbols[path[-1]],
        "steps": [symbols[node] for node in path[1:]],
    }
