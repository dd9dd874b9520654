"""Do thoughts hold which concepts can be reached within so many steps? Linear probes, beside probes on shuffled labels."""

from __future__ import annotations

import networkx as nx
import numpy as np

from experiments.probes.base import GRAPH, Probed, Series, empty, graph_of

HOPS = 3


def reachable(probed: Probed) -> Series:
    """For each thought, layer and number of hops how well a linear probe tells the concepts apart, in percent.

    Of each question it is the share of pairs of a concept that can be reached and one that cannot in which the former scores
    higher (area under the ROC curve); chance is 50. Ridge regression on the state, one output for each concept, fitted on one
    half of the questions and tried on the other, and the other way round. Shuffled: the same where the labels of the
    questions it is fitted on are those of others (selectivity, Hewitt and Liang 2019).
    """
    graphs = [graph_of(record) for record in probed.records(*GRAPH)]
    concepts = sorted({child for graph, _ in graphs for _, child in graph.edges})
    labels = np.stack([[_labels(*one, concepts, hops) for one in graphs] for hops in range(1, HOPS + 1)])  # (H, Q, C)
    every = np.concatenate([states.float().cpu().numpy() for _, states in probed.layers()]).astype(float)  # (Q, L + 1, N, D)
    order = np.random.default_rng(0).permutation(len(graphs))
    found: Series = {}
    for thought in range(every.shape[2]):
        for layer in range(1, every.shape[1]):
            states = every[:, layer, thought]
            for hops in range(HOPS):
                name = f"thought {thought + 1}, layer {layer}, within {hops + 1}"
                found[name] = _cross_fitted(states, labels[hops], labels[hops])
                found[f"{name}, shuffled"] = _cross_fitted(states, labels[hops][order], labels[hops])
    return found


def _cross_fitted(states: np.ndarray, fitted_on: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(Q,) areas. states: (Q, D). fitted_on, asked: (Q, C), 1 and -1, NaN for concepts that a question does not have."""
    found = empty(len(states))
    for half in (True, False):
        here = (np.arange(len(states)) < len(states) // 2) == half
        there = ~here
        mean, spread = states[there].mean(axis=0), states[there].std(axis=0) + 1e-9
        scaled = (states - mean) / spread
        for place, scores in zip(np.flatnonzero(here), _ridge(scaled[there], fitted_on[there], scaled[here]), strict=True):
            found[place] = _area(scores, asked[place])
    return found


def _ridge(states: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(Q', C): for each concept a ridge regression over the questions that have it, and what it says of other states."""
    said = np.zeros((len(others), labels.shape[1]))
    for concept in range(labels.shape[1]):
        known = ~np.isnan(labels[:, concept])
        if not known.any():
            continue
        here, values = states[known], labels[known, concept]
        penalty = len(here) / 10  # a tenth of an entry's variance
        if len(here) < states.shape[1]:  # the same weights from a smaller system
            weights = here.T @ np.linalg.solve(here @ here.T + penalty * np.eye(len(here)), values - values.mean())
        else:
            weights = np.linalg.solve(here.T @ here + penalty * np.eye(states.shape[1]), here.T @ (values - values.mean()))
        said[:, concept] = others @ weights + values.mean()
    return said


def _area(scores: np.ndarray, labels: np.ndarray) -> float:
    """In percent; NaN where a question has concepts of one kind only."""
    right, wrong = scores[labels > 0], scores[labels < 0]
    if not (len(right) and len(wrong)):
        return float("nan")
    difference = right[:, None] - wrong
    return float(100 * ((difference > 0) + 0.5 * (difference == 0)).mean())


def _labels(graph: nx.DiGraph, root: str, concepts: list[str], hops: int) -> list[float]:
    near, own = nx.single_source_shortest_path_length(graph, root, cutoff=hops), {child for _, child in graph.edges}
    return [float("nan") if name not in own else 1.0 if name in near else -1.0 for name in concepts]
