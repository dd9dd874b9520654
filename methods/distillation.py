"""Self-distillation into thoughts: CODI (arXiv 2502.21074, section 3).

One model takes two sequences of an example. The teacher writes the steps, the student thinks in their place, and both answer.
The student's states at the token that predicts the answer's first one are drawn to the teacher's, in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.losses import MAIN, Batch, Loss, Parts, TokenSequence, Totals, before_answer, sequence

if TYPE_CHECKING:
    from coconut import Coconut
    from states import Details

TEACHER = "teacher"


@dataclass(frozen=True)
class CodiOptions:
    """The weights of two of the loss's parts; `RunConfig` explains the keys."""

    codi_teacher_weight: float
    codi_distillation_weight: float


def teacher_sequence(parts: Parts) -> dict[str, TokenSequence]:
    """Question, steps and answer. The last step goes, as published: it says the answer, so that the states need not know it."""
    steps = [token for step in parts.each_step[:-1] for token in step]
    return {TEACHER: TokenSequence(parts.question, steps + parts.answer)}


def codi_loss(model: Coconut, batch: Batch, totals: Totals, options: CodiOptions) -> Loss:
    """CE of the student + a x CE of the teacher + g x distillation (equation 6).

    The cross entropies are means over the labelled tokens of the step, the distillation is a mean over its examples.
    """
    return distilled(model, batch, totals, options)[0]


def distilled(model: Coconut, batch: Batch, totals: Totals, options: CodiOptions) -> tuple[Loss, Details]:
    """That loss, and the details of the student's passes with all layers."""
    losses, details = {}, {}
    for name in (TEACHER, MAIN):
        labels = totals.labels[name]
        outputs, details[name] = model(
            **sequence(batch, name), labelled_only=True, num_items_in_batch=labels, return_details=True, all_layers=True
        )
        losses[name] = outputs.loss
    states = {name: [before_answer(layer, batch, name) for layer in one.layers] for name, one in details.items()}  # (B, D)
    real = (batch["labels"] >= 0).any(dim=1)  # a row that fills up a batch has no label
    distance = layer_distance(states[MAIN], states[TEACHER])  # (B,)
    parts = {"student": losses[MAIN], "teacher": losses[TEACHER], "distillation": (distance * real).sum() / totals.examples}
    weights = {"student": 1.0, "teacher": options.codi_teacher_weight, "distillation": options.codi_distillation_weight}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return Loss(total, parts), details[MAIN]


def layer_distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Smooth L1 distance of the states of each row, averaged over layers and width: (B,).

    student, teacher: of each layer, the embeddings included, (B, D). A layer's distances are divided by the standard deviation
    of the teacher's states in it, over the rows of this batch and the width. Nothing is learned by the teacher.
    """
    each = []
    for own, given in zip(student, teacher, strict=True):
        target = given.detach().float()
        each.append(F.smooth_l1_loss(own.float(), target, reduction="none").mean(dim=1) / target.std())
    return torch.stack(each).mean(dim=0)
