"""Chain of Continuous Thought (Coconut, arXiv 2412.06769, section 3): a causal language model that reasons by feeding its
last hidden state back as its next input embedding.

Shapes: B rows of the batch, T positions, D width of the model, V vocabulary, N labelled positions.

A *latent* is a position that holds `latent_token_id`; its input embedding is not looked up but is the *thought*: the
hidden state at the position before it. All columns up to the first latent are one pass of the base model, then every
column that holds a latent in some row begins the next pass, and keys and values are cached between passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

IGNORE_INDEX = -100  # label of positions that carry no loss, as in torch.nn.functional.cross_entropy
MAX_N_LATENT = 8  # latents a model tried without training gets between its two markers; a default, not a limit


class Outputs(NamedTuple):
    """What `Coconut.forward` returns.

    loss: scalar float32, or None without labels.
    inputs_embeds: (B, T, D), the input embeddings with the thoughts filled in.
    logits: (B, T, V) float; with `labelled_only` (N, V), row by row in the order of the labels they predict.
    """

    loss: Tensor | None
    inputs_embeds: Tensor
    logits: Tensor


class Thinking(NamedTuple):
    """The state after all latent passes: hidden (B, T, D) after the final norm, inputs_embeds (B, T, D), cache."""

    hidden: Tensor
    inputs_embeds: Tensor
    cache: DynamicCache | None


class Coconut(nn.Module):
    """Wraps any causal language model of transformers.

    Args:
        base_causallm: an `AutoModelForCausalLM`.
        latent_token_id, start_latent_id, end_latent_id: ids of `<|latent|>`, `<|start-latent|>`, `<|end-latent|>`.
        eos_token_id: the token that ends a generation; finished rows are filled up with it.
        hidden_layer_idx: the layer whose hidden state becomes the thought; -1 is the last one, after the final norm.

    Attributes:
        max_over_ranks: maximum of an int over all processes. Whoever shards the model sets it, so that all processes take
            equally many passes; by itself this module knows nothing of process groups.
    """

    def __init__(
        self,
        base_causallm: PreTrainedModel,
        latent_token_id: int,
        start_latent_id: int,
        end_latent_id: int,
        eos_token_id: int,
        hidden_layer_idx: int = -1,
    ) -> None:
        super().__init__()
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.hidden_layer_idx = hidden_layer_idx
        self.max_over_ranks: Callable[[int], int] = lambda value: value

    @property
    def embedding(self) -> nn.Embedding:
        return cast("nn.Embedding", self.base_causallm.get_input_embeddings())

    @property
    def decoder(self) -> nn.Module:
        """The base model without its language-model head."""
        inner = self.base_causallm.base_model
        return inner if inner is not self.base_causallm else self.base_causallm.model  # Llama 4 and others name no prefix

    @property
    def max_positions(self) -> int | None:
        """Positions that the base model was made for; None where its configuration sets no limit."""
        return getattr(self.base_causallm.config, "max_position_embeddings", None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        labelled_only: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Outputs:
        """Latent passes, then next-token logits and their mean cross entropy over the labelled positions.

        Args:
            input_ids: (B, T) int64. attention_mask: (B, T), 0 on padding; all ones if None.
            labels: (B, T) int64, `IGNORE_INDEX` where no loss is taken; shifted here.
            position_ids: (B, T) int64; counted from the attention mask if None.
            labelled_only: project only the N positions that predict a label onto the vocabulary.
            num_items_in_batch: divide the summed cross entropy by this instead of by N, for means over several batches.

        Raises:
            ValueError: a latent with no real token before it; `labelled_only` without labels.
        """
        if labelled_only and labels is None:
            raise ValueError("labelled_only needs labels")
        thinking = self.think(input_ids, attention_mask, position_ids)
        if labels is None:
            return Outputs(None, thinking.inputs_embeds, self.project(thinking.hidden))
        predicts = labels[:, 1:] != IGNORE_INDEX  # (B, T-1): position t predicts the label at t + 1
        targets = labels[:, 1:][predicts]  # (N,)
        if labelled_only:
            logits = self.project(thinking.hidden[:, :-1][predicts])  # (N, V)
            predictions = logits
        else:
            logits = self.project(thinking.hidden)  # (B, T, V)
            predictions = logits[:, :-1][predicts]
        items = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        loss = F.cross_entropy(predictions.float(), targets, reduction="sum") / items
        return Outputs(loss, thinking.inputs_embeds, logits)

    def think(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep_cache: bool = False,
    ) -> Thinking:
        """All latent passes of (B, T) tokens, without the language-model head."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = count_positions(mask) if position_ids is None else position_ids
        latent = input_ids == self.latent_token_id  # (B, T)
        bounds = pass_bounds(latent, mask)
        idle = self.max_over_ranks(len(bounds)) - len(bounds)  # agreed on before the first pass gathers anything
        embeds = self.embedding(input_ids).split([end - start for start, end in bounds], dim=1)
        cache = DynamicCache() if keep_cache or len(bounds) > 1 else None
        hidden, filled, thought = [], [], None
        for (start, end), segment in zip(bounds, embeds, strict=True):
            if thought is not None:
                is_latent = latent[:, start, None, None]  # (B, 1, 1)
                first = torch.where(is_latent, thought.to(segment.dtype), segment[:, :1])
                segment = torch.cat([first, segment[:, 1:]], dim=1)
            states, layer = self._base_pass(segment, mask[:, :end], positions[:, start:end], cache)
            thought = layer[:, -1:]  # (B, 1, D)
            hidden.append(states)
            filled.append(segment)
        hidden[-1] = hidden[-1] + self._idle_passes(idle) if idle else hidden[-1]
        return Thinking(torch.cat(hidden, dim=1), torch.cat(filled, dim=1), cache)

    def _base_pass(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: DynamicCache | None
    ) -> tuple[Tensor, Tensor]:
        """One pass of the decoder; the states the head reads, and the states of `hidden_layer_idx`."""
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=self.hidden_layer_idx != -1,
        )
        # Gradient checkpointing makes transformers drop the cache with no more than a warning: wrong thoughts.
        if cache is not None and cache.get_seq_length() != attention_mask.shape[1]:
            raise ValueError("the base model keeps no key-value cache, or gradient checkpointing has turned it off")
        last = outputs.last_hidden_state
        return last, last if self.hidden_layer_idx == -1 else outputs.hidden_states[self.hidden_layer_idx]

    def project(self, hidden: Tensor) -> Tensor:
        """Language-model head on hidden states (..., D) -> logits (..., V), with the scalings some families apply after it."""
        logits = self.base_causallm.get_output_embeddings()(hidden)
        config = self.base_causallm.config
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def verify_projection(self) -> None:
        """Raise ValueError if `project` is not what the base model computes after its decoder."""
        token = torch.tensor([[self.eos_token_id]], device=self.embedding.weight.device)
        was_training = self.base_causallm.training
        self.base_causallm.eval()  # without dropout
        expected = self.base_causallm(input_ids=token, attention_mask=torch.ones_like(token)).logits
        actual = self.project(self.decoder(input_ids=token, attention_mask=torch.ones_like(token)).last_hidden_state)
        self.base_causallm.train(was_training)
        if not torch.allclose(actual.float(), expected.float(), rtol=1e-2, atol=1e-3):
            family = self.base_causallm.config.model_type
            raise ValueError(
                f"model family {family!r} changes its logits after the language-model head in a way not known here"
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        output_embedding: bool = False,
        synced_gpus: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Think, then decode up to the end-of-sequence token, for all rows at once and with a key-value cache.

        Args:
            input_ids: (B, T) int64, padded on the left. attention_mask: (B, T), 0 on padding; all ones if None.
            max_new_tokens: at most this many tokens are added; a row ends at `eos_token_id`, also when it comes first.
            output_embedding: also return the input embeddings, (B, T + new, D).
            synced_gpus: decode as long as the slowest process does (needed when parameters are sharded).
            temperature: 0 is greedy. top_p: smallest set of tokens with this probability mass (arXiv 1904.09751).
            generator: for sampling; one per row makes a row's sample independent of the rest of the batch.

        Returns:
            (B, T + new) int64: prompt and new tokens; rows that ended early are filled up with `eos_token_id`.

        Raises:
            ValueError: padding on the right, more positions than the model has, a setting out of range.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_generate(mask, max_new_tokens, temperature, top_p)
        thinking = self.think(input_ids, mask, keep_cache=True)
        hidden = thinking.hidden[:, -1]  # (B, D)
        tokens, embeds = [input_ids], [thinking.inputs_embeds]
        position = count_positions(mask)[:, -1:]  # (B, 1)
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for new in range(max_new_tokens):
            token = sample(self.project(hidden), temperature, top_p, generator)  # (B,)
            token = token.masked_fill(finished, self.eos_token_id)
            finished = finished | (token == self.eos_token_id)
            tokens.append(token[:, None])
            embeds.append(self.embedding(token[:, None]))
            if new + 1 == max_new_tokens or not self._goes_on(finished, synced_gpus):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            position = position + 1
            states, _ = self._base_pass(embeds[-1], mask, position, thinking.cache)
            hidden = states[:, -1]
        ids = torch.cat(tokens, dim=1)
        return (ids, torch.cat(embeds, dim=1)) if output_embedding else ids

    def _goes_on(self, finished: Tensor, synced_gpus: bool) -> bool:
        unfinished = int(not finished.all())
        return bool(self.max_over_ranks(unfinished) if synced_gpus else unfinished)

    def _idle_passes(self, count: int) -> Tensor:
        """Zero, by way of `count` passes over one token.

        Sharded parameters are gathered for each pass, forward and backward, by all processes together: one with fewer
        latents than the others must still take part.
        """
        token = torch.full((1, 1), self.eos_token_id, device=self.embedding.weight.device)
        mask, position = torch.ones_like(token), torch.zeros_like(token)
        zero = torch.zeros((), device=token.device)
        return 0 * sum(
            (self._base_pass(self.embedding(token), mask, position, None)[0].sum() for _ in range(count)), start=zero
        )

    def _check_generate(self, mask: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; it must not be negative")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
        if not mask[:, -1].all():
            raise ValueError("prompts must be padded on the left")
        limit = self.max_positions
        needed = int(mask.sum(dim=1).max()) + max_new_tokens - 1  # the last new token is not read again
        if limit is not None and needed > limit:
            raise ValueError(f"prompt and new tokens need {needed} positions; the model has {limit}")


def count_positions(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) that count the real tokens of each row from 0; 0 on padding."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def pass_bounds(latent: Tensor, attention_mask: Tensor) -> list[tuple[int, int]]:
    """The columns [start, end) of each pass: a new one begins wherever some row has a latent.

    latent, attention_mask: (B, T). Raises ValueError if a latent has no real token before it.
    """
    before = F.pad(attention_mask[:, :-1].bool(), (1, 0))  # (B, T): a real token stands before this position
    orphan = latent & ~before
    has_latent, has_orphan = torch.stack([latent.any(dim=0), orphan.any(dim=0)]).tolist()  # one transfer to the host
    if any(has_orphan):
        raise ValueError(f"the latent in column {has_orphan.index(True)} has no token before it to think from")
    starts = [0] + [column for column, found in enumerate(has_latent) if found]
    return list(zip(starts, [*starts[1:], latent.shape[1]], strict=True))


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Next token (B,) from logits (B, V): argmax at temperature 0, else nucleus sampling (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens ranked higher
    cumulative = probabilities.masked_fill(before >= top_p, 0).cumsum(dim=-1)
    draw = uniform(len(logits), generator, logits.device)[:, None] * cumulative[:, -1:]
    rank = torch.searchsorted(cumulative, draw, right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    kept = (before < top_p).sum(dim=-1, keepdim=True)
    return order.gather(1, torch.minimum(rank, kept - 1)).squeeze(1)


def uniform(rows: int, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device) -> Tensor:
    """(rows,) float32 in [0, 1): from one generator, or each row from its own."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand(rows, generator=generator, device=source).to(device)
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} rows")
    return torch.cat([torch.rand(1, generator=one, device=one.device).to(device) for one in generator])
