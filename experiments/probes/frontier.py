"""Do thoughts hold a frontier (arXiv 2505.12514)? Probability of the concepts of the question's graph by their distance."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np

from dataset import load_records
from experiments.probes.base import Probed, Series, empty
from utils import UserError

FARTHEST = 4


def frontier(probed: Probed) -> Series:
    """For each thought the mean probability of a concept, by its distance from the person asked about, in percent.

    Read from the language-model head. A concept is every token that holds its name. Beside those that can be reached:
    those of the same graph that cannot.
    """
    records = _records(probed)
    names = [_distances(record) for record in records]
    vocabulary = _words(probed)
    kinds = sorted({kind for own in names for kind in own.values()})
    found = {f"thought {n + 1}, {kind}": empty(len(records)) for n in range(probed.thoughts) for kind in kinds}
    for places, states in probed.states():
        chances = probed.model.project(states).float().softmax(dim=-1).cpu().numpy()  # (B, N, V)
        for place, own in zip(places, chances, strict=True):
            for kind in set(names[place].values()):
                tokens = [vocabulary.get(name, []) for name, other in names[place].items() if other == kind]
                for thought in range(len(own)):
                    each = [own[thought, ids].sum() for ids in tokens]
                    found[f"thought {thought + 1}, {kind}"][place] = 100 * float(np.mean(each))
    return found


def _records(probed: Probed) -> list[dict[str, Any]]:
    records = load_records(probed.data)[: len(probed.dataset)]
    if not all({"edges", "root", "idx_to_symbol"} <= record.keys() for record in records):
        raise UserError(f"{probed.data}: its records hold no graph (edges, root, idx_to_symbol)")
    return records


def _distances(record: dict[str, Any]) -> dict[str, str]:
    """The kind of each concept by its name."""
    graph = nx.DiGraph([tuple(edge) for edge in record["edges"]])
    reached = nx.single_source_shortest_path_length(graph, record["root"])
    kinds = {}
    for node in graph:
        if graph.in_degree(node):
            distance = reached.get(node)
            kinds[record["idx_to_symbol"][node]] = "unreachable" if distance is None else f"distance {min(distance, FARTHEST)}"
    return kinds


def _words(probed: Probed) -> dict[str, list[int]]:
    """The tokens in which each word stands."""
    tokenizer = probed.evaluator.tokenizer
    found: dict[str, list[int]] = {}
    for token in range(len(tokenizer)):
        for word in str(tokenizer.decode([token])).replace(".", " ").replace("?", " ").split():
            found.setdefault(word, []).append(token)
    return found
