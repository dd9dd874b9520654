"""Prompts for models tried without training, and one answer from several branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from experiments.answers.benchmarks import NO_ANSWER, OPTIONS, Same, equal, find_benchmark
from generation import MAX_N_LATENT
from systems.models import LatentIds
from systems.tokens import in_chat_template
from utils import UserError

# --- prompts ---


def user_message(benchmark: str, question: str, choices: Sequence[str] = ()) -> str:
    """What a chat model is asked: the question, its options with their letters, and the form of the answer."""
    options = [f"{letter}. {choice}" for letter, choice in zip(OPTIONS, choices, strict=False)]
    return "\n".join([question.strip(), *options, "", find_benchmark(benchmark).kind.request])


def build_prompt(tokenizer: PreTrainedTokenizerBase, ids: LatentIds, message: str, n_latents: int = MAX_N_LATENT) -> list[int]:
    """Token ids: the user message in the tokenizer's chat template with generation prompt, then the latents in their markers.

    Without a template the message and a newline. In the harmony format of gpt-oss the latents stand at the beginning of the
    analysis channel. UserError: the message itself holds one of the markers.
    """
    text = _templated(tokenizer, message)
    prompt = list(tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"])
    if not {ids.start, ids.latent, ids.end}.isdisjoint(prompt):
        raise UserError(f"the question holds a latent marker itself: {message[:60]!r}")
    return [*prompt, ids.start, *[ids.latent] * n_latents, ids.end]


HARMONY_ANALYSIS = "<|channel|>analysis<|message|>"


def _templated(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    if tokenizer.chat_template is None:
        return message + "\n"
    text = in_chat_template(tokenizer, message)
    harmony = {"<|channel|>", "<|message|>"} <= tokenizer.get_vocab().keys()
    return text + HARMONY_ANALYSIS if harmony else text


# --- from branches to an answer ---


class Vote(NamedTuple):
    """What K branches say together.

    answer: in the spelling of the first branch that gave it; NO_ANSWER if no branch has an answer.
    votes: branches that gave it. branches: K, those without an answer included.
    confidence: its share of the branches, or of their weights, 0..1; 0 for NO_ANSWER.
    """

    answer: str
    votes: int
    branches: int
    confidence: float


def majority_vote(answers: Sequence[str], same: Same = equal) -> Vote:
    """The most frequent answer; among tied ones that of the earliest branch. NO_ANSWER loses against any answer.

    same: when two answers count as one (`functools.partial(same_answer, "math")`); each joins the first group that it fits.
    ValueError: no branches.
    """
    return _vote(answers, [0.0] * len(answers), same)


def probability_vote(
    answers: Sequence[str],
    log_probabilities: Sequence[Sequence[float]],
    length_normalised: bool = True,
    same: Same = equal,
) -> Vote:
    """The answer with the largest probability mass; ties and NO_ANSWER as in `majority_vote`.

    log_probabilities: of each branch's sampled tokens, natural logarithms under the untempered model.
    length_normalised: a branch's mass is the geometric mean of its tokens' probabilities, otherwise their product, which
    favours short texts (NoisyCoconut, arXiv 2605.08221). A branch without tokens has no mass.
    ValueError: no branches, or not one sequence for each; a logarithm above 0 or none at all (nan).
    """
    if len(log_probabilities) != len(answers):
        raise ValueError(f"{len(answers)} answers, but log-probabilities of {len(log_probabilities)} branches")
    if not all(value <= 0 for branch in log_probabilities for value in branch):
        raise ValueError("log-probabilities must be at most 0")
    sums = [math.fsum(branch) if branch else -math.inf for branch in log_probabilities]
    divisors = [len(branch) if length_normalised else 1 for branch in log_probabilities]
    return _vote(answers, [total / max(divisor, 1) for total, divisor in zip(sums, divisors, strict=True)], same)


def noise_weighted_vote(answers: Sequence[str], noise: Sequence[float], same: Same = equal) -> Vote:
    """The answer with the largest sum of weights 1 / (1 + r); ties and NO_ANSWER as in `majority_vote`.

    noise: r of each branch, the norm of its noise relative to the norm of the hidden state (for `snr` that is 1 / scale). A
    branch without noise weighs 1, one whose noise is as large as the signal a half. ValueError: as above, or r is negative.
    """
    if len(noise) != len(answers):
        raise ValueError(f"{len(answers)} answers, but noise of {len(noise)} branches")
    if not all(value >= 0 for value in noise):
        raise ValueError("noise must be at least 0")
    return _vote(answers, [-math.log1p(value) for value in noise], same)


def _vote(answers: Sequence[str], log_weights: Sequence[float], same: Same) -> Vote:
    if not answers:
        raise ValueError("a vote needs at least one branch")
    groups: dict[str, list[float]] = {}
    for answer, weight in zip(answers, log_weights, strict=True):
        if answer != NO_ANSWER:
            groups.setdefault(next((one for one in groups if one == answer or same(answer, one)), answer), []).append(weight)
    if not groups:
        return Vote(NO_ANSWER, 0, len(answers), 0.0)
    masses = {answer: _log_sum(weights) for answer, weights in groups.items()}
    winner = max(masses, key=lambda answer: masses[answer])  # the first of the largest
    return Vote(winner, len(groups[winner]), len(answers), _share(masses[winner], _log_sum(log_weights)))


def _log_sum(logarithms: Sequence[float]) -> float:
    """log of the sum of the exponentials; the same whatever their order."""
    largest = max(logarithms)
    return largest if math.isinf(largest) else largest + math.log(math.fsum(math.exp(one - largest) for one in logarithms))


def _share(part: float, whole: float) -> float:
    return 0.0 if math.isinf(whole) else min(1.0, math.exp(part - whole))


# --- abstention ---

LEVELS = {5: "unanimous", 4: "strong", 3: "moderate", 2: "minimal"}  # agreement among five branches (NoisyCoconut)


class Coverage(NamedTuple):
    """Answering only where at least `threshold` branches agree: fractions of all questions and of the answered ones.

    accuracy is None where nothing is answered. level: a name for the threshold among five branches, else None.
    """

    threshold: int
    level: str | None
    answered: int
    correct: int
    coverage: float
    accuracy: float | None


def agreement_level(votes: int, branches: int) -> str | None:
    """ "unanimous", "strong", "moderate" or "minimal" among five branches; None otherwise."""
    return LEVELS.get(votes) if branches == 5 else None


def coverage_curve(votes: Sequence[Vote], correct: Sequence[bool]) -> list[Coverage]:
    """Accuracy and coverage for every threshold 1..K, each question judged by its vote; NO_ANSWER is never an answer.

    ValueError: no questions, not one judgement for each, or different numbers of branches.
    """
    if len({vote.branches for vote in votes}) != 1 or len(votes) != len(correct):
        raise ValueError("a curve needs at least one vote, a judgement for each, and the same number of branches in all")
    branches = votes[0].branches
    return [_coverage(threshold, branches, votes, correct) for threshold in range(1, branches + 1)]


def _coverage(threshold: int, branches: int, votes: Sequence[Vote], correct: Sequence[bool]) -> Coverage:
    judged = [right for vote, right in zip(votes, correct, strict=True) if vote.votes >= threshold]
    answered, right = len(judged), sum(judged)
    accuracy = right / answered if answered else None
    return Coverage(threshold, agreement_level(threshold, branches), answered, right, answered / len(votes), accuracy)
