"""Thoughts through the language-model head (logit lens): does a thought say the step that it stands for?"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from experiments.probes.base import Probed, Series, empty

STEPS = 4  # of a question that are looked at
OPERATOR = re.compile(r"<<[^>]*?\d\s*([-+*/])")  # the first one between two numbers


def decoded(probed: Probed) -> Series:
    """For each thought and step whether the thought's likeliest token ends that step, in percent.

    What ends a step is its last token with a letter or digit, such as "is a lempus." or "42": what the step finds out.
    """
    tokenizer = probed.evaluator.tokenizer
    steps = probed.dataset["steps_tokenized"]
    ends = [[finding(step, tokenizer) for step in own[:STEPS]] for own in steps]
    most = max(map(len, ends), default=0)
    found = {_name(thought, step): empty(len(ends)) for thought in range(probed.thoughts) for step in range(most)}
    operators = [[_operator(step) for step in own[:STEPS]] for own in probed.dataset["steps"]]
    for places, states in probed.states():
        said = probed.model.project(states).argmax(dim=-1).tolist()  # (B, N)
        for place, tokens in zip(places, said, strict=True):
            for thought, token in enumerate(tokens):
                for step, end in enumerate(ends[place]):
                    found[_name(thought, step)][place] = 100.0 * (token == end)
                for step, operator in enumerate(operators[place]):
                    if operator is not None:
                        name = f"thought {thought + 1} says the operator of step {step + 1}"
                        right = str(tokenizer.decode([token])).strip() == operator
                        found.setdefault(name, empty(len(ends)))[place] = 100.0 * right
    return found


def _operator(step: str) -> str | None:
    """Of a step such as <<3*4=12>>; None of words."""
    found = OPERATOR.search(step)
    return found[1] if found else None


def _name(thought: int, step: int) -> str:
    return f"thought {thought + 1} says what step {step + 1} finds"


def finding(step: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The last token of a step with a letter or digit; None where there is none."""
    return next((token for token in reversed(step) if any(map(str.isalnum, str(tokenizer.decode([token]))))), None)
