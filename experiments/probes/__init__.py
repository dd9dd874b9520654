"""The probes: one row for each, and a module of its own."""

from __future__ import annotations

from experiments.probes.base import Probe, Probed, Series
from experiments.probes.decoded import decoded
from experiments.probes.forced import forced
from experiments.probes.frontier import frontier
from experiments.probes.geometry import geometry

PROBES: dict[str, Probe] = {
    "forced": Probe(
        "Answers with fewer and more thoughts than it was trained with; where none is needed, they cannot carry the answer.",
        forced,
        needs_thoughts=False,
    ),
    "decoded": Probe("The likeliest token of each thought: is it what a step finds out?", decoded),
    "frontier": Probe("Probability of a concept, read from each thought, by its distance from the person.", frontier),
    "geometry": Probe("Cosines and norms of the states that become thoughts, x 100.", geometry, unit="x 100"),
}

__all__ = ["PROBES", "Probe", "Probed", "Series"]
