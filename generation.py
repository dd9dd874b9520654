"""Decoding: how tokens are chosen, how branches go on from what they share, and what generation returns.

Shapes: B rows of the batch, T positions, D width of the model, V vocabulary, K branches, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from noise import block_dropout, sampling_generator
from states import Branch, Branches, BranchPoint, Decoded, Generated, Prompt, Thinking
from systems.cache import GrowingCache, fork, keep_rows, select_cache
from thoughts import Intervention, Noise, ThoughtInterventions, count_passes, gather_thoughts, path_diversity

if TYPE_CHECKING:
    from coconut import Coconut

MAX_N_LATENT = 8  # latents a model tried without training gets between its two markers; a default, not a limit


class Sampling(NamedTuple):
    """How tokens are chosen, see `sample`."""

    temperature: float | Tensor
    top_p: float
    generator: torch.Generator | Sequence[torch.Generator] | None = None

    @property
    def by_row(self) -> bool:
        """Whether a row's tokens do not depend on which other rows there are."""
        own = self.generator is not None and not isinstance(self.generator, torch.Generator)
        return own or (not isinstance(self.temperature, Tensor) and self.temperature == 0)

    def select(self, rows: list[int]) -> Sampling:
        """The same for some rows of the batch."""
        if isinstance(self.temperature, Tensor):
            self = self._replace(temperature=self.temperature[rows])
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return self
        return self._replace(generator=[self.generator[row] for row in rows])


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


def all_branches(questions: Sequence[int], noise: Noise, count: int, shared_noise: bool, temperature: float) -> list[Branch]:
    """`count` branches of each question at each of the scales (S,) of the noise, in this order.

    shared_noise: one noise vector for all branches of a question. Raises ValueError if there are none, as `Noise.check`.
    """
    noise.check()
    scales = cast("Tensor", noise.scale).tolist()
    if 0 in (sizes := [len(questions), len(scales), count]):
        raise ValueError(f"there are no branches to generate: questions, scales and branches are {sizes}")
    return [
        Branch(
            row=row,
            question=question,
            branch=branch,
            noise_branch=0 if shared_noise else branch,
            intervention=Intervention(noise._replace(scale=scale)),
            temperature=temperature,
        )
        for (row, question), scale, branch in product(enumerate(questions), scales, range(count))
    ]


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


@torch.no_grad()
def branch_point(
    model: Coconut,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    noise_at_step: int = 1,
    inserted_latents: int | None = None,
) -> BranchPoint:
    """Think up to where thought `noise_at_step` (from 1) is fed back: what all branches of a question have in common.

    input_ids, attention_mask, inserted_latents: as in `Coconut.generate`, which raises the same errors.
    """
    ids, mask = with_latents(model, input_ids, attention_mask, inserted_latents)
    prompt = model.prompt(ids, mask)
    bounds = pass_bounds(prompt.latent, prompt.mask)
    columns = [passes.index(noise_at_step) for passes in count_passes(prompt.latent) if noise_at_step in passes]
    column = min(columns, default=ids.shape[1])
    if columns and model.jacobi_iterations is not None:  # thoughts are computed together: only the question is shared
        column = bounds[1][0]
    embeds = model.embedding(ids)
    shared = [(start, end) for start, end in bounds if start < column]
    with model.reading():
        thinking = model.passes(embeds[:, :column], prompt, shared, GrowingCache())
    return BranchPoint(prompt, embeds, column, thinking, bounds)


@torch.no_grad()
def generate_from(
    model: Coconut,
    point: BranchPoint,
    branches: Sequence[Branch],
    max_new_tokens: int = 16,
    top_p: float = 1.0,
    seed: int = 0,
    synced_gpus: bool = False,
    score: bool = True,
) -> Generated:
    """Think and decode on from a branch point, which stays as it is: all branches, of any questions, as rows of one batch.

    score: also compute the log-probabilities. Raises ValueError as `Coconut.generate`, or if an earlier thought is to change.
    """
    temperatures = [branch.temperature for branch in branches]
    check_generate(model, point.prompt.mask, max_new_tokens, min(temperatures), top_p)
    index = torch.tensor([branch.row for branch in branches], device=point.embeds.device)
    prompt = point.prompt.select(index)
    interventions = ThoughtInterventions(
        latent=prompt.latent,
        rows=[branch.intervention for branch in branches],
        questions=[branch.question for branch in branches],
        branches=[branch.noise_branch for branch in branches],
        seed=seed,
    )
    hidden, cache, thoughts = _think_on(model, point, index, prompt, interventions)
    if any(temperatures):
        generators = [sampling_generator(seed, branch.question, branch.branch) for branch in branches]
        sampling = Sampling(torch.tensor(temperatures, device=hidden.device), top_p, generators)
    else:
        sampling = Sampling(0.0, top_p)
    decoded = decode(model, hidden, cache, prompt.mask, max_new_tokens, sampling, synced_gpus, score)
    return Generated(*decoded, thoughts, interventions.infos)


