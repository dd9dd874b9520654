"""Training methods: one row of METHODS says everything that sets a method apart.

A row says which special tokens it needs, which stage each epoch belongs to, what a question looks like at a stage, and how the
loss is computed. Everything else reads the row: configuration, data, training, evaluation, tables, docs/METHODS.md. A new
method is a new row: docs/EXTENDING.md has an example.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

if TYPE_CHECKING:
    from coconut import Coconut

START_LATENT, END_LATENT, LATENT, PAUSE = "<|start-latent|>", "<|end-latent|>", "<|latent|>", "<pause>"
MARKERS = (START_LATENT, END_LATENT, LATENT)
MOST_THOUGHTS = 10_000  # what only a slip of the finger exceeds
ALL_TOKENS = 1_000_000  # the stage of icot in which no token of the steps is left
EvalLatents = Literal["gold", "max"] | Annotated[int, Field(ge=1, le=MOST_THOUGHTS)]  # see `stage_shape`


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


def nothing_for_steps(curriculum: Curriculum, stage: int, steps: int, latents: EvalLatents) -> StageShape:
    """The first steps are gone, and nothing stands in their place."""
    return StageShape(0, stage if stage <= curriculum.max_latent_stage else steps)


# --- the loss ---


class Loss(NamedTuple):
    """What is minimised, a scalar, and the parts of it that are worth telling, by name."""

    total: Tensor
    parts: dict[str, Tensor]


class Totals(NamedTuple):
    """Of the whole optimizer step, divided by the number of processes, whose gradients are averaged.

    labels: labelled tokens of each sequence of the examples, by its name. examples: examples.
    """

    labels: dict[str, float]
    examples: float


Batch = Mapping[str, Tensor]
LossFunction = Callable[["Coconut", Batch, Totals], Loss]
ANSWER_AT = "answer_at"  # (B,) the column of the answer's first token, where a method has several sequences
MAIN = "main"  # the sequence that every method has: the prompt and what is written after it


def cross_entropy(model: Coconut, batch: Batch, totals: Totals) -> Loss:
    """The mean cross entropy over the labelled tokens of the step (paper, section 3)."""
    return Loss(sequence_loss(model, batch, totals, MAIN), {})


def sequence_loss(model: Coconut, batch: Batch, totals: Totals, name: str) -> Tensor:
    """The cross entropy of one sequence of the examples: its sum over this batch by the labels of the whole step."""
    inputs = sequence(batch, name)
    return model(**inputs, labelled_only=True, num_items_in_batch=totals.labels[name]).loss


def sequence(batch: Batch, name: str = MAIN) -> dict[str, Tensor]:
    """The tensors (B, T) of one sequence: input_ids, attention_mask, position_ids, labels."""
    prefix = sequence_key(name, "")
    keys = ("input_ids", "attention_mask", "position_ids", "labels")
    return {key: batch[prefix + key] for key in keys}


def before_answer(states: Tensor, batch: Batch, name: str = MAIN) -> Tensor:
    """Of the states (B, T, D) of a sequence those of the token that predicts the answer's first one: (B, D)."""
    at = batch[sequence_key(name, ANSWER_AT)] - 1
    return states[torch.arange(len(states), device=states.device), at]


def sequence_key(name: str, key: str) -> str:
    """How a tensor of a sequence is named in a batch: "input_ids", "teacher/input_ids"."""
    return key if name == MAIN else f"{name}/{key}"


def sequence_name(key: str) -> str:
    """The sequence that a tensor of a batch belongs to."""
    return key.rpartition("/")[0] or MAIN


class Objective(nn.Module):
    """A model with its method's loss: what is trained, and what DDP wraps, so that all of the loss is one forward."""

    def __init__(self, model: Coconut, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch, totals: Totals) -> Loss:
        return self.loss(self.model, batch, totals)


# --- the table ---


class Parts(NamedTuple):
    """The tokens of an example: the prompt with its thoughts, the steps still written, all steps, and the answer."""

    question: list[int]
    prompt: list[int]
    remaining: list[int]
    steps: list[int]
    answer: list[int]


class TokenSequence(NamedTuple):
    """Tokens without and with loss."""

    prompt: list[int]
    target: list[int]


Sequences = Callable[[Parts], dict[str, TokenSequence]]


@dataclass(frozen=True)
class Method:
    """A way to train.

    label: in figures and tables. about: a paragraph for docs/METHODS.md. markers: special tokens that it adds.
    schedule: which stage an epoch belongs to. shape: what a question looks like at a stage. loss: what is minimised.
    sequences: further sequences of an example that go through the model beside the main one, say a teacher's.
    """

    label: str
    about: str
    shape: Shape
    schedule: OneStage = ALWAYS_THE_SAME
    markers: tuple[str, ...] = ()
    loss: LossFunction = cross_entropy
    sequences: Sequences | None = None

    @property
    def has_stages(self) -> bool:
        """Whether steps are removed stage by stage."""
        return isinstance(self.schedule, Stages)

    @property
    def feeds_back(self) -> bool:
        """Whether hidden states are fed back as thoughts."""
        return LATENT in self.markers

    @property
    def brackets(self) -> bool:
        """Whether the thoughts stand between `<|start-latent|>` and `<|end-latent|>`."""
        return START_LATENT in self.markers


