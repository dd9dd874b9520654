"""Decoding: how tokens are chosen, what branches share, and what generation returns.

Shapes: B rows of the batch, T positions, D width of the model, V vocabulary, K branches, S scales.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from thoughts import Intervention, path_diversity

MAX_N_LATENT = 8  # latents a model tried without training gets between its two markers; a default, not a limit


class Thinking(NamedTuple):
    """The state after some latent passes over T positions.

    hidden: (B, T, D), after the final norm. inputs_embeds: (B, T, D). cache: keys and values.
    thought: (B, 1, D), the state of `hidden_layer_idx` at the last position: what a latent after it would be given.
    """

    hidden: Tensor
    inputs_embeds: Tensor
    cache: DynamicCache | None
    thought: Tensor


class Prompt(NamedTuple):
    """What the passes need to know of the tokens: latent (B, T) bool, mask (B, T), positions (B, T)."""

    latent: Tensor
    mask: Tensor
    positions: Tensor

    def select(self, rows: Tensor) -> Prompt:
        return Prompt(*(values[rows] for values in self))


class Details(NamedTuple):
    """What went on in the latent passes.

    thoughts: (B, N, D), as they were fed back, noise included; zeros after a row's last one. steps: (B,), how many.
    noise: for each row the descriptions of its perturbed thoughts (`noise.apply_noise_to_hidden_states`, and "pass").
    """

    thoughts: Tensor
    steps: Tensor
    noise: list[list[dict[str, Any]]]


class Branches(NamedTuple):
    """What `Coconut.generate_with_branching` returns as details; without the dimension S if it was given one scale.

    tokens: (B, S, K, new) int64, filled up with the end-of-sequence token. lengths: (B, S, K), tokens up to and with the
    first end-of-sequence token. log_probabilities: (B, S, K, new) float32, of the tokens under the model at temperature 1
    with its whole vocabulary; 0 after the end. thoughts: (B, S, K, N, D), as they were fed back, noise included; zeros
    after a question's last one. steps: (B,), how many thoughts. diversity: of the K paths, for each question and scale.
    noise: for each question, scale and branch the descriptions of the perturbed thoughts, as in `Details`.
    """

    tokens: Tensor
    lengths: Tensor
    log_probabilities: Tensor
    thoughts: Tensor
    steps: Tensor
    diversity: list[Any]  # of PathDiversity
    noise: list[Any]


class BranchPoint(NamedTuple):
    """B questions, thought through up to the first column that some branch may be fed a changed thought.

    prompt, embeds: of the whole prompts; embeds (B, T, D) without thoughts. column: the first one not yet computed, T if no
    question has so many latents. thinking: of the columns before it. bounds: of all passes.
    """

    prompt: Prompt
    embeds: Tensor
    column: int
    thinking: Thinking
    bounds: list[tuple[int, int]]


class Branch(NamedTuple):
    """One row to be generated from a branch point.

    row: of the question in the branch point. question: its index in the data set. branch: its number; with the seed and the
    question it decides the samples. noise_branch: the same for the noise, so that branches may share it. temperature: of the
    samples, 0 is greedy.
    """

    row: int
    question: int
    branch: int = 0
    noise_branch: int = 0
    intervention: Intervention = Intervention()
    temperature: float = 0.0


class Generated(NamedTuple):
    """What `Coconut.generate_from` returns for R branches: tokens, lengths, log_probabilities (R, new) and thoughts (R, N, D)
    as in `Branches`; noise: for each branch the descriptions of its perturbed thoughts."""

    tokens: Tensor
    lengths: Tensor
    log_probabilities: Tensor
    thoughts: Tensor
    noise: list[list[dict[str, Any]]]


class Sampling(NamedTuple):
    """How tokens are chosen, see `sample`."""

    temperature: float | Tensor
    top_p: float
    generator: torch.Generator | Sequence[torch.Generator] | None

    def select(self, rows: list[int]) -> Sampling:
        """The same for some rows of the batch."""
        if isinstance(self.temperature, Tensor):
            self = self._replace(temperature=self.temperature[rows])
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return self
        return self._replace(generator=[self.generator[row] for row in rows])


class Decoded(NamedTuple):
    """New tokens (B, new), their number with the end of the sequence (B,), and their log-probabilities (B, new)."""

    tokens: Tensor
    lengths: Tensor
    log_probabilities: Tensor


def insert_latents(
    input_ids: Tensor, attention_mask: Tensor, start_id: int, end_id: int, latent_id: int, count: int = MAX_N_LATENT
) -> tuple[Tensor, Tensor]:
    """Latents between the markers of every row in which the first pair of them has nothing between.

    input_ids, attention_mask: (B, T). Returns both as (B, T + count): other rows get as much padding, which holds `end_id`,
    on the left; unchanged if no row has such a pair. Raises ValueError for fewer latents than 1.

    A coconut of stage 0 is trained with its markers side by side and must not be given latents there.
    """
    if count < 1:
        raise ValueError(f"{count} latents to insert; there must be at least 1")
    real = attention_mask.bool()
    pair = (input_ids[:, :-1] == start_id) & (input_ids[:, 1:] == end_id) & real[:, :-1] & real[:, 1:]  # (B, T-1)
    rows = pair.any(dim=1, keepdim=True)  # (B, 1)
    if not rows.any():
        return input_ids, attention_mask
    place = torch.where(rows, pair.long().argmax(dim=1, keepdim=True) + 1, 0)  # (B, 1)
    column = torch.arange(input_ids.shape[1] + count, device=input_ids.device)[None]  # (1, T + count)
    new = (place <= column) & (column < place + count)
    source = torch.where(column < place, column, (column - count).clamp(min=0))
    ids = torch.where(new, torch.where(rows, latent_id, end_id), input_ids.gather(1, source))
    mask = torch.where(new, rows.to(attention_mask.dtype), attention_mask.gather(1, source))
    return ids, mask


def question_indices(question_index: int | Sequence[int] | None, rows: int) -> list[int]:
    """One index for each row; the row numbers if None."""
    if question_index is None:
        return list(range(rows))
    indices = [question_index] if isinstance(question_index, int) else [int(index) for index in question_index]
    if len(indices) != rows:
        raise ValueError(f"{len(indices)} question indices for {rows} rows")
    return indices


def gather_branches(generated: Generated, steps: Tensor, noise_at_step: int, shape: torch.Size) -> Branches:
    """Brings what is known of each row into `shape`, (B, K) or (B, S, K), and compares the paths of each group of K."""
    groups = generated.thoughts.unflatten(0, (-1, shape[-1]))  # (B * S, K, N, D)
    counts = steps.repeat_interleave(len(groups) // len(steps)).tolist()
    diversity = [path_diversity(paths[:, :n], noise_at_step) for paths, n in zip(groups, counts, strict=True)]
    return Branches(
        tokens=generated.tokens.unflatten(0, shape),
        lengths=generated.lengths.unflatten(0, shape),
        log_probabilities=generated.log_probabilities.unflatten(0, shape),
        thoughts=generated.thoughts.unflatten(0, shape),
        steps=steps,
        diversity=nested(diversity, shape[:-1]),
        noise=nested(generated.noise, shape),
    )


def select_cache(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows (R,) of another one, which stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    keep_rows(selected, rows)
    return selected


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Drop all other rows of a cache, whose layers may be on several devices."""
    for layer in cast("Any", cache.layers):
        layer.batch_select_indices(rows.to(layer.keys.device))


