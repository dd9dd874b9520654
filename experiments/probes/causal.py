"""Does the answer depend on what the thoughts hold? Log-odds of the right answer when other thoughts stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.probes.base import Probed, Series, empty
from methods import EvalLatents
from thoughts import Intervention, ThoughtInterventions, gather_thoughts

CLEAN = "as they are"
SINGLE_THOUGHT = " for thought "


@dataclass(frozen=True)
class Paths:
    """The thoughts (Q, N, D) of all questions."""

    own: Tensor

    def shuffled(self, question: int) -> Tensor:
        """A question's thoughts in another order, none in its own place."""
        count = self.own.shape[1]
        shift = int(np.random.default_rng(question).integers(1, count)) if count > 1 else 0
        return self.own[question].roll(shift, dims=0)


# What stands in the thoughts' place: of all paths and a question's place, thoughts (N, D).
STEADS: dict[str, Callable[[Paths, int], Tensor]] = {
    "zero": lambda paths, place: torch.zeros_like(paths.own[place]),
    "the mean thought": lambda paths, place: paths.own.mean(dim=(0, 1)).expand_as(paths.own[place]),
    "the mean of that step": lambda paths, place: paths.own.mean(dim=0),
    "another question's": lambda paths, place: paths.own[place - 1],
    "another order": Paths.shuffled,
}
SINGLE = ("zero", "another question's")  # also put into the place of single thoughts


@torch.no_grad()
def log_odds(probed: Probed) -> Series:
    """For each condition the log-odds (nats) of the question's answer against the other option's, as the answer text.

    Without another option (`neg_target`) it is the next question's answer that differs.
    """
    answers = _answers(probed)
    found = {CLEAN: _log_odds(probed, answers, "max")}
    for count in range(probed.thoughts):
        found[f"{count} thoughts"] = _log_odds(probed, answers, count)
    if not probed.thoughts or probed.evaluator.ids.thought != probed.evaluator.ids.latent:
        return found  # pauses are tokens: nothing is fed back that could be replaced
    paths = _paths(probed)
    for name, changes in _conditions(paths):
        found[name] = _log_odds(probed, answers, "max", changes)
    return found


def causal(probed: Probed) -> Series:
    """How far each condition moves the log-odds (nats) of the answer."""
    odds = probed.once(log_odds)
    return {f"log-odds, {CLEAN}": odds[CLEAN]} | {
        f"change with {name}": values - odds[CLEAN] for name, values in odds.items() if name != CLEAN
    }


def confidence(probed: Probed) -> Series:
    """For each condition how often the right option is the likelier one, how sure the model is of its choice, and the Brier
    score (0 is right and sure, 25 is undecided), in percent. Single thoughts are left to `causal`."""
    found: Series = {}
    for name, odds in probed.once(log_odds).items():
        if SINGLE_THOUGHT in name:
            continue
        right = 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
        found[f"{name}: right"] = 100.0 * (odds > 0)
        found[f"{name}: sure"] = 100.0 * np.maximum(right, 1 - right)
        found[f"{name}: Brier"] = 100.0 * (1 - right) ** 2
    return found


def _conditions(paths: Paths) -> Iterator[tuple[str, Callable[[int], Intervention]]]:
    """By name what is done to the thoughts of the question in a place."""

    def replaced(kind: str, thoughts: Sequence[int], kept: Sequence[int] = ()) -> Callable[[int], Intervention]:
        def change(place: int) -> Intervention:
            stead, own = STEADS[kind](paths, place), paths.own[place]
            changed = {number + 1: stead[number] for number in thoughts}
            return Intervention(replacements=changed | {number + 1: own[number] for number in kept})

        return change

    count = paths.own.shape[1]
    for kind in STEADS:
        yield f"{kind} for all thoughts", replaced(kind, range(count))
    for kind in SINGLE:
        for number in range(count):
            yield f"{kind}{SINGLE_THOUGHT}{number + 1}, later ones recomputed", replaced(kind, [number])
            if number < count - 1:
                kept = range(number + 1, count)
                yield f"{kind}{SINGLE_THOUGHT}{number + 1}, later ones as they were", replaced(kind, [number], kept)


def _paths(probed: Probed) -> Paths:
    own = []
    for _, batch, thought in probed.batches():
        own.append(gather_thoughts(probed.think(batch).inputs_embeds, thought))
    return Paths(torch.cat(own))


def _answers(probed: Probed) -> list[tuple[list[int], list[int]]]:
    """Of each question the tokens of its answer and of the other one."""
    tokenizer, records = probed.evaluator.tokenizer, probed.records()
    right = probed.dataset["answer_tokenized"]
    texts = [_other_option(record) for record in records]
    others = []
    for place, (record, text) in enumerate(zip(records, texts, strict=True)):
        if text is None:
            following = [*range(place + 1, len(records)), *range(place)]
            text = next((records[one]["answer"] for one in following if records[one]["answer"] != record["answer"]), "")
        others.append([*tokenizer("### " + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    return list(zip(right, others, strict=True))


def _other_option(record: dict[str, Any]) -> str | None:
    if not {"target", "neg_target", "idx_to_symbol"} <= record.keys():
        return None
    target, other = (record["idx_to_symbol"][record[key]] for key in ("target", "neg_target"))
    return str(record["answer"]).replace(target, other)


@torch.no_grad()
def _log_odds(
    probed: Probed,
    answers: Sequence[tuple[list[int], list[int]]],
    latents: EvalLatents,
    changes: Callable[[int], Intervention] | None = None,
) -> np.ndarray:
    """(Q,): log-probability of the right answer after so many thoughts minus that of the other one."""
    model, found = probed.model, empty(len(answers))
    for places, batch, thought in probed.batches(latents if probed.thoughts else "gold"):
        said = [answers[place][side] for side in (0, 1) for place in places]  # 2 B rows
        longest = max(map(len, said))
        tokens = torch.tensor([[*one, *[0] * (longest - len(one))] for one in said], device=thought.device)
        real = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in said], device=thought.device)
        prompts = {name: batch[name].repeat(2, 1) for name in ("input_ids", "attention_mask", "position_ids")}
        after = torch.arange(1, longest + 1, device=thought.device)
        latent = torch.cat([thought.repeat(2, 1), torch.zeros_like(real, dtype=torch.bool)], dim=1)
        rows = [changes(place) for place in places] * 2 if changes is not None else None
        thinking = model.think(
            torch.cat([prompts["input_ids"], tokens], dim=1),
            torch.cat([prompts["attention_mask"], real], dim=1),
            torch.cat([prompts["position_ids"], prompts["position_ids"][:, -1:] + after], dim=1),
            interventions=None if rows is None else ThoughtInterventions(latent, rows, places * 2, [0] * len(rows)),
        )
        chances = F.log_softmax(model.project(thinking.hidden[:, -longest - 1 : -1]).float(), dim=-1)
        scores = (chances.gather(2, tokens[..., None]).squeeze(2) * real).sum(dim=1)  # (2 B,)
        right, other = scores.cpu().double().chunk(2)
        found[places] = (right - other).numpy()
    return found
