"""Where thoughts lie: their length, how far one is from the next, and whether they depend on the question."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from experiments.probes.base import Probed, Series


def geometry(probed: Probed) -> Series:
    """Cosines x 100, of the states that become thoughts; and their norms by that of the first one, x 100."""
    every = torch.cat([states.float().cpu() for _, states in probed.states()])  # (Q, N, D)
    found: Series = {}
    directions = F.normalize(every, dim=-1)
    others = (directions.sum(dim=0) - directions) / (len(every) - 1)  # (Q, N, D): mean direction of the other questions
    for thought in range(probed.thoughts):
        norms = every[:, thought].norm(dim=-1) / every[:, 0].norm(dim=-1)
        found[f"thought {thought + 1}: norm by that of the first"] = 100 * norms.numpy().astype(float)
        alike = (directions[:, thought] * others[:, thought]).sum(dim=-1)
        found[f"thought {thought + 1}: cosine with other questions'"] = 100 * alike.numpy().astype(float)
        if thought:
            near = (directions[:, thought] * directions[:, thought - 1]).sum(dim=-1)
            found[f"thought {thought + 1}: cosine with the one before"] = 100 * near.numpy().astype(float)
    return found
