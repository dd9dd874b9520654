"""Prompts for models tried without training, and one answer from several branches."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from experiments.answers.benchmarks import NO_ANSWER, OPTIONS, Same, find_benchmark
from systems.tokens import in_chat_template

# --- prompts ---


def user_message(benchmark: str, question: str, choices: Sequence[str] = ()) -> str:
    """What a chat model is asked: the question, its options with their letters, and the form of the answer."""
    options = [f"{letter}. {choice}" for letter, choice in zip(OPTIONS, choices, strict=False)]
    return "\n".join([question.strip(), *options, "", find_benchmark(benchmark).kind.request])


HARMONY_ANALYSIS = "<|channel|>analysis<|message|>"


def message_ids(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Token ids of a user message in the tokenizer's chat template with generation prompt; without a template, and a newline.

    In the harmony format of gpt-oss they end where the analysis channel begins, as thoughts stand there.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer(message + "\n")["input_ids"])
    text = in_chat_template(tokenizer, message)
    harmony = {"<|channel|>", "<|message|>"} <= tokenizer.get_vocab().keys()
    return list(tokenizer(text + HARMONY_ANALYSIS if harmony else text, add_special_tokens=False)["input_ids"])


# --- from branches to an answer ---


class Vote(NamedTuple):
    """What branches say together.

    answer: in the spelling of the first branch that gave it; NO_ANSWER if no branch has an answer.
    votes: branches that gave it. confidence: its share of the weights of all branches, 0..1; 0 for NO_ANSWER.
    """

    answer: str
    votes: int
    confidence: float


# The logarithm of a branch's weight, from its record and from the norm of its noise by the norm of the thought.
AGGREGATIONS: dict[str, Callable[[Mapping[str, Any], float], float]] = {
    "majority": lambda branch, noise: 0.0,
    "probability": lambda branch, noise: branch["log_probability"] / branch["new_tokens"],  # geometric mean of the tokens'
    "probability_sum": lambda branch, noise: branch["log_probability"],  # favours short texts (NoisyCoconut, arXiv 2605.08221)
    "noise_weighted": lambda branch, noise: -math.log1p(noise),  # 1 / (1 + noise): a half where it is as large as the thought
}


def vote(answers: Sequence[str], log_weights: Sequence[float], same: Same = operator.eq) -> Vote:
    """The answer with the largest sum of weights; among tied ones that of the earliest branch. NO_ANSWER loses against any.

    log_weights: natural logarithms, one for each answer.
    same: when two answers count as one (`functools.partial(same_answer, "math")`); each joins the first group that it fits.
    ValueError: no branches; a logarithm above 0 or none at all (nan), as a model that computes no numbers gives it.
    """
    if not answers:
        raise ValueError("a vote needs at least one branch")
    if not all(weight <= 0 for weight in log_weights):
        raise ValueError("logarithms of probabilities and weights must be at most 0")
    groups: dict[str, list[float]] = {}
    for answer, weight in zip(answers, log_weights, strict=True):
        if answer != NO_ANSWER:
            groups.setdefault(next((one for one in groups if one == answer or same(answer, one)), answer), []).append(weight)
    if not groups:
        return Vote(NO_ANSWER, 0, 0.0)
    masses = {answer: _log_sum(weights) for answer, weights in groups.items()}
    winner = max(masses, key=lambda answer: masses[answer])  # the first of the largest
    whole = _log_sum(log_weights)
    share = 0.0 if math.isinf(whole) else min(1.0, math.exp(masses[winner] - whole))
    return Vote(winner, len(groups[winner]), share)


def _log_sum(logarithms: Sequence[float]) -> float:
    """log of the sum of the exponentials; the same whatever their order."""
    largest = max(logarithms)
    return largest if math.isinf(largest) else largest + math.log(math.fsum(math.exp(one - largest) for one in logarithms))


LEVELS = {5: "unanimous", 4: "strong", 3: "moderate", 2: "minimal"}  # agreement among five branches (NoisyCoconut)


def agreement_level(votes: int, branches: int) -> str | None:
    """ "unanimous", "strong", "moderate" or "minimal" among five branches; None otherwise."""
    return LEVELS.get(votes) if branches == 5 else None
