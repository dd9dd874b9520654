"""What a loss is given and what it returns; the sequences of an example and their tensors in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

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
    """The tokens of an example: the prompt with its thoughts, the steps still written, each step, and the answer with its end.

    steps_removed: how many of the steps, from the first on, are not written. latents: in the prompt; most_latents: that any
    example of the run may have; latents_per_step: `c_thought`. latent_id: the token in their places.
    """

    question: list[int]
    prompt: list[int]
    remaining: list[int]
    each_step: list[list[int]]
    answer: list[int]
    steps_removed: int
    latents: int
    most_latents: int
    latents_per_step: int
    latent_id: int

    @property
    def steps(self) -> list[int]:
        """All steps, one after the other."""
        return [token for step in self.each_step for token in step]


class TokenSequence(NamedTuple):
    """Tokens without and with loss; has_answer: whether the answer stands at its end (`before_answer`)."""

    prompt: list[int]
    target: list[int]
    has_answer: bool = True


Sequences = Callable[[Parts], dict[str, TokenSequence]]
