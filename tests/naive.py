"""The slow, obvious Coconut: every thought recomputes the whole sequence. Tests and benchmarks compare with it.

Shapes: B rows of the batch, T positions, D width of the model, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


class HasTokenIds(Protocol):
    @property
    def eos(self) -> int: ...

    @property
    def latent(self) -> int: ...


def naive_forward(
    base: PreTrainedModel,
    ids: HasTokenIds,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    hidden_layer_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross entropy over the labels, input embeddings (B, T, D) with the thoughts filled in, all logits (B, T, V)."""
    embeds = fill_thoughts(base, ids, input_ids, attention_mask, position_ids, hidden_layer_idx)
    logits = full_pass(base, embeds, attention_mask, position_ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return loss, embeds, logits


@torch.no_grad()
def naive_generate(base: PreTrainedModel, ids: HasTokenIds, prompt: Tensor, max_new_tokens: int) -> Tensor:
    """Greedy decoding of one prompt (1, T) without a cache -> (1, T + new); the end-of-sequence token is the last one."""
    mask, positions = torch.ones_like(prompt), torch.arange(prompt.shape[1], device=prompt.device)[None]
    embeds = fill_thoughts(base, ids, prompt, mask, positions)
    tokens = prompt
    for _ in range(max_new_tokens):
        mask, positions = torch.ones_like(tokens), torch.arange(tokens.shape[1], device=prompt.device)[None]
        token = full_pass(base, embeds, mask, positions).logits[:, -1:].argmax(dim=-1)  # (1, 1)
        tokens = torch.cat([tokens, token], dim=1)
        embeds = torch.cat([embeds, base.get_input_embeddings()(token)], dim=1)
        if token.item() == ids.eos:
            break
    return tokens


def fill_thoughts(
    base: PreTrainedModel,
    ids: HasTokenIds,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    hidden_layer_idx: int = -1,
) -> Tensor:
    """Input embeddings (B, T, D): the first latent of every row is filled in, then the second of every row, and so on."""
    embeds = base.get_input_embeddings()(input_ids)
    latent = input_ids == ids.latent  # (B, T)
    rank = latent.long().cumsum(dim=1)  # a row's j-th latent has rank j, counted from 1
    for j in range(1, int(rank.max()) + 1):
        hidden = full_pass(base, embeds, attention_mask, position_ids).hidden_states[hidden_layer_idx]
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)  # the state one position earlier
        embeds = torch.where((latent & (rank == j))[:, :, None], before, embeds)
    return embeds


def full_pass(base: PreTrainedModel, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor):
    """One pass of the whole model over the whole sequence."""
    return base(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        output_hidden_states=True,
    )
