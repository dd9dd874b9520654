"""Where is the answer before it is given? `python -m experiments.patching CHECKPOINT ... --data FILE`

A question is thought through; then parts of its key-value cache are replaced by those of another question (activation patching,
arXiv 2202.05262), and only the end marker and the answer are computed. The parts that bring the other question's answer are
those from which the answer is read. Intervals count seeds (checkpoints) and questions. The two questions of a pair have equally
many tokens, so that positions agree, and gold answers with different last words.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from coconut import Coconut
from dataset import load_records
from experiments.across_seeds import Numbers, numbers
from experiments.answers.extraction import last_word
from experiments.tables import markdown, with_interval
from methods import METHODS, stage_shape
from states import Thinking
from systems.arguments import Parser, natural
from systems.tokens import question_ids
from systems.writing import write_json, write_text
from utils import UserError, entry_point, get_logger

BATCH = 100
NEW_TOKENS = 16
COLUMNS = ("of the other question", "pairs", "gives the other's answer", "gives its own answer", "seeds: the other's answer")


@dataclass(frozen=True)
class Patch:
    """What comes from the other question: keys and values at its question, at these thoughts, in these layers; None is all.

    recomputed: the thoughts themselves; their keys and values are computed in the context of the receiving question.
    """

    about: str
    question: bool = False
    thoughts: tuple[int, ...] | None = ()
    layers: tuple[int, ...] | None = None
    recomputed: bool = False


def patches(thoughts: int, layers: int) -> list[Patch]:
    """All that are tried with so many thoughts and layers."""
    single = [Patch(f"keys and values of thought {number + 1}", thoughts=(number,)) for number in range(thoughts)]
    by_layer = [
        Patch(f"keys and values of all thoughts, layer {one + 1}", thoughts=None, layers=(one,)) for one in range(layers)
    ]
    return [
        Patch("nothing"),
        Patch("thoughts, keys and values computed anew", thoughts=None, recomputed=True),
        Patch("keys and values of all thoughts", thoughts=None),
        Patch("keys and values of the question", question=True),
        Patch("keys and values of both", question=True, thoughts=None),
        *single,
        *by_layer,
    ]


@dataclass
class Pair:
    """Prompts up to the end marker, (T,) int64, and the last words of the gold answers; the first question receives."""

    prompts: tuple[list[int], list[int]]
    golds: tuple[str, str]


def pairs_of(model: Coconut, records: Sequence[dict[str, Any]]) -> list[Pair]:
    """Each question that has one with the next one of the same length whose answer ends in another word."""
    trained = model.trained
    texts = question_ids(trained.tokenizer, [record["question"] for record in records], trained.config.chat_template)
    thoughts = stage_shape(trained.config.curriculum, trained.facts.stage, 0, "max").thoughts
    if not thoughts or not METHODS[trained.facts.method].brackets:
        raise UserError(
            f"a model of method {trained.facts.method} at stage {trained.facts.stage} has no thoughts between markers to patch"
        )
    latents = [trained.ids.thought] * thoughts  # of pause_as_thought pauses
    prompts = [[*text, model.start_latent_id, *latents] for text in texts]
    golds = [last_word(record["answer"]) for record in records]
    found = []
    for first, prompt in enumerate(prompts):
        order = [*range(first + 1, len(prompts)), *range(first)]
        fitting = (other for other in order if len(prompts[other]) == len(prompt) and golds[other] != golds[first])
        if (other := next(fitting, None)) is not None:
            found.append(Pair((prompt, prompts[other]), (golds[first], golds[other])))
    return found


@torch.no_grad()
def answers_by_patch(model: Coconut, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """For each patch by what it is about (pairs, 2): whether the answer is the other's, and whether it is its own."""
    thoughts = pairs[0].prompts[0].count(model.trained.ids.thought)
    tried = patches(thoughts, model.base_causallm.config.get_text_config().num_hidden_layers)
    found = {patch.about: np.zeros((len(pairs), 2)) for patch in tried}
    for places in _batches(pairs):
        own, other = (_think(model, [pairs[place].prompts[side] for place in places]) for side in (0, 1))
        for patch in tried:
            answers = _answer(model, _patched(model, patch, own, other, thoughts), len(places))
            for place, said in zip(places, answers, strict=True):
                golds = pairs[place].golds
                found[patch.about][place] = said == golds[1], said == golds[0]
    return found


