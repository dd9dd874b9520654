"""What is fed back as thoughts: interventions on them (noise, replacement), and how far noisy paths part.

Shapes: B rows of the batch, T positions, D width of the model, K branches, N thoughts of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from noise import (
    DECAY,
    apply_noise_to_hidden_states,
    check_noise,
    check_schedule,
    length,
    noise_generator,
    schedule_factor,
    scheduled_scale,
)


class Intervention(NamedTuple):
    """What is done to the thoughts of one row.

    noise_scale: None is no noise. noise_type, noise_direction: as in `apply_noise_to_hidden_states`.
    first_pass: the pass whose thought is perturbed first. schedule, decay: what later passes get, see `schedule_factor`.
    replacements: thoughts (D,) under the numbers of the passes whose own thoughts they displace; noise comes on top.
    """

    noise_scale: float | None = None
    noise_type: str = "gaussian"
    noise_direction: str | None = None
    first_pass: int = 1
    schedule: str = "none"
    decay: float = DECAY
    replacements: Mapping[int, Tensor] = MappingProxyType({})

    def is_noisy(self, latent_pass: int) -> bool:
        if self.noise_scale is None:
            return False
        return latent_pass == self.first_pass or (latent_pass > self.first_pass and self.schedule != "none")

    def changes(self, latent_pass: int) -> bool:
        return latent_pass in self.replacements or self.is_noisy(latent_pass)

    def check(self) -> None:
        """Raise ValueError if a setting is out of range, naming the valid ones."""
        check_noise(0.0 if self.noise_scale is None else self.noise_scale, self.noise_type, self.noise_direction)
        check_schedule(self.schedule)
        if not self.decay >= 0:
            raise ValueError(f"the decay of the schedule is {self.decay}; it must not be negative")
        if self.first_pass < 1:
            raise ValueError(f"the first noisy pass is {self.first_pass}; passes are counted from 1")


@dataclass
class ThoughtInterventions:
    """What is done to the thoughts in the latent passes of one batch; made anew for each batch, as it records what it did.

    Args:
        latent: (B, T) bool, where the rows hold latents. A row's passes are numbered by its own latents, from 1: pass p
            produces the thought that its p-th latent is given.
        rows: one intervention for each row.
        questions, branches: of each row; with `seed` and the number of the pass they decide the draws.

    Attributes:
        infos: for each row the descriptions of its perturbed thoughts, in order, with the number of the pass as "pass".
    """

    latent: Tensor
    rows: Sequence[Intervention]
    questions: Sequence[int]
    branches: Sequence[int]
    seed: int = 0
    infos: list[list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        for settings in {row[:-1] for row in self.rows}:
            Intervention(*settings).check()
        for name, values in {"interventions": self.rows, "questions": self.questions, "branches": self.branches}.items():
            if len(values) != len(self.latent):
                raise ValueError(f"{len(values)} {name} for {len(self.latent)} rows")
        self._passes = count_passes(self.latent)
        self._norms: list[list[float]] = [[] for _ in self.rows]  # of the thoughts after the first noisy one
        self.infos = [[] for _ in self.rows]

    def first_column(self) -> int:
        """The first column that is fed a changed thought in some row; T if there is none."""
        columns = [
            next((column for column, latent_pass in enumerate(passes) if latent_pass and row.changes(latent_pass)), None)
            for row, passes in zip(self.rows, self._passes, strict=True)
        ]
        return min((column for column in columns if column is not None), default=self.latent.shape[1])

    def apply(self, thoughts: Tensor, column: int) -> Tensor:
        """The thoughts (B, 1, D) that are about to be fed to this column, changed where their rows want it."""
        thoughts = self._replace(thoughts, column)
        alike: dict[tuple[str, str | None], list[int]] = {}  # rows that can be perturbed in one go
        for number, row in enumerate(self.rows):
            if row.is_noisy(self._passes[number][column]):
                alike.setdefault((row.noise_type, row.noise_direction), []).append(number)
        for (noise_type, noise_direction), numbers in alike.items():
            thoughts = self._perturb(thoughts, column, numbers, noise_type, noise_direction)
        return thoughts

    def _replace(self, thoughts: Tensor, column: int) -> Tensor:
        found = {
            number: row.replacements[self._passes[number][column]]
            for number, row in enumerate(self.rows)
            if self._passes[number][column] in row.replacements
        }
        if not found:
            return thoughts
        index = torch.tensor([*found], device=thoughts.device)
        return thoughts.index_copy(0, index, torch.stack([*found.values()])[:, None].to(thoughts))

    def _perturb(
        self, thoughts: Tensor, column: int, numbers: list[int], noise_type: str, noise_direction: str | None
    ) -> Tensor:
        index = torch.tensor(numbers, device=thoughts.device)
        chosen = thoughts[index]
        self._remember_norms(numbers, chosen, column)
        scales = [self._scale(number, self._passes[number][column]) for number in numbers]
        generators = [
            noise_generator(self.seed, self.questions[number], self.branches[number], self._passes[number][column])
            for number in numbers
        ]
        perturbed, info = apply_noise_to_hidden_states(chosen, scales, noise_type, noise_direction, generators)
        self._record(numbers, column, info)
        return thoughts.index_copy(0, index, perturbed)

    def _remember_norms(self, numbers: list[int], thoughts: Tensor, column: int) -> None:
        """Only the adaptive schedule looks at them."""
        if not any(self.rows[number].schedule == "adaptive" for number in numbers):
            return
        for number, norm in zip(numbers, length(thoughts.detach().float()).flatten().tolist(), strict=True):
            if self._passes[number][column] > self.rows[number].first_pass:
                self._norms[number].append(norm)

    def _scale(self, number: int, latent_pass: int) -> float:
        row = self.rows[number]
        scale = float(cast("float", row.noise_scale))
        if latent_pass == row.first_pass:
            return scale
        later_passes = max(self._passes[number]) - row.first_pass
        factor = schedule_factor(row.schedule, latent_pass - row.first_pass - 1, later_passes, self._norms[number], row.decay)
        return scheduled_scale(scale, factor, row.noise_type)

    def _record(self, numbers: list[int], column: int, info: dict[str, Any]) -> None:
        by_row = {key: value.tolist() if isinstance(value, Tensor) else [value] * len(numbers) for key, value in info.items()}
        for place, number in enumerate(numbers):
            values = {key: column_values[place] for key, column_values in by_row.items()}
            self.infos[number].append({"pass": self._passes[number][column], **values})


def count_passes(latent: Tensor) -> list[list[int]]:
    """For each row and column of (B, T) the number of the latent there, from 1; 0 where there is none."""
    return (latent.long().cumsum(dim=1) * latent).tolist()


class PathDiversity(NamedTuple):
    """How far K paths of thoughts are apart; distances are Euclidean, averaged over steps.

    diversity: D_K, the mean distance of two paths after the branch point; 0 for fewer than two paths or no step there.
    all_steps: the same over all steps, the perturbed thought and the shared ones before it included.
    late_half: the same over the later half of the steps after the branch point, the middle one included.
    normalised: D_K divided by the mean norm of the thoughts after the branch point.
    pairwise: the distances of the pairs (0, 1), (0, 2), ... (K-2, K-1) after the branch point, whose mean is D_K.
    """

    diversity: float
    all_steps: float
    late_half: float
    normalised: float
    pairwise: list[float]


def path_diversity(thoughts: Tensor, branch_pass: int) -> PathDiversity:
    """The diversity of K paths of N thoughts, (K, N, D) of any dtype, that part when thought `branch_pass` is perturbed.

    D_K = 2/(K(K-1)) sum over pairs i < j of (1/T) sum over steps t of |h_t^i - h_t^j|, over the T = N - `branch_pass`
    thoughts that the model computed after the perturbed one.
    """
    states = thoughts.float()
    first, second = torch.triu_indices(len(states), len(states), offset=1, device=states.device)
    distances = length(states[first] - states[second]).squeeze(-1)  # (pairs, N)
    after = distances[:, branch_pass:]
    mean_norm = _mean(length(states[:, branch_pass:]))
    diversity = _mean(after)
    return PathDiversity(
        diversity=diversity,
        all_steps=_mean(distances),
        late_half=_mean(after[:, after.shape[1] // 2 :]),
        normalised=diversity / mean_norm if mean_norm > 0 else 0.0,
        pairwise=[_mean(pair) for pair in after],
    )


def _mean(values: Tensor) -> float:
    """0 where there is nothing to average."""
    return values.mean().item() if values.numel() else 0.0


def gather_thoughts(inputs_embeds: Tensor, latent: Tensor) -> Tensor:
    """The embeddings (B, T, D) at the latents (B, T) -> (B, N, D) in their order; zeros after a row's last latent."""
    steps = latent.sum(dim=1, keepdim=True)  # (B, 1)
    order = latent.long().argsort(dim=1, descending=True, stable=True)[:, : int(steps.max())]  # (B, N)
    thoughts = inputs_embeds.gather(1, order[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
    missing = torch.arange(order.shape[1], device=order.device) >= steps  # (B, N)
    return thoughts.masked_fill(missing[..., None], 0)
