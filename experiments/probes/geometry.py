"""Where thoughts lie: their length, how far one is from the next, whether they depend on the question, and how a push grows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.probes.base import Probed, Series
from thoughts import Noise, ThoughtInterventions, gather_thoughts

PUSH = 0.1  # norm of the noise in the first thought, by that of the thought


def geometry(probed: Probed) -> Series:
    """Cosines x 100, of the states that become thoughts; and their norms by that of the first one, x 100."""
    every = torch.cat([states.float().cpu() for _, states in probed.states()])  # (Q, N, D)
    found: dict[str, Tensor] = {}
    directions = F.normalize(every, dim=-1)
    others = (directions.sum(dim=0) - directions) / (len(every) - 1)  # (Q, N, D): mean direction of the other questions
    norms, alike = every.norm(dim=-1), (directions * others).sum(dim=-1)  # (Q, N)
    for thought in range(probed.thoughts):
        found[f"thought {thought + 1}: norm by that of the first"] = norms[:, thought] / norms[:, 0]
        found[f"thought {thought + 1}: cosine with other questions'"] = alike[:, thought]
        if thought:
            near = (directions[:, thought] * directions[:, thought - 1]).sum(dim=-1)
            found[f"thought {thought + 1}: cosine with the one before"] = near
    if probed.evaluator.ids.thought == probed.evaluator.ids.latent:  # pauses cannot be pushed
        for thought, moved in enumerate(_growth(probed).T, start=1):
            found[f"thought {thought}: moved by a push in the first"] = moved
    return {name: 100 * values.numpy().astype(float) for name, values in found.items()}


def _growth(probed: Probed) -> Tensor:
    """(Q, N): how far a push in the first thought moves each thought, by its own norm and by the size of the push.

    1 where a push keeps its size, 0 where later thoughts do not feel it.
    """
    moved = []
    for places, batch, thought in probed.batches():
        push = ThoughtInterventions.of_noise(Noise(PUSH, "gaussian_scaled"), thought, 0, places)
        clean, pushed = (gather_thoughts(probed.think(batch, change).inputs_embeds, thought).float() for change in (None, push))
        moved.append(((pushed - clean).norm(dim=-1) / clean.norm(dim=-1) / PUSH).cpu())
    return torch.cat(moved)
