"""The probes: one row for each. Those that read the same things share a module."""

from __future__ import annotations

from experiments.probes.base import Probe, Probed, Series
from experiments.probes.causal import causal, confidence
from experiments.probes.decoded import decoded, layers, lens
from experiments.probes.forced import forced
from experiments.probes.frontier import frontier, graph_after, height, ranks, tree
from experiments.probes.geometry import geometry
from experiments.probes.paths import paths, stacked
from experiments.probes.reachable import reachable
from experiments.probes.spelled import spelled

PROBES: dict[str, Probe] = {
    "forced": Probe(
        "Answers with fewer and more thoughts than it was trained with; where none is needed, they cannot carry the answer.",
        forced,
        needs_thoughts=False,
    ),
    "paths": Probe(
        "What is written after k thoughts: paths through the graph, or bare answers.", paths, needs_thoughts=False, draw=stacked
    ),
    "decoded": Probe("The likeliest token of each thought: is it what a step finds out?", decoded),
    "spelled": Probe("Steps that the second model of SIM-CoT writes from a thought, word for word.", spelled),
    "layers": Probe(
        "The likeliest token of every layer at each thought: is it what one of the steps finds out?", layers, sketch=lens
    ),
    "frontier": Probe("Probability of a concept, read from each thought, by its distance from the person.", frontier),
    "tree": Probe(
        "Probability of a concept right after k thoughts and the end marker, by its distance from the person.",
        tree,
        sketch=graph_after,
    ),
    "ranks": Probe("How thought k shares its probability among the concepts k steps away, where it has a choice.", ranks),
    "height": Probe(
        "Probability of the concepts one step on, among one another, by their steps to an end and whether they lead on.", height
    ),
    "reachable": Probe(
        "Linear probes for the concepts within so many steps: area under the ROC curve, chance 50; shuffled is the control.",
        reachable,
    ),
    "geometry": Probe("Cosines and norms of the states that become thoughts, x 100.", geometry, unit="x 100"),
    "causal": Probe(
        "Log-odds of the right option, and how far they move when other thoughts stand in their place.",
        causal,
        unit="nats",
        needs_thoughts=False,
    ),
    "confidence": Probe(
        "How often the right option is the likelier one, how sure the model is, and its Brier score (25 is undecided).",
        confidence,
        needs_thoughts=False,
    ),
}

__all__ = ["PROBES", "Probe", "Probed", "Series"]
