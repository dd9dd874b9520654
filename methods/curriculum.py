"""Which stage an epoch belongs to, and what a question looks like at a stage."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

MOST_THOUGHTS = 10_000  # what only a slip of the finger exceeds
ALL_TOKENS = 1_000_000  # the stage of icot in which no token of the steps is left
EvalLatents = Literal["gold", "max"] | Annotated[int, Field(ge=0, le=MOST_THOUGHTS)]  # see `stage_shape`


@dataclass(frozen=True)
class Curriculum:
    """The part of a configuration that decides what a question looks like in an epoch; `RunConfig` explains the keys."""

    method: str
    c_thought: int
    max_latent_stage: int
    pad_latent_to_max: bool
    epochs_per_stage: int | list[int]
    uniform_prob: float
    earlier_stage_prob: float
    icot_tokens_per_epoch: float
    icot_smoothing: float | None
    icot_start_epoch: int
    icot_remove_all_beyond: int | None
    seed: int


class StageShape(NamedTuple):
    """How a question looks: thoughts (tokens in their place), leading steps removed, then leading tokens of the others."""

    thoughts: int
    steps_removed: int
    tokens_removed: int = 0

    def remaining(self, steps: Sequence[Sequence[int]]) -> list[int]:
        """The tokens of the steps that are still written."""
        return [token for step in steps[self.steps_removed :] for token in step][self.tokens_removed :]


# --- which stage an epoch belongs to ---


class OneStage:
    """The same stage in every epoch: stage 0, or the one in which all steps are latent."""

    def __init__(self, last: bool = False) -> None:
        self.is_last = last

    def last(self, curriculum: Curriculum) -> int:
        """The highest stage."""
        return curriculum.max_latent_stage + 1 if self.is_last else 0

    def at_end(self, curriculum: Curriculum, epoch: int) -> int:
        """The stage at the end of an epoch, at which it is evaluated."""
        return self.last(curriculum)

    def at(self, curriculum: Curriculum, epoch: int, step: int, steps: int) -> int:
        """The stage of one of the epoch's optimizer steps."""
        return self.at_end(curriculum, epoch)

    def sample(self, curriculum: Curriculum, stage: int, epoch: int, idx: int, number_of_steps: int) -> int:
        """The stage of one example. What is drawn depends on (seed, epoch, idx) alone, not on workers or processes."""
        return stage


class Stages(OneStage):
    """Stage by stage (paper, section 3). Past max_latent_stage all steps are gone, and that is one last stage."""

    def last(self, curriculum: Curriculum) -> int:
        return curriculum.max_latent_stage + 1

    def at_end(self, curriculum: Curriculum, epoch: int) -> int:
        stages = range(1, self.last(curriculum) + 1)
        return bisect.bisect_right(stages, epoch, key=lambda stage: first_epoch(curriculum, stage))

    def sample(self, curriculum: Curriculum, stage: int, epoch: int, idx: int, number_of_steps: int) -> int:
        """uniform_prob draws from all stages that the question's steps allow, earlier_stage_prob from those up to this one."""
        probability = curriculum.uniform_prob or curriculum.earlier_stage_prob
        if probability == 0:
            return stage
        generator = np.random.default_rng((curriculum.seed, epoch, idx))
        if generator.random() >= probability:
            return stage
        last = number_of_steps if curriculum.uniform_prob else min(stage, number_of_steps)
        return int(generator.integers(last + 1))


class TokenRemoval(OneStage):
    """Stepwise internalisation (arXiv 2405.14838): the stage is the number of removed tokens, s(t) = floor(delta t / T)."""

    def last(self, curriculum: Curriculum) -> int:
        return ALL_TOKENS

    def at_end(self, curriculum: Curriculum, epoch: int) -> int:
        return self._all_beyond(curriculum, max(0, math.ceil(self._tokens(curriculum, epoch + 1)) - 1))

    def at(self, curriculum: Curriculum, epoch: int, step: int, steps: int) -> int:
        return self._all_beyond(curriculum, math.floor(self._tokens(curriculum, epoch + step / steps)))

    def sample(self, curriculum: Curriculum, stage: int, epoch: int, idx: int, number_of_steps: int) -> int:
        """Sometimes o tokens more, with probability proportional to exp(-icot_smoothing * o): removal smoothing."""
        if curriculum.icot_smoothing is None or epoch < curriculum.icot_start_epoch:
            return stage
        generator = np.random.default_rng((curriculum.seed, epoch, idx))
        return stage + int(generator.geometric(-math.expm1(-curriculum.icot_smoothing))) - 1

    @staticmethod
    def _tokens(curriculum: Curriculum, epochs: float) -> float:
        return max(0.0, curriculum.icot_tokens_per_epoch * (epochs - curriculum.icot_start_epoch))

    @staticmethod
    def _all_beyond(curriculum: Curriculum, removed: int) -> int:
        beyond = curriculum.icot_remove_all_beyond
        return ALL_TOKENS if beyond is not None and removed > beyond else removed


ALWAYS_THE_SAME = OneStage()

# --- what a question looks like ---

Shape = Callable[[Curriculum, int, int, EvalLatents], StageShape]  # of a stage, a number of steps, and "latents"


def latents_for_steps(curriculum: Curriculum, stage: int, steps: int, latents: EvalLatents) -> StageShape:
    """The first steps are gone, and c_thought thoughts stand for each of them."""
    removed = stage if stage <= curriculum.max_latent_stage else steps
    if isinstance(latents, int):
        return StageShape(latents, removed)
    replaced = min(stage, curriculum.max_latent_stage)
    if latents == "gold" and not curriculum.pad_latent_to_max:
        replaced = min(replaced, steps)
    return StageShape(replaced * curriculum.c_thought, removed)


def latents_for_all_steps(curriculum: Curriculum, stage: int, steps: int, latents: EvalLatents) -> StageShape:
    """As in Coconut's last stage."""
    return latents_for_steps(curriculum, curriculum.max_latent_stage + 1, steps, latents)


def first_epoch(curriculum: Curriculum, stage: int) -> int:
    """The epoch with which a stage begins."""
    each = curriculum.epochs_per_stage if isinstance(curriculum.epochs_per_stage, list) else [curriculum.epochs_per_stage]
    return sum(each[:stage]) + each[-1] * max(0, stage - len(each))
