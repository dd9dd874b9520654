"""SIM-CoT (arXiv 2509.20317): an auxiliary decoder must write step k from the vectors of thought k alone.

So thoughts are told what they stand for. The decoder is a second model, trained along and left out once training is done.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coconut import IGNORE_INDEX, Coconut
from methods.distillation import CodiOptions, distilled, teacher_sequence
from methods.losses import MAIN, Batch, Loss, Parts, TokenSequence, Totals, sequence, sequence_key
from states import Details

STEP = "step{}"  # the sequence of one thought, counted from 1


@dataclass(frozen=True)
class SimcotOptions:
    """The weight of the decoder's loss, and how many vectors are a thought; `RunConfig` explains the keys."""

    simcot_weight: float
    c_thought: int


@dataclass(frozen=True)
class CodiSimcotOptions(CodiOptions):
    """With those of CODI."""

    simcot_weight: float


class StepDecoder(nn.Module):
    """A copy of the base model that writes a step from a thought. The base model's own token embeddings are its input."""

    def __init__(self, copy: Coconut) -> None:
        """copy: around a copy of the base model."""
        super().__init__()
        self.model = copy
        head = copy.base_causallm.get_output_embeddings().weight
        for parameter in copy.embedding.parameters():
            parameter.requires_grad_(parameter is head)  # as embeddings they are not read

    def forward(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of each label from the second column on: (B, T - 1) float32, 0 where there is none.

        embeds: (B, T, D): the vectors of a thought, then tokens, padded on the right. mask, labels: (B, T).
        Positions are counted from 1, as published.
        """
        states = self.model.base_pass(embeds, mask, mask.cumsum(dim=1), None).states
        predicts = labels[:, 1:] != IGNORE_INDEX
        logits = self.model.project(states[:, :-1][predicts]).float()
        losses = torch.zeros(predicts.shape, device=logits.device)
        return losses.masked_scatter(predicts, F.cross_entropy(logits, labels[:, 1:][predicts], reduction="none"))

    @torch.no_grad()
    def write(self, vectors: Tensor, embedding: nn.Module, most: int) -> Tensor:
        """What it writes from thoughts (B, c, D): the likeliest tokens (B, most), after its end whatever comes."""
        embeds, tokens = vectors, []
        for _ in range(most):
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            states = self.model.base_pass(embeds, mask, mask.cumsum(dim=1), None).states[:, -1]
            tokens.append(self.model.project(states).argmax(dim=-1))
            embeds = torch.cat([embeds, embedding(tokens[-1])[:, None]], dim=1)
        return torch.stack(tokens, dim=1)


# --- what each thought has to write ---


def steps_of_thoughts(steps: list[list[int]], thoughts: int) -> list[list[int]]:
    """The steps that each of some thoughts stands for, one after the other; the last one has all that are left over."""
    if len(steps) <= thoughts or not thoughts:
        return steps[:thoughts]
    return [*steps[: thoughts - 1], [token for step in steps[thoughts - 1 :] for token in step]]


def coconut_steps(parts: Parts) -> dict[str, TokenSequence]:
    """`c_thought` vectors for each removed step; thoughts that are left over write the answer."""
    vectors = max(1, parts.curriculum.c_thought)
    thoughts = parts.shape.thoughts // vectors
    targets = [[*step, parts.answer[-1]] for step in steps_of_thoughts(parts.each_step[: parts.shape.steps_removed], thoughts)]
    targets += [parts.answer] * (thoughts - len(targets))
    return _sequences(parts, targets, vectors, parts.curriculum.max_latent_stage)


def codi_steps(parts: Parts) -> dict[str, TokenSequence]:
    """One vector for each step, the one after the last latent included; those that are left over write nothing."""
    targets = [[*step, parts.answer[-1]] for step in steps_of_thoughts(parts.each_step, parts.shape.thoughts + 1)]
    return {**teacher_sequence(parts), **_sequences(parts, targets, 1, parts.most_latents + 1)}


def _sequences(parts: Parts, targets: list[list[int]], vectors: int, most: int) -> dict[str, TokenSequence]:
    """As many for every example: latents in the place of the vectors, then what is to be written; empty where nothing is."""
    filled = [TokenSequence([parts.latent_id] * vectors, target, has_answer=False) for target in targets]
    filled += [TokenSequence([], [], has_answer=False)] * (most - len(filled))
    return {STEP.format(number): one for number, one in enumerate(filled, start=1)}


# --- the losses ---


def simcot_loss(model: Coconut, batch: Batch, totals: Totals, options: SimcotOptions) -> Loss:
    """Coconut's cross entropy + w x the decoder's: summed over a step's tokens, a mean over thoughts and examples."""
    labels = totals.labels[MAIN]
    outputs, details = model(**sequence(batch), labelled_only=True, num_items_in_batch=labels, return_details=True)
    sums, tokens = model.gathered(lambda: decoder_losses(model, batch, details.thoughts, options.c_thought))
    each = sums.sum(dim=1) / (tokens > 0).sum(dim=1).clamp(min=1)
    parts = {"answer": outputs.loss, "steps": each.sum() / totals.examples}
    return Loss(parts["answer"] + options.simcot_weight * parts["steps"], parts)


def codi_simcot_loss(model: Coconut, batch: Batch, totals: Totals, options: CodiSimcotOptions) -> Loss:
    """CODI's loss + w x the decoder's: a mean over a step's tokens, the steps that there are, and examples."""
    codi, details = distilled(model, batch, totals, options)
    sums, tokens = model.gathered(lambda: decoder_losses(model, batch, _with_the_next(model, batch, details), 1))
    each = (sums / tokens.clamp(min=1)).sum(dim=1) / (tokens > 0).sum(dim=1).clamp(min=1)
    steps = each.sum() / totals.examples
    return Loss(codi.total + options.simcot_weight * steps, {**codi.parts, "steps": steps})


def _with_the_next(model: Coconut, batch: Batch, details: Details) -> Tensor:
    """The N thoughts and what would be fed back after the last one, (B, N + 1, D); all rows have as many."""
    latent = batch["input_ids"] == model.latent_token_id
    column = latent.long().cumsum(dim=1).argmax(dim=1)  # of the last one
    rows = torch.arange(len(column), device=column.device)
    first = latent.shape[1] - details.layers[-1].shape[1]  # with all layers those of the last pass are there
    states = [details.layers[layer][rows, column - first][:, None] for layer in model.thought_map.layers]
    return torch.cat([details.thoughts, model.thought_map(states)], dim=1)


def decoder_losses(model: Coconut, batch: Batch, thoughts: Tensor, vectors: int) -> tuple[Tensor, Tensor]:
    """The decoder's cross entropy of what each thought has to write, and its tokens: both (B, K), K thoughts.

    thoughts: (B, N, D). vectors: how many of them are one thought.
    """
    decoder = cast("StepDecoder", model.step_decoder)
    numbers = itertools.takewhile(lambda number: sequence_key(STEP.format(number), "input_ids") in batch, itertools.count(1))
    sequences = [sequence(batch, STEP.format(number)) for number in numbers]
    sequences = [one for one in sequences if one["input_ids"].shape[1]]
    if not sequences:  # the decoder runs all the same: other processes wait for it, and for a gradient of each parameter
        ids = batch["input_ids"][:, :1]
        sequences = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORE_INDEX)}]
        thoughts = F.pad(thoughts, (0, 0, 0, vectors))
    width = max(vectors + 1, *(one["input_ids"].shape[1] for one in sequences))
    ids, mask, labels = (
        torch.cat([F.pad(one[key], (0, width - one[key].shape[1]), value=value) for one in sequences])  # (K * B, T)
        for key, value in {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}.items()
    )
    own = torch.cat(thoughts[:, : len(sequences) * vectors].split(vectors, dim=1))  # (K * B, vectors, D)
    tokens = model.embedding(ids[:, vectors:])
    mask = torch.cat([torch.ones_like(mask[:, :vectors]), mask[:, vectors:]], dim=1)  # no row sees nothing at all
    losses = decoder(torch.cat([own.to(tokens.dtype), tokens], dim=1), mask, labels)
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    return losses.sum(dim=1).view(len(sequences), -1).T, counts.view(len(sequences), -1).T