def _batches(pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
    """Places of pairs of one length, so many at a time."""
    lengths = np.array([len(pair.prompts[0]) for pair in pairs])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        yield from np.split(same, range(BATCH, len(same), BATCH))


def _think(model: Coconut, prompts: Sequence[list[int]]) -> Thinking:
    """With the cache of all T columns."""
    return model.think(torch.tensor(prompts, device=model.embedding.weight.device), keep_cache=True)


def _read(model: Coconut, embeds: Tensor, cache: DynamicCache) -> Tensor:
    """The last state (B, D) of a pass over embeddings (B, T, D) that come after what the cache holds."""
    begin = cache.get_seq_length()
    mask = torch.ones(len(embeds), begin + embeds.shape[1], dtype=torch.long, device=embeds.device)
    positions = torch.arange(begin, mask.shape[1], device=embeds.device).expand(len(embeds), -1)
    return model.base_pass(embeds, mask, positions, cache).states[:, -1]


def _patched(model: Coconut, patch: Patch, own: Thinking, other: Thinking, thoughts: int) -> DynamicCache:
    question = own.inputs_embeds.shape[1] - thoughts
    if patch.recomputed:
        cache = DynamicCache()
        _read(model, torch.cat([own.inputs_embeds[:, :question], other.inputs_embeds[:, question:]], dim=1), cache)
        return cache
    columns = torch.zeros(own.inputs_embeds.shape[1], dtype=torch.bool, device=own.inputs_embeds.device)
    columns[:question] = patch.question
    columns[[question + number for number in (range(thoughts) if patch.thoughts is None else patch.thoughts)]] = True
    cache, given = cast("DynamicCache", copy.deepcopy(own.cache)), cast("DynamicCache", other.cache)
    for number, (layer, source) in enumerate(zip(cache.layers, given.layers, strict=True)):
        if patch.layers is None or number in patch.layers:
            for name in ("keys", "values"):  # (B, heads, T, D / heads)
                kept, new = getattr(layer, name), getattr(source, name)
                setattr(layer, name, torch.where(columns[:, None], new, kept))
    return cache


def _answer(model: Coconut, cache: DynamicCache, rows: int) -> list[str]:
    """The last word of each row's greedy answer after the end marker."""
    tokens = torch.full((rows, 1), model.end_latent_id, device=model.embedding.weight.device)
    said = []
    for _ in range(NEW_TOKENS):
        tokens = model.project(_read(model, model.embedding(tokens), cache)).argmax(dim=-1, keepdim=True)
        said.append(tokens)
    eos = model.eos_token_id
    ended = [row[: [*row, eos].index(eos)] for row in torch.cat(said, dim=1).tolist()]
    return [last_word(text) for text in model.trained.tokenizer.batch_decode(ended, skip_special_tokens=True)]


def patch_checkpoints(checkpoints: Sequence[str], data: Path, questions: int) -> dict[str, dict[str, Numbers]]:
    """By patch the shares of "other" and "own" answers over checkpoints and pairs. UserError: there are no pairs."""
    records = load_records(data)[:questions]
    if not records:
        raise UserError(f"{data}: no questions to patch (--questions {questions})")
    each = []
    for checkpoint in checkpoints:
        model = Coconut.from_pretrained(checkpoint).eval()
        pairs = pairs_of(model, records)
        if not pairs:
            raise UserError(f"{data}: no two of the first {questions} questions have the same length and different answers")
        each.append(answers_by_patch(model, pairs))
        get_logger().info(f"{checkpoint}: {len(pairs)} pairs")
    if len({(tuple(one), len(one["nothing"])) for one in each}) > 1:
        raise UserError("the checkpoints have different numbers of thoughts or layers, or tokenizers: patch them one by one")
    sides = ("other", "own")
    return {
        about: {side: numbers(np.array([one[about][:, place] for one in each])) for place, side in enumerate(sides)}
        for about in each[0]
    }


def table(found: dict[str, dict[str, Numbers]]) -> str:
    rows = []
    for about, one in found.items():
        seeds = ", ".join(f"{value:.0f}" for value in one["other"]["seeds"])
        rows.append((about, str(one["other"]["questions"]), *map(with_interval, one.values()), seeds))
    return markdown(COLUMNS, rows)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.patching", __doc__)
    parser.add_argument("checkpoints", nargs="+", help="of one recipe and several seeds")
    parser.add_argument("--data", type=Path, default=Path("data/prosqa_quick_test.json"))
    parser.add_argument("--questions", type=natural, default=500)
    parser.add_argument("--out", type=Path, default=Path("results/patching"))
    arguments = parser.parse_args(given)
    found = patch_checkpoints(arguments.checkpoints, arguments.data, arguments.questions)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "patching.json", {"checkpoints": arguments.checkpoints, "patches": found})
    write_text(arguments.out / "patching.md", table(found) + "\n")
    get_logger().info(table(found))


if __name__ == "__main__":
    main()
