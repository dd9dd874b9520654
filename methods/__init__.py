"""Training methods: one row of METHODS says everything that sets a method apart.

A row says which special tokens it needs, which stage each epoch belongs to, what a question looks like at a stage, and how the
loss is computed. Everything else reads the row: configuration, data, training, evaluation, tables, docs/METHODS.md. A new
method is a new row: docs/EXTENDING.md has an example.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from methods.cache_distillation import CodiKvOptions, codi_kv_loss
from methods.curriculum import (
    ALL_TOKENS,
    ALWAYS_THE_SAME,
    MOST_THOUGHTS,
    Curriculum,
    EvalLatents,
    OneStage,
    Shape,
    Stages,
    StageShape,
    TokenRemoval,
    first_epoch,
    latents_for_all_steps,
    latents_for_steps,
)
from methods.distillation import CodiOptions, codi_loss, teacher_sequence
from methods.losses import (
    ANSWER_AT,
    MAIN,
    Batch,
    Loss,
    LossFunction,
    Objective,
    Parts,
    Sequences,
    TokenSequence,
    Totals,
    before_answer,
    cross_entropy,
    sequence,
    sequence_key,
    sequence_name,
)
from methods.step_supervision import (
    CodiSimcotOptions,
    SimcotOptions,
    StepDecoder,
    coconut_steps,
    codi_simcot_loss,
    codi_steps,
    simcot_loss,
)

START_LATENT, END_LATENT, LATENT, PAUSE = "<|start-latent|>", "<|end-latent|>", "<|latent|>", "<pause>"
MARKERS = (START_LATENT, END_LATENT, LATENT)


@dataclass(frozen=True)
class Method:
    """A way to train.

    label: in figures and tables. about: a paragraph for docs/METHODS.md. markers: special tokens that it adds.
    schedule: which stage an epoch belongs to. shape: what a question looks like at a stage. loss: what is minimised.
    sequences: further sequences of an example that go through the model beside the main one, say a teacher's.
    options: a dataclass of the configuration's keys that the loss is given. step_vectors: how many vectors stand for one
    step, where `Coconut.step_decoder`, a second model, is trained along to write steps from thoughts; else None.
    reads_attention: whether the loss reads attention probabilities, which only the eager implementation returns.
    equal_latents: whether the loss needs as many latents in every question: it reads states of the last pass alone.
    """

    label: str
    about: str
    shape: Shape
    schedule: OneStage = ALWAYS_THE_SAME
    markers: tuple[str, ...] = ()
    loss: LossFunction = cross_entropy
    sequences: Sequences | None = None
    options: type | None = None
    step_vectors: Callable[[Curriculum], int] | None = None
    reads_attention: bool = False
    equal_latents: bool = False

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
        shape=lambda curriculum, stage, steps, latents: latents_for_steps(curriculum, stage, steps, 0),
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
    "codi": Method(
        label="CODI",
        about="""
Self-distillation (arXiv 2502.21074): no stages; `c_thought` × `max_latent_stage` latents from the first epoch. The same model
also takes the question with its steps but the last one: the teacher. The loss is the cross entropy of both
(`codi_teacher_weight`) and the distance of the student's states from the teacher's, in all layers, at the token that predicts
the answer's first one (`codi_distillation_weight`). Published with `thought_map: projection`.""",
        shape=latents_for_all_steps,
        schedule=OneStage(last=True),
        markers=MARKERS,
        loss=codi_loss,
        sequences=teacher_sequence,
        options=CodiOptions,
        equal_latents=True,
    ),
    "simcot": Method(
        label="SIM-CoT",
        about="""
Coconut whose thoughts are told what they stand for (arXiv 2509.20317): a second model, a copy of the one that training starts
from, must write step *k* from the `c_thought` vectors of thought *k* alone. Its cross entropy is added (`simcot_weight`). The
last thought writes all steps that are left over; thoughts without a step write the answer. Checkpoints hold the second model
for resuming, exported models do not.""",
        shape=latents_for_steps,
        schedule=Stages(),
        markers=MARKERS,
        loss=simcot_loss,
        sequences=coconut_steps,
        options=SimcotOptions,
        step_vectors=lambda curriculum: curriculum.c_thought,
    ),
    "codi_simcot": Method(
        label="CODI + SIM-CoT",
        about="""
CODI, and the second model of `simcot`: it must write step *k* from latent *k*; the state after the last one counts as one
more. Latents without a step write nothing.""",
        shape=latents_for_all_steps,
        schedule=OneStage(last=True),
        markers=MARKERS,
        loss=codi_simcot_loss,
        sequences=codi_steps,
        options=CodiSimcotOptions,
        step_vectors=lambda curriculum: 1,
        equal_latents=True,
    ),
    "codi_kv": Method(
        label="KaVa",
        about="""
CODI, and the keys and values at the latents are drawn to the teacher's at its written steps (KaVa, arXiv 2510.02312). Of
these, as many as there are latents are kept in each layer and head: those that the answer attends to and that are unlike one
another (`codi_kv_importance`). The distance is added to the loss (`codi_kv_weight`, `codi_kv_power`). Keys are compared as
the cache holds them, rotated where a model rotates them. Published with `latent_mode: jacobi`.""",
        shape=latents_for_all_steps,
        schedule=OneStage(last=True),
        markers=MARKERS,
        loss=codi_kv_loss,
        sequences=teacher_sequence,
        options=CodiKvOptions,
        reads_attention=True,
        equal_latents=True,
    ),
}


def scheduled_stage(curriculum: Curriculum, epoch: int) -> int:
    """The stage at the end of an epoch (paper, section 3), at which it is evaluated."""
    return METHODS[curriculum.method].schedule.at_end(curriculum, epoch)


def stage_at(curriculum: Curriculum, epoch: int, step: int, steps: int) -> int:
    """The stage of one of the epoch's optimizer steps; only icot goes on to the next one inside an epoch."""
    return METHODS[curriculum.method].schedule.at(curriculum, epoch, step, steps)


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