def _think_on(
    model: Coconut, point: BranchPoint, index: Tensor, prompt: Prompt, interventions: ThoughtInterventions
) -> tuple[Tensor, DynamicCache, Tensor]:
    """Last hidden states (R, D), cache and thoughts (R, N, D) of R rows, whose questions are `index` (R,)."""
    column = point.column
    if interventions.first_column() < column:
        raise ValueError(f"the branch point is column {column}, but a thought fed to an earlier one is to be changed")
    cache = select_cache(cast("DynamicCache", point.thinking.cache), index)
    hidden, before = point.thinking.hidden[index, -1], [states[index] for states in point.thinking.before]
    # Of the shared part only the columns with latents are copied: a long prompt has few.
    has_latent = point.prompt.latent.any(dim=0)
    fed_back = [point.thinking.inputs_embeds[:, has_latent[:column]][index]]
    if column < point.embeds.shape[1]:
        bounds = [(start, end) for start, end in point.bounds if start >= column]
        with model.reading():
            thinking = model.passes(point.embeds[index, column:], prompt, bounds, cache, before, interventions)
        hidden = thinking.hidden[:, -1]
        fed_back.append(thinking.inputs_embeds[:, has_latent[column:]])
    idle_passes(model, missing_passes(model, point.bounds))
    return hidden, cache, gather_thoughts(torch.cat(fed_back, dim=1), prompt.latent[:, has_latent])


def decode(
    model: Coconut,
    hidden: Tensor,
    cache: DynamicCache | None,
    mask: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    synced_gpus: bool = False,
    score: bool = False,
) -> Decoded:
    """Tokens after prompts whose last hidden states are (B, D) and whose mask is (B, T).

    score: also compute the log-probabilities. Finished rows leave the batch, and the cache, as soon as they are half of all,
    where a row's tokens do not depend on the others (`Sampling.by_row`).
    """
    position = count_positions(mask)[:, -1:]  # (B, 1)
    finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    rows = torch.arange(len(hidden), device=hidden.device)  # those that are still in the batch
    tokens = rows.new_full((len(rows), max_new_tokens), model.eos_token_id)
    scores = torch.zeros(tokens.shape, device=hidden.device)
    lengths = torch.zeros_like(rows)
    for new in range(max_new_tokens):
        logits = model.project(hidden)
        token = sample(logits, *sampling).masked_fill(finished, model.eos_token_id)  # (B,)
        tokens[rows, new] = token
        lengths[rows] += ~finished
        if score:
            scores[rows, new] = -F.cross_entropy(logits.float(), token, reduction="none").masked_fill(finished, 0)
        finished = finished | (token == model.eos_token_id)
        ended = new + 1 == max_new_tokens or bool(finished.all())
        if not (model.max_over_ranks(int(not ended)) if synced_gpus else not ended):
            break
        if new + 1 == max_new_tokens:
            _accompany(model)
            break
        if sampling.by_row and 0 < (going := (~finished).nonzero().squeeze(1)).numel() <= len(finished) // 2:
            keep_rows(cast("DynamicCache", cache), going)
            rows, token, mask, position, finished = (part[going] for part in (rows, token, mask, position, finished))
            sampling = sampling.select(going.tolist())
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position = position + 1
        hidden = model.base_pass(model.embedding(token[:, None]), mask, position, cache).states[:, -1]
    return Decoded(tokens[:, : new + 1], lengths, scores[:, : new + 1])


def _accompany(model: Coconut) -> None:
    """Take part in the passes of processes that are given more new tokens, until they end."""
    going = 1
    while going:
        idle_passes(model, 1)
        going = model.max_over_ranks(0)


