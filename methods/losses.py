"""What a loss is given and what it returns; the sequences of an example and their tensors in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from methods.curriculum import Curriculum, StageShape

if TYPE_CHECKING:
    from coconut import Coconut


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
LossFunction = Callable[..., Loss]  # (model, batch, totals), and where a method has options these
ANSWER_AT = "answer_at"  # (B,) the column of the first token of the answer's own text, where a method has several sequences
MAIN = "main"  # the sequence that every method has: the prompt and what is written after it


def cross_entropy(model: Coconut, batch: Batch, totals: Totals) -> Loss:
    """The mean cross entropy over the labelled tokens of the step (paper, section 3)."""
    return Loss(model(**sequence(batch), labelled_only=True, num_items_in_batch=totals.labels[MAIN]).loss, {})


def sequence(batch: Batch, name: str = MAIN) -> dict[str, Tensor]:
    """The tensors (B, T) of one sequence: input_ids, attention_mask, position_ids, labels."""
    prefix = sequence_key(name, "")
    keys = ("input_ids", "attention_mask", "position_ids", "labels")
    return {key: batch[prefix + key] for key in keys}


def before_answer(states: Tensor, batch: Batch, name: str = MAIN) -> Tensor:
    """Of the states of a sequence those of the token that predicts the first one of the answer's own text: (B, D).

    states: (B, T, D), or (B, T', D) of the last T' columns alone; an error where a row has that token before them. The answer's
    text is what follows "### ", so that token is "###", or the blank where a tokenizer keeps it apart from what follows.
    """
    missing = batch[sequence_key(name, "input_ids")].shape[1] - states.shape[1]
    at = batch[sequence_key(name, ANSWER_AT)] - 1 - missing
    return states.gather(1, at[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


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


class Parts(NamedTuple):
    """The tokens of an example: the question, the same with its thoughts (prompt), each step, and the answer with its end.

    shape: how it looks at its stage. latent_id: the token in a thought's place.
    """

    question: list[int]
    prompt: list[int]
    each_step: list[list[int]]
    answer: list[int]
    shape: StageShape
    curriculum: Curriculum
    latent_id: int = 0

    @property
    def steps(self) -> list[int]:
        """All steps, one after the other."""
        return [token for step in self.each_step for token in step]

    @property
    def most_latents(self) -> int:
        """That any example of the run may have."""
        return self.curriculum.c_thought * self.curriculum.max_latent_stage


class TokenSequence(NamedTuple):
    """Tokens without and with loss; has_answer: whether the answer stands at its end (`before_answer`)."""

    prompt: list[int]
    target: list[int]
    has_answer: bool = True


Sequences = Callable[[Parts], dict[str, TokenSequence]]
