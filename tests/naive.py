"""The slow, obvious Coconut: every thought recomputes the whole sequence. Tests and benchmarks compare with it.

Shapes: B rows of the batch, T positions, D width of the model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

Perturb = Callable[[Tensor, int], Tensor]  # a thought (D,) and the number of its pass -> the thought that is fed back
ThoughtOf = Callable[[Sequence[Tensor]], Tensor]  # the states (B, T, D) of all layers -> what is fed back of them


def last_state(states: Sequence[Tensor]) -> Tensor:
    return states[-1]


def naive_map(base: PreTrainedModel, name: str, layer: int = -1, weights: dict[str, Tensor] | None = None) -> ThoughtOf:
    """A thought map by its definition; weights: of the projection, by their names in Coconut."""
    if name == "projection":
        first, first_bias, second, second_bias, scale, shift = (weights or {}).values()

        def project(states: Sequence[Tensor]) -> Tensor:
            inner = states[-1] @ first.T + first_bias
            outer = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2 @ second.T + second_bias
            centred = outer - outer.mean(dim=-1, keepdim=True)
            return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * scale + shift

        return project
    if name == "norm":
        embedding = base.get_input_embeddings()
        rows = embedding(torch.arange(len(embedding.weight))).detach().square().sum(dim=1).sqrt()
        return lambda states: states[-1] / states[-1].square().sum(dim=-1, keepdim=True).sqrt() * rows.mean()
    return lambda states: states[layer]


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
    thought_of: ThoughtOf = last_state,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross entropy over the labels, input embeddings (B, T, D) with the thoughts filled in, all logits (B, T, V)."""
    embeds = fill_thoughts(base, ids, input_ids, attention_mask, position_ids, thought_of)
    logits = full_pass(base, embeds, attention_mask, position_ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return loss, embeds, logits


@torch.no_grad()
def naive_generate(base: PreTrainedModel, ids: HasTokenIds, prompt: Tensor, max_new_tokens: int) -> Tensor:
    """Greedy decoding of one prompt (1, T) without a cache -> (1, T + new); the end-of-sequence token is the last one."""
    return naive_decode(base, ids, prompt, max_new_tokens).tokens


class NaiveDecoded(NamedTuple):
    """tokens (1, T + new), embeds (1, T + new, D), log_probabilities of the new tokens."""

    tokens: Tensor
    embeds: Tensor
    log_probabilities: list[float]


@torch.no_grad()
def naive_decode(
    base: PreTrainedModel,
    ids: HasTokenIds,
    prompt: Tensor,
    max_new_tokens: int,
    perturb: Perturb | None = None,
    choose: Callable[[Tensor], int] = lambda logits: int(logits.argmax()),
    thought_of: ThoughtOf = last_state,
) -> NaiveDecoded:
    """Decoding of one prompt (1, T) without a cache; `choose` takes logits (V,)."""
    mask, positions = torch.ones_like(prompt), torch.arange(prompt.shape[1], device=prompt.device)[None]
    embeds = fill_thoughts(base, ids, prompt, mask, positions, thought_of, perturb)
    tokens, scores = prompt, []
    for _ in range(max_new_tokens):
        mask, positions = torch.ones_like(tokens), torch.arange(tokens.shape[1], device=prompt.device)[None]
        logits = full_pass(base, embeds, mask, positions).logits[0, -1]
        token = choose(logits)
        scores.append(logits.double().softmax(dim=0)[token].log().item())
        tokens = torch.cat([tokens, tokens.new_tensor([[token]])], dim=1)
        embeds = torch.cat([embeds, base.get_input_embeddings()(tokens[:, -1:])], dim=1)
        if token == ids.eos:
            break
    return NaiveDecoded(tokens, embeds, scores)


def naive_sampler(temperature: float, top_p: float, generator: torch.Generator) -> Callable[[Tensor], int]:
    """Nucleus sampling from logits (V,), one draw a token."""

    def choose(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.double() / temperature).softmax(dim=0)
        nucleus: list[int] = []
        for token in probabilities.argsort(descending=True).tolist():
            if sum(probabilities[nucleus]) < top_p:
                nucleus.append(token)
        draw = torch.rand(1, generator=generator).item() * sum(probabilities[nucleus]).item()
        for token in sorted(nucleus):
            draw -= probabilities[token].item()
            if draw < 0:
                return token
        return max(nucleus)

    return choose


def naive_noise(
    thought: Tensor, scale: float, noise_type: str, direction: str | None, generator: torch.Generator | None
) -> Tensor:
    """One thought (D,) with noise, written down as in the definitions, in float64 from float32 draws."""
    h = thought.double()
    size = h.norm()
    if noise_type == "targeted":
        added = scale * h if direction == "same" else -scale * h
    elif noise_type in ("uniform", "dropout"):
        u = torch.rand(len(h), generator=generator).double()
        added = scale * (2 * u - 1) if noise_type == "uniform" else torch.where(u > scale, h, 0.0) - h
    else:
        g = torch.randn(len(h), generator=generator).double()
        p = g - (g @ h) / size**2 * h
        added = {
            "gaussian": scale * g,
            "gaussian_scaled": scale * size * g / g.norm(),
            "snr": size / scale * g / g.norm() if scale > 0 else 1000 * size * g / g.norm(),
            "orthogonal": scale * size * p / p.norm(),
        }[noise_type]
    return (h + added).to(thought.dtype)


def naive_perturb(
    generator: Callable[[int], torch.Generator],
    scale: float,
    passes: int,
    noise_type: str = "gaussian",
    direction: str | None = None,
    first_pass: int = 1,
    schedule: str = "none",
) -> Perturb:
    """The noise in the thoughts of one path of `passes` thoughts: its own at `first_pass`, then that of the schedule."""
    memory: dict[str, Any] = {"mean": None}

    def factor(norm: float, t: int, later: int) -> float:
        memory["mean"] = norm if memory["mean"] is None else 0.9 * memory["mean"] + 0.1 * norm
        return {
            "constant": 1.0,
            "linear": 1 - t / later,
            "cosine": 0.5 * (1 + math.cos(math.pi * t / later)),
            "exponential": math.exp(-0.5 * t),
            "adaptive": math.exp(-0.5 * t) * norm / memory["mean"],
        }[schedule]

    def perturb(thought: Tensor, number: int) -> Tensor:
        if number < first_pass or (number > first_pass and schedule == "none"):
            return thought
        here = scale
        if number > first_pass:
            share = factor(thought.double().norm().item(), number - first_pass - 1, passes - first_pass)
            here = scale / share if noise_type == "snr" else scale * share
        return naive_noise(thought, here, noise_type, direction, generator(number))

    return perturb


def naive_diversity(paths: list[Tensor], branch_pass: int) -> float:
    """D_K of K paths (N, D), over the thoughts after thought `branch_pass`."""
    count, steps = len(paths), len(paths[0]) - branch_pass
    total = 0.0
    for i in range(count):
        for j in range(i + 1, count):
            for t in range(branch_pass, len(paths[0])):
                total += (paths[i][t] - paths[j][t]).norm().item() / steps
    return 2 / (count * (count - 1)) * total


def fill_thoughts(
    base: PreTrainedModel,
    ids: HasTokenIds,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    thought_of: ThoughtOf = last_state,
    perturb: Perturb | None = None,
) -> Tensor:
    """Input embeddings (B, T, D): the first latent of every row is filled in, then the second of every row, and so on.

    `perturb` is for a single row.
    """
    embeds = base.get_input_embeddings()(input_ids)
    latent = input_ids == ids.latent  # (B, T)
    rank = latent.long().cumsum(dim=1)  # a row's j-th latent has rank j, counted from 1
    for j in range(1, int(rank.max()) + 1):
        hidden = thought_of(full_pass(base, embeds, attention_mask, position_ids).hidden_states)
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)  # the state one position earlier
        if perturb is not None:
            before = torch.stack(
                [
                    perturb(thought, j) if here else thought
                    for thought, here in zip(before[0], (latent & (rank == j))[0], strict=True)
                ]
            )[None]
        embeds = torch.where((latent & (rank == j))[:, :, None], before, embeds)
    return embeds


def fill_together(
    base: PreTrainedModel,
    ids: HasTokenIds,
    batch: dict[str, Tensor],
    iterations: int,
    thought_of: ThoughtOf = last_state,
) -> Tensor:
    """Input embeddings (B, T, D) of Jacobi iteration: all latents are filled in at once, so many times."""
    embeds = base.get_input_embeddings()(batch["input_ids"])
    latent = (batch["input_ids"] == ids.latent)[:, :, None]
    for _ in range(iterations):
        hidden = thought_of(full_pass(base, embeds, batch["attention_mask"], batch["position_ids"]).hidden_states)
        embeds = torch.where(latent, torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1), embeds)
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