METHODS: dict[str, Method] = {
    "coconut": Method(
        label="Coconut",
        about="""
Chain of continuous thought (arXiv 2412.06769, section 3). Stage *s* replaces the first *s* steps by *s* × `c_thought` latents.
A latent's input embedding is the last hidden state at the position before it. Past `max_latent_stage` all steps are gone.""",
        shape=latents_for_steps,
        schedule=Stages(),
        markers=MARKERS,
    ),
    "cot": Method(
        label="CoT",
        about="""
Chain of thought in words: question, steps, answer.""",
        shape=lambda curriculum, stage, steps, latents: StageShape(0, 0),
    ),
    "no_thoughts": Method(
        label="without thought",
        about="""
The paper's *without thought*: the steps go as in `coconut`, and nothing stands in their place.""",
        shape=nothing_for_steps,
        schedule=Stages(),
    ),
    "no_cot": Method(
        label="no-CoT",
        about="""
Question and answer alone.""",
        shape=lambda curriculum, stage, steps, latents: StageShape(0, steps),
    ),
    "no_curriculum": Method(
        label="without curriculum",
        about="""
The paper's *without curriculum*: Coconut's last stage from the first epoch on.""",
        shape=latents_for_all_steps,
        schedule=OneStage(last=True),
        markers=MARKERS,
    ),
    "pause": Method(
        label="pause token",
        about="""
Pause tokens (arXiv 2310.02226): as many learned `<pause>` tokens as Coconut has latents in its last stage stand between
question and answer; no steps, no stages. All positions are one pass.""",
        shape=latents_for_all_steps,
        schedule=OneStage(last=True),
        markers=(PAUSE,),
    ),
    "pause_as_thought": Method(
        label="pause as thought",
        about="""
The paper's *pause as thought*: Coconut's stages, with a learned `<pause>` token in the place of each thought. All positions
are one pass.""",
        shape=latents_for_steps,
        schedule=Stages(),
        markers=(START_LATENT, END_LATENT, PAUSE),
    ),
    "icot": Method(
        label="iCoT",
        about="""
Stepwise internalisation (arXiv 2405.14838): tokens of the steps are removed from the left, `icot_tokens_per_epoch` in each
epoch, one by one. The stage is the number of removed tokens. With `icot_smoothing` λ a sample sometimes loses *o* tokens
more, with probability proportional to exp(-λ*o*) (not shown below). Once more than `icot_remove_all_beyond` are gone, all
go. The first `icot_start_epoch` epochs write everything. With `reset_optimizer: True` each removal begins with a fresh
optimizer.""",
        shape=lambda curriculum, stage, steps, latents: StageShape(0, 0, tokens_removed=stage),
        schedule=TokenRemoval(),
    ),
}


def scheduled_stage(curriculum: Curriculum, epoch: int) -> int:
    """The stage at the end of an epoch (paper, section 3), at which it is evaluated."""
    return METHODS[curriculum.method].schedule.at_end(curriculum, epoch)


def stage_at(curriculum: Curriculum, epoch: int, step: int, steps: int) -> int:
    """The stage of one of the epoch's optimizer steps; only icot goes on to the next one inside an epoch."""
    return METHODS[curriculum.method].schedule.at(curriculum, epoch, step, steps)


def first_epoch(curriculum: Curriculum, stage: int) -> int:
    """The epoch with which a stage begins."""
    each = curriculum.epochs_per_stage if isinstance(curriculum.epochs_per_stage, list) else [curriculum.epochs_per_stage]
    return sum(each[:stage]) + each[-1] * max(0, stage - len(each))


def last_stage_share(curriculum: Curriculum, epochs: float, num_epochs: int) -> float:
    """The share (0 to 1) of the last stage of a training of num_epochs that is done after so many epochs."""
    last = scheduled_stage(curriculum, num_epochs - 1)
    begin = bisect.bisect_left(range(num_epochs), last, key=lambda epoch: scheduled_stage(curriculum, epoch))
    return max(0.0, (epochs - begin) / (num_epochs - begin))


def stage_shape(curriculum: Curriculum, stage: int, number_of_steps: int, latents: EvalLatents = "gold") -> StageShape:
    """How a question with so many steps looks at a stage, in training and evaluation alike.

    latents: "gold" as in training, where pad_latent_to_max: False takes the number of thoughts from the question's own steps;
    "max" as many for every question as the stage allows; a number: so many latent tokens for every question.
    """
    return METHODS[curriculum.method].shape(curriculum, stage, number_of_steps, latents)


def remaining_steps(shape: StageShape, steps: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of the steps that are still written."""
    return [token for step in steps[shape.steps_removed :] for token in step][shape.tokens_removed :]


def example_sequences(method: Method, parts: Parts) -> dict[str, TokenSequence]:
    """All sequences of an example by name, the main one first."""
    further = {} if method.sequences is None else method.sequences(parts)
    return {MAIN: TokenSequence(parts.prompt, parts.remaining + parts.answer), **further}
