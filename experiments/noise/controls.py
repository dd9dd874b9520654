"""Controls: what is put in the place of a model's thoughts, to see whether they carry the answer.

A control is a row of CONTROLS. Places: all: every thought is displaced. first: the first one is, and later ones are computed
from it. after: the first one is, once all were computed; later ones stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils import UserError

PLACES = {  # as figures call them
    "all": "all thoughts",
    "first": "the first, later ones\nrecomputed from it",
    "after": "the first, later ones\nleft as they were",
}


@dataclass
class Thoughts:
    """The clean thoughts of all questions.

    paths: the thoughts (N, D) of each question, float32, on the CPU, by its index. pause: (D,), the embedding of `<|latent|>`.
    mean: (N, D), over the questions, thought by thought.
    """

    paths: dict[int, Tensor]
    pause: Tensor
    seed: int
    mean: Tensor = field(init=False)

    def __post_init__(self) -> None:
        longest = max(len(path) for path in self.paths.values())
        columns = [torch.stack([path[step] for path in self.paths.values() if len(path) > step]) for step in range(longest)]
        self.mean = torch.stack([column.mean(dim=0) for column in columns])

    def replacements(self, index: int, control: str, place: str) -> dict[int, Tensor]:
        """Thoughts (D,) by the number of the pass that they displace."""
        own, stead = self.paths[index], CONTROLS[control].stead(self, index)
        displaced = {"all": [*stead[: len(own)]], "first": [stead[0]], "after": [stead[0], *own[1:]]}
        return dict(enumerate(displaced[place], start=1))

    def other(self, index: int) -> int:
        """Another question, drawn from those with as many thoughts, or with more where there are none."""
        count = len(self.paths[index])
        others = [one for one in sorted(self.paths) if one != index]
        alike = [one for one in others if len(self.paths[one]) == count] or [
            one for one in others if len(self.paths[one]) > count
        ]
        if not alike:
            raise UserError(f"control 'other': no other question has {count} thoughts, as question {index} has")
        return alike[int(np.random.default_rng((self.seed, index)).integers(len(alike)))]


@dataclass(frozen=True)
class Control:
    """about: what is put in the thoughts' place, in a few words. stead: of a question's index, thoughts (at least N, D)."""

    about: str
    stead: Callable[[Thoughts, int], Tensor]


CONTROLS: dict[str, Control] = {
    "zero": Control("zeros", lambda thoughts, index: torch.zeros_like(thoughts.paths[index])),
    "mean": Control("the mean thought over questions", lambda thoughts, index: thoughts.mean[: len(thoughts.paths[index])]),
    "other": Control("another question's thoughts", lambda thoughts, index: thoughts.paths[thoughts.other(index)]),
    "pause": Control("the embedding of <|latent|>", lambda thoughts, index: thoughts.pause.expand_as(thoughts.paths[index])),
}
