"""Does the answer depend on what the thoughts hold? Log-odds of the right answer when other thoughts stand in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.probes.base import Probed, Series, empty
from methods import EvalLatents
from thoughts import Intervention, ThoughtInterventions, gather_thoughts

CLEAN = "as they are"
SINGLE_THOUGHT = " for thought "
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
    own = [gather_thoughts(probed.think(batch).inputs_embeds, thought) for _, batch, thought in probed.batches()]
    for name, changes in _conditions(torch.cat(own)):
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


def _conditions(own: Tensor) -> Iterator[tuple[str, dict[int, Tensor]]]:
    """By name the thoughts that are replaced, under their numbers from 1, each (Q, D). own: the thoughts (Q, N, D)."""
    steads, count = _steads(own), own.shape[1]
    for kind, stead in steads.items():
        yield f"{kind} for all thoughts", {number: stead[:, number - 1] for number in range(1, count + 1)}
    for kind in SINGLE:
        for number in range(1, count + 1):
            replaced = {number: steads[kind][:, number - 1]}
            yield f"{kind}{SINGLE_THOUGHT}{number}, later ones recomputed", replaced
            if number < count:
                kept = {later: own[:, later - 1] for later in range(number + 1, count + 1)}
                yield f"{kind}{SINGLE_THOUGHT}{number}, later ones as they were", replaced | kept


def _steads(own: Tensor) -> dict[str, Tensor]:
    """By name what stands in the place of the thoughts (Q, N, D), in that shape."""
    shuffled = []
    for question, thoughts in enumerate(own):
        shift = int(np.random.default_rng(question).integers(1, len(thoughts))) if len(thoughts) > 1 else 0
        shuffled.append(thoughts.roll(shift, dims=0))  # none stays in its own place
    return {
        "zero": torch.zeros_like(own),
        "the mean thought": own.mean(dim=(0, 1)).expand_as(own),
        "the mean of that step": own.mean(dim=0).expand_as(own),
        "another question's": own.roll(1, dims=0),
        "another order": torch.stack(shuffled),
    }


def _answers(probed: Probed) -> list[tuple[list[int], list[int]]]:
    """Of each question the tokens of its answer and of the other one."""
    tokenizer, records = probed.evaluator.tokenizer, probed.records()
    others = []
    for place, record in enumerate(records):
        answer = str(record["answer"])
        if {"target", "neg_target", "idx_to_symbol"} <= record.keys():
            target, other = (record["idx_to_symbol"][record[key]] for key in ("target", "neg_target"))
            text = answer.replace(target, other)
        else:
            following = [*records[place + 1 :], *records[:place]]
            text = next((one["answer"] for one in following if one["answer"] != answer), "")
        others.append([*tokenizer("### " + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    return list(zip(probed.dataset["answer_tokenized"], others, strict=True))


@torch.no_grad()
def _log_odds(
    probed: Probed,
    answers: Sequence[tuple[list[int], list[int]]],
    latents: EvalLatents,
    changes: dict[int, Tensor] | None = None,
) -> np.ndarray:
    """(Q,): log-probability of the right answer after so many thoughts minus that of the other one."""
    found = empty(len(answers))
    for places, batch, thought in probed.batches(latents if probed.thoughts else "gold"):
        said = [answers[place][side] for side in (0, 1) for place in places]  # 2 B rows
        longest = max(map(len, said))
        tokens = torch.tensor([[*one, *[0] * (longest - len(one))] for one in said], device=thought.device)
        real = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in said], device=thought.device)
        positions = batch["position_ids"][:, -1:].repeat(2, 1) + torch.arange(1, longest + 1, device=thought.device)
        after = {"input_ids": tokens, "attention_mask": real, "position_ids": positions}
        inputs = {name: torch.cat([batch[name].repeat(2, 1), columns], dim=1) for name, columns in after.items()}
        latent = F.pad(thought.repeat(2, 1), (0, longest))
        rows = [Intervention(replacements={n: stead[place] for n, stead in (changes or {}).items()}) for place in places] * 2
        replaced = ThoughtInterventions(latent, rows, places * 2, [0] * len(rows)) if changes else None
        hidden = probed.think(inputs, replaced).hidden
        chances = F.log_softmax(probed.model.project(hidden[:, -longest - 1 : -1]).float(), dim=-1)
        scores = (chances.gather(2, tokens[..., None]).squeeze(2) * real).sum(dim=1)  # (2 B,)
        right, other = scores.cpu().double().chunk(2)
        found[places] = (right - other).numpy()
    return found