def nested(values: list[Any], shape: Sequence[int]) -> list[Any]:
    """A flat list as lists in lists of this shape."""
    if len(shape) == 1:
        return values
    size = len(values) // shape[0]
    return [nested(values[start : start + size], shape[1:]) for start in range(0, len(values), size)]


def sample(
    logits: Tensor,
    temperature: float | Tensor,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Next token (B,) from logits (B, V): argmax at temperature 0, else nucleus sampling (arXiv 1904.09751).

    temperature: one for all rows, or (B,) one for each. A draw walks the nucleus in the order of the vocabulary, which does
    not depend on which of two almost equally likely tokens comes out ahead.
    """
    if isinstance(temperature, Tensor):
        greedy = temperature == 0
        sampled = sample(logits / temperature.masked_fill(greedy, 1)[:, None], 1.0, top_p, generator)
        return torch.where(greedy, logits.argmax(dim=-1), sampled)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = nucleus((logits.float() / temperature).softmax(dim=-1), top_p)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    draw = uniform(len(logits), generator, logits.device)[:, None] * total
    last = torch.searchsorted(cumulative, total)  # the last token with any mass: a draw may be rounded up to the total
    return torch.minimum(torch.searchsorted(cumulative, draw, right=True), last).squeeze(1)


def nucleus(probabilities: Tensor, top_p: float, likely: int = 512) -> Tensor:
    """Probabilities (B, V) with 0 outside the smallest set of tokens whose mass reaches `top_p` (arXiv 1904.09751).

    Tokens as likely as the least likely one of the set stay too. Only the `likely` first are sorted where they are enough: a
    whole vocabulary takes longer to sort than a small model to compute.
    """
    if top_p == 1:
        return probabilities
    size = min(likely, probabilities.shape[-1])
    ranked = probabilities.topk(size, dim=-1).values
    before = ranked.cumsum(dim=-1) - ranked  # mass of the tokens ranked higher
    if size < probabilities.shape[-1] and not (before[:, -1] >= top_p).all():
        return nucleus(probabilities, top_p, likely=probabilities.shape[-1])
    least = ranked.masked_fill(before >= top_p, 1).amin(dim=-1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0)


def uniform(rows: int, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device) -> Tensor:
    """(rows,) float32 in [0, 1): from one generator, or each row from its own."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand(rows, generator=generator, device=source).to(device)
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} rows")
    return torch.cat([torch.rand(1, generator=one, device=one.device) for one in generator]).to(device)
