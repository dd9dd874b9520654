"""Forced numbers of thoughts: does the answer need them? A model may be trained with thoughts and answer without."""

from __future__ import annotations

import numpy as np

from experiments.probes.base import Probed, Series

BEYOND = 2  # more thoughts than it was trained with


def forced(probed: Probed) -> Series:
    """For each number of thoughts whether the answer is right, and whether steps were written before it; in percent."""
    found: Series = {}
    numbers = range(probed.thoughts + BEYOND + 1) if probed.thoughts else [0]
    for number in numbers:
        answers = probed.evaluator.predict(probed.model, probed.stage, number if probed.thoughts else "gold")
        found[f"{number} thoughts, right"] = np.array([100.0 * one.correct for one in answers])
        found[f"{number} thoughts, wrote steps"] = np.array([100.0 * one.wrote_steps for one in answers])
    return found
