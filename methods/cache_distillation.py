"""Distillation of the key-value cache into thoughts: KaVa (arXiv 2510.02312), on top of CODI.

The teacher's cache of its written steps is reduced to as many entries as there are thoughts, for each layer and head by
itself, and the student's keys and values at its thoughts are drawn to them. The teacher learns nothing from it.

Shapes: B rows, H key-value heads, Q heads of the queries, T positions, M thoughts, W width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from methods.distillation import TEACHER, CodiOptions, distilled
from methods.losses import MAIN, Batch, Loss, Totals, sequence
from thoughts import gather_thoughts

if TYPE_CHECKING:
    from coconut import Coconut


@dataclass(frozen=True)
class CodiKvOptions(CodiOptions):
    """With those of CODI; `RunConfig` explains the keys."""

    codi_kv_weight: float
    codi_kv_importance: float
    codi_kv_power: int


class Memory(NamedTuple):
    """Keys and values (B, H, M, W) of one layer."""

    keys: Tensor
    values: Tensor


def codi_kv_loss(model: Coconut, batch: Batch, totals: Totals, options: CodiKvOptions) -> Loss:
    """CODI's loss + w x L_KV, a mean over the step's examples.

    L_KV = 1/(2M) (sum |K_teacher - K_student|^p + sum |V_teacher - V_student|^p) over thoughts and the width of a head, as a
    mean over layers and heads. Thoughts for which the teacher has too few written tokens take no part.
    """
    codi, details = distilled(model, batch, totals, options)
    teacher, there = teacher_memory(model, batch, details.thoughts.shape[1], options.codi_kv_importance)
    latent = batch["input_ids"] == model.latent_token_id  # as many in every row
    student = [_at_thoughts(layer, latent) for layer in cast("DynamicCache", details.cache).layers]
    each = torch.stack([_distance(*pair, there, options.codi_kv_power) for pair in zip(student, teacher, strict=True)])
    real = (batch["labels"] >= 0).any(dim=1)  # a row that fills up a batch has no label
    cache = (each.mean(dim=0) * real).sum() / totals.examples
    return Loss(codi.total + options.codi_kv_weight * cache, {**codi.parts, "cache": cache})


def _distance(student: Memory, teacher: Memory, there: Tensor, power: int) -> Tensor:
    """L_KV of one layer, (B,) float32; there: (B, M), the thoughts that count."""
    sums = [
        (target.detach().float() - own.float()).abs().pow(power).sum(dim=-1).mean(dim=1)  # (B, M)
        for own, target in zip(student, teacher, strict=True)
    ]
    return (torch.stack(sums).sum(dim=0) * there).sum(dim=1) / (2 * there.shape[1])


def _at_thoughts(layer: Any, latent: Tensor) -> Memory:
    """What a layer of the cache holds where a row has latents (B, T)."""
    # With activation_checkpointing a layer is a list of what each pass has added.
    parts = getattr(layer, "parts", None) or [(layer.keys, layer.values)]
    whole = [torch.cat(one, dim=-2) for one in zip(*parts, strict=True)]  # (B, H, T, W) each
    flat = [gather_thoughts(one.transpose(1, 2).flatten(2), latent) for one in whole]  # (B, M, H * W) each
    return Memory(*(one.unflatten(-1, (whole[0].shape[1], -1)).transpose(1, 2) for one in flat))


# --- the teacher's ---


@torch.no_grad()
def teacher_memory(model: Coconut, batch: Batch, size: int, importance: float) -> tuple[list[Memory], Tensor]:
    """Of each layer the `size` entries of the written steps that score best, in their order; (B, size) which are there.

    A pass of its own over the teacher's sequence, which no gradient comes from. It is without dropout, which would decide what
    the answer attends to.
    """
    inputs = sequence(batch, TEACHER)
    labelled = inputs["labels"] >= 0
    answer = (sequence(batch, MAIN)["labels"] >= 0).sum(dim=1, keepdim=True)  # the student writes nothing else
    is_answer = labelled & (labelled.flip(1).cumsum(dim=1).flip(1) <= answer)
    is_step = labelled & ~is_answer
    training = model.decoder.training
    model.decoder.eval()
    outputs = model.gathered(
        lambda: model.decoder(
            inputs_embeds=model.embedding(inputs["input_ids"]),
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            past_key_values=DynamicCache(),
            use_cache=True,
            output_attentions=True,
        )
    )
    model.decoder.train(training)
    memories = []
    for layer, attention in zip(outputs.past_key_values.layers, outputs.attentions, strict=True):
        chosen = best_entries(entry_scores(layer.keys, attention, is_step, is_answer, importance), is_step, size)
        memories.append(Memory(*(_gather_entries(one, chosen) for one in (layer.keys, layer.values))))
    there = torch.arange(size, device=is_step.device) < is_step.sum(dim=1, keepdim=True)
    return memories, there


def entry_scores(keys: Tensor, attention: Tensor, is_step: Tensor, is_answer: Tensor, importance: float) -> Tensor:
    """How much each entry is worth keeping, (B, H, T) float32: importance x I + (1 - importance) x R; 0 but at the steps.

    I: the share of attention, among the steps, that the answer's tokens pay to the entry: a mean over them, the largest of
    the heads that share its key. R: how little its key is like those of the other steps, the softmax of minus the mean
    cosine. Both sum to 1 over the steps where no keys are shared.

    keys: (B, H, T, W). attention: (B, Q, T, T), of probabilities. is_step, is_answer: (B, T).
    """
    steps = is_step[:, None, None]  # (B, 1, 1, T)
    paid = attention.float() * steps
    paid = paid / paid.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    queries = is_answer[:, None, :, None].float()  # (B, 1, T, 1)
    paid = (paid * queries).sum(dim=2) / queries.sum(dim=2).clamp(min=1)  # (B, Q, T)
    important = paid.unflatten(1, (keys.shape[1], -1)).amax(dim=2)
    directions = F.normalize(keys.float(), dim=-1) * is_step[:, None, :, None]
    others = (is_step.sum(dim=1)[:, None, None] - 1).clamp(min=1)
    alike = (directions @ directions.sum(dim=2)[..., None]).squeeze(-1) / others  # (B, H, T); itself adds the same to all
    distinct = (-alike).masked_fill(~steps[:, 0], -torch.inf).softmax(dim=-1)
    return (importance * important + (1 - importance) * distinct).masked_fill(~steps[:, 0], 0)


def best_entries(scores: Tensor, is_step: Tensor, size: int) -> Tensor:
    """The columns (B, H, size) of the best entries in their order; where a row has fewer, any column at the end."""
    columns = scores.shape[-1]
    ranked = scores.masked_fill(~is_step[:, None], -1)
    best = F.pad(ranked, (0, max(0, size - columns)), value=-1).topk(size, dim=-1)
    return torch.where(best.values < 0, columns, best.indices).sort(dim=-1).values.clamp(max=columns - 1)


def _gather_entries(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(2, columns[..., None].expand(-1, -1, -1, values.shape[-1]))