def with_latents(model: Coconut, input_ids: Tensor, attention_mask: Tensor | None, count: int | None) -> tuple[Tensor, Tensor]:
    """Tokens and mask, with `count` latents inserted where the markers stand side by side (`insert_latents`); None: none."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if count is None:
        return input_ids, mask
    return insert_latents(input_ids, mask, model.start_latent_id, model.end_latent_id, model.latent_token_id, count)


def check_generate(model: Coconut, mask: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise ValueError if a setting is out of range, or a prompt with this mask (B, T) cannot be decoded from."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must not be negative")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    if not mask[:, -1].all():
        raise ValueError("prompts must be padded on the left")
    limit = model.max_positions
    needed = int(mask.sum(dim=1).max()) + max_new_tokens - 1  # the last new token is not read again
    if limit is not None and needed > limit:
        raise ValueError(f"prompt and new tokens need {needed} positions; the model has {limit}")


def count_positions(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) that count the real tokens of each row from 0; 0 on padding."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def jacobi_passes(
    model: Coconut,
    embeds: Tensor,
    prompt: Prompt,
    bounds: list[tuple[int, int]],
    cache: DynamicCache | None,
    before: Sequence[Tensor] | None,
    interventions: ThoughtInterventions | None,
    all_layers: bool,
) -> Thinking:
    """`Coconut.passes` with all thoughts at once (Jacobi iteration; PCCoT, arXiv 2506.18582, section 3).

    First every latent holds the embedding of its token. Then, `model.jacobi_iterations` times, every latent is given the
    thought that the last round computed at the position before it. Rounds go over the columns from the first latent to the
    last; the question is computed once. No iteration is the pause tokens' one pass; as many as there are latents, or more,
    give what one after the other gives.
    """
    assert cache is not None
    hidden, filled, offset = [], [], bounds[0][0]
    if before is None:
        end = bounds[1][0]
        states, given, _ = model.base_pass(embeds[:, :end], prompt.mask[:, :end], prompt.positions[:, :end], cache)
        before = [one[:, -1:] for one in given]
        if model.before_last_backward is not None and states.requires_grad:
            states.register_hook(model.announce_last_backward)
        hidden.append(states)
        filled.append(embeds[:, :end])
    start, stop, end = offset + sum(one.shape[1] for one in hidden), bounds[-1][0] + 1, bounds[-1][1]
    own, rest = embeds[:, start - offset : stop - offset], embeds[:, stop - offset :]
    latent = prompt.latent[:, start:stop, None]  # (B, n, 1)
    segment = own
    for _ in range(cast("int", model.jacobi_iterations)):
        with dropout(model, interventions, start, stop):
            _, given, _ = model.base_pass(segment, prompt.mask[:, :stop], prompt.positions[:, start:stop], fork(cache))
        thoughts = model.thought_map([torch.cat([b, one[:, :-1]], dim=1) for b, one in zip(before, given, strict=True)])
        if interventions is not None:
            interventions.restart()
            columns = thoughts.split(1, dim=1)
            thoughts = torch.cat([interventions.apply(one, start + number) for number, one in enumerate(columns)], dim=1)
        segment = torch.where(latent, thoughts.to(own.dtype), own)
    segment = torch.cat([segment, rest], dim=1)
    place = (prompt.mask[:, :end], prompt.positions[:, start:end])
    with dropout(model, interventions, start, end):
        states, given, layers = model.base_pass(segment, *place, cache, all_layers)
    hidden.append(states)
    filled.append(segment)
    return Thinking(torch.cat(hidden, dim=1), torch.cat(filled, dim=1), cache, [one[:, -1:] for one in given], layers)


def transformer_blocks(model: Coconut) -> list[nn.Module]:
    """The blocks that transformers itself names as the units of a model that must not be split; empty if it names none."""
    names = set(model.base_causallm._no_split_modules or [])
    return [module for module in model.base_causallm.modules() if type(module).__name__ in names]


def dropout(model: Coconut, interventions: ThoughtInterventions | None, start: int, end: int) -> AbstractContextManager[None]:
    """In it a pass over the columns [start, end) is taken with the dropout of its rows (`Intervention.dropout`)."""
    if interventions is None or not any(row.dropout for row in interventions.rows):
        return nullcontext()
    blocks = transformer_blocks(model)
    if not blocks:
        raise ValueError(f"model family {model.base_causallm.config.model_type!r} names no blocks, which dropout needs")
    return block_dropout(blocks, interventions.kept(start, end, len(blocks), model.embedding.embedding_dim))


def missing_passes(model: Coconut, bounds: list[tuple[int, int]]) -> int:
    """How many more passes the process that takes most takes than this one, which takes those of the bounds."""
    own = len(bounds) if model.jacobi_iterations is None or len(bounds) == 1 else model.jacobi_iterations + 2
    return model.max_over_ranks(own) - own


def idle_passes(model: Coconut, count: int, with_map: bool = False) -> Tensor | None:
    """Zero, by way of `count` passes over one token and, `with_map`, of the map's parameters; None where there is nothing.

    Sharded parameters are gathered for each pass, forward and backward, by all processes together: one with fewer
    latents than the others must still take part. Processes also expect a gradient for each parameter, and where a batch
    has no latents no other one reaches the map.
    """
    token = torch.full((1, 1), model.eos_token_id, device=model.embedding.weight.device)
    mask, position = torch.ones_like(token), torch.zeros_like(token)
    parts = [model.base_pass(model.embedding(token), mask, position, None).states.sum() for _ in range(count)]
    if with_map:
        parts += [parameter.sum() for parameter in model.thought_map.parameters() if parameter.requires_grad]
    return 0 * torch.stack(parts).sum() if parts else None


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
