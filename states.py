"""What passes and generation work with and what they give back.

Shapes: B rows of the batch, T positions, D width of the model, V vocabulary, K branches, S scales, N thoughts or labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache

from thoughts import Intervention


class Outputs(NamedTuple):
    """What `Coconut.forward` returns.

    loss: scalar float32, or None without labels.
    inputs_embeds: (B, T, D), the input embeddings with the thoughts filled in.
    logits: (B, T, V) float, or None with `labelled_only`.
    """

    loss: Tensor | None
    inputs_embeds: Tensor
    logits: Tensor | None


class Pass(NamedTuple):
    """What one pass gives: the states (B, T, D) that the head reads, those that the map reads, and all layers'."""

    states: Tensor
    before: Sequence[Tensor]
    layers: Sequence[Tensor]


class Thinking(NamedTuple):
    """The state after some latent passes over T positions.

    hidden: (B, T, D), after the final norm; within `Coconut.reading` only where it is read. inputs_embeds: (B, T, D).
    cache: keys and values.
    before: what the thought map reads at the last position, (B, 1, D) for each of its layers.
    layers: if asked for, the embeddings and what each layer gives in the last pass, each (B, T', D); the last one is normed.
    """

    hidden: Tensor
    inputs_embeds: Tensor
    cache: DynamicCache | None
    before: Sequence[Tensor]
    layers: Sequence[Tensor] = ()


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
    hidden: (B, T, D), the last hidden states, which the language-model head reads. layers, cache: as in `Thinking`; no cache
    after `generate`, whose decoding has gone on with it.
    """

    thoughts: Tensor
    steps: Tensor
    noise: list[list[dict[str, Any]]]
    hidden: Tensor
    layers: Sequence[Tensor] = ()
    cache: DynamicCache | None = None


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
    """What `generate_from` returns for R branches: tokens, lengths, log_probabilities (R, new) and thoughts (R, N, D)
    as in `Branches`; noise: for each branch the descriptions of its perturbed thoughts."""

    tokens: Tensor
    lengths: Tensor
    log_probabilities: Tensor
    thoughts: Tensor
    noise: list[list[dict[str, Any]]]


class Decoded(NamedTuple):
    """New tokens (B, new), their number with the end of the sequence (B,), and their log-probabilities (B, new)."""

    tokens: Tensor
    lengths: Tensor
    log_probabilities: Tensor
