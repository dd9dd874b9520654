"""Where thoughts lie: their length, how far one is from the next, whether they depend on the question, and how a push grows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from experiments.probes.base import Probed, Series
from thoughts import Noise, gather_thoughts

PUSH = 0.1  # norm of the noise in the first thought, by that of the thought


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
    return found | _growth(probed)


def _growth(probed: Probed) -> Series:
    """How far a push in the first thought moves each thought, by its own norm and by the size of the push, x 100.

    100 where a push keeps its size, 0 where later thoughts do not feel it. Nothing of pauses, which cannot be pushed.
    """
    ids = probed.evaluator.ids
    if ids.thought != ids.latent:
        return {}
    moved = []
    for places, batch, thought in probed.batches():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        clean, pushed = (
            gather_thoughts(
                probed.model(**inputs, noise=noise, seed=0, question_index=places).inputs_embeds,  # type: ignore[union-attr]
                thought,
            ).float()
            for noise in (None, Noise(PUSH, "gaussian_scaled"))
        )
        moved.append(((pushed - clean).norm(dim=-1) / clean.norm(dim=-1) / PUSH).cpu())
    every = 100 * torch.cat(moved)  # (Q, N)
    return {
        f"thought {number + 1}: moved by a push in the first": every[:, number].numpy().astype(float)
        for number in range(every.shape[1])
    }
