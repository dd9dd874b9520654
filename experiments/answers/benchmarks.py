"""The benchmarks: one row of BENCHMARKS says where the questions come from and how they are read, asked and judged.

Canonical answers: numbers "1234", "-3", "0.5", "2/3" (a finite decimal where there is one, else a reduced fraction); letters
"A" to "D"; "True" and "False"; "Tom is a lempus."; LaTeX in one spelling (`expressions.canonical_latex`). What a text leaves
open is NO_ANSWER.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dataset import half_character
from experiments.answers.expressions import canonical_latex, same_latex, whole_number
from experiments.answers.extraction import (
    canonical_concept,
    canonical_letter,
    canonical_truth,
    extract_concept,
    extract_latex,
    extract_letter,
    extract_number,
    extract_truth,
    same_concept,
)
from utils import UserError

NO_ANSWER = "NO_ANSWER_FOUND"
OPTIONS = "ABCD"
Row = dict[str, Any]
Same = Callable[[str, str], bool]
Parts = tuple[str, str, list[str]]  # question, bare gold answer, options
Reader = Callable[[Row, np.random.Generator], Parts]


def text_of(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        fields = ", ".join(sorted(map(str, row))) or "none"
        raise ValueError(f"field {field!r}: expected a text that is not empty (fields here: {fields})")
    if problem := half_character(value):
        raise ValueError(f"field {field!r} {problem}")
    return value.strip()


def read_record(row: Row, generator: np.random.Generator) -> Parts:
    return text_of(row, "question"), text_of(row, "answer"), []


def _worded(row: Row, generator: np.random.Generator) -> Parts:
    """A record's answer is the number, a row's on the hub a solution that ends in #### and the number."""
    answer = text_of(row, "answer")
    return text_of(row, "question"), (extract_number(answer) or NO_ANSWER) if "####" in answer else answer, []


def _hub_fields(questions: Sequence[str], answer: str) -> Reader:
    """Of rows on the hub whose question is in these fields, one after the other, and whose answer may be a number."""

    def read(row: Row, generator: np.random.Generator) -> Parts:
        if answer not in row:
            return read_record(row, generator)
        gold = row[answer]
        given = str(gold) if isinstance(gold, (int, float)) and not isinstance(gold, bool) else text_of(row, answer)
        return " ".join(text_of(row, field) for field in questions), given, []

    return read


def _problem(row: Row, generator: np.random.Generator) -> Parts:
    """A row on the hub has `problem` in place of `question`, and perhaps no answer but in the box of its solution."""
    question = text_of(row, "problem" if "problem" in row else "question")
    return question, text_of(row, "answer") if row.get("answer") else (extract_latex(text_of(row, "solution")) or NO_ANSWER), []


def _multiple_choice(row: Row, generator: np.random.Generator) -> Parts:
    """The answer is a letter, an index from 0 (as on the hub), or the text of an option."""
    given, answer = row.get("choices", []), row.get("answer")
    texts = isinstance(given, list) and all(isinstance(one, str) and half_character(one) is None for one in given)
    if not texts or len(given) not in (0, len(OPTIONS)):
        raise ValueError(f"field 'choices': expected a list of {len(OPTIONS)} texts of whole characters")
    choices = [choice.strip() for choice in given]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise ValueError(f"field 'answer': {answer} is no index of the {len(choices)} choices")
        return text_of(row, "question"), OPTIONS[answer], choices
    text = text_of(row, "answer")
    return text_of(row, "question"), OPTIONS[choices.index(text)] if text in choices else text, choices


_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _shuffled(row: Row, generator: np.random.Generator) -> Parts:
    """On the hub the right answer has its own field; options are put in random order. Records stay as they are."""
    if "Question" not in row:
        return _multiple_choice(row, generator)
    answers, order = [text_of(row, field) for field in _GPQA], generator.permutation(len(_GPQA)).tolist()
    return text_of(row, "Question"), OPTIONS[order.index(0)], [answers[place] for place in order]


@dataclass(frozen=True)
class AnswerKind:
    """What kind of answer a question has.

    request: what the prompt asks for. extract: text to answer. canonical: a bare answer in its one spelling, or None.
    same: whether a canonical answer agrees with a canonical gold answer. chance: accuracy of guessing among the options that
    the question names, in percent; None where it names none.
    """

    request: str
    extract: Callable[[str], str | None]
    canonical: Callable[[str], str | None]
    same: Same = operator.eq
    chance: float | None = None


_REASON = "Reason step by step. Then state the final answer on a line of its own, as"
NUMBER = AnswerKind(f"{_REASON} #### and the number, without units.", extract_number, whole_number)
LETTER = AnswerKind(f"{_REASON} #### and the letter of the right option.", extract_letter, canonical_letter, chance=25.0)
LATEX = AnswerKind(f"{_REASON} \\boxed{{...}}.", extract_latex, lambda text: canonical_latex(text) or None, same_latex)
CONCEPT = AnswerKind(
    f"{_REASON} #### and a sentence like: Tom is a lempus.", extract_concept, canonical_concept, same_concept, chance=50.0
)
TRUTH = AnswerKind(f"{_REASON} #### True or #### False.", extract_truth, canonical_truth, chance=50.0)


class Source(NamedTuple):
    """A data set on the hub: its id, configuration (None: it has one alone) and split."""

    hub: str
    subset: str | None
    split: str = "test"


@dataclass(frozen=True)
class Benchmark:
    """kind: of its answers. reader: a row, and a generator for the order of options, to (question, bare gold answer, options).
    source: on the hub; None: local files of records alone."""

    kind: AnswerKind
    reader: Reader = read_record
    source: Source | None = None


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(NUMBER, _worded, Source("openai/gsm8k", "main")),
    # math out of distribution; answers of gsm-hard may be decimals. SVAMP: all 1,000 questions, as CODI's protocol has them
    "gsm-hard": Benchmark(NUMBER, _hub_fields(("input",), "target"), Source("reasoning-machines/gsm-hard", None, "train")),
    "svamp": Benchmark(NUMBER, _hub_fields(("Body", "Question"), "Answer"), Source("ChilleD/SVAMP", None, "train+test")),
    "multiarith": Benchmark(NUMBER, _hub_fields(("question",), "final_ans"), Source("ChilleD/MultiArith", None)),
    "gsm-symbolic": Benchmark(NUMBER, _worded, Source("apple/GSM-Symbolic", "main")),
    "mmlu": Benchmark(LETTER, _multiple_choice, Source("cais/mmlu", "all")),
    "math": Benchmark(LATEX, _problem, Source("nlile/hendrycks-MATH-benchmark", None)),
    "gpqa": Benchmark(LETTER, _shuffled, Source("Idavidrein/gpqa", "gpqa_diamond", "train")),  # its one split has this name
    "prosqa": Benchmark(CONCEPT),
    "prontoqa": Benchmark(TRUTH),
}


def find_benchmark(name: str) -> Benchmark:
    """UserError: an unknown benchmark, with the nearest name."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(BENCHMARKS)}"
        raise UserError(f"unknown benchmark {name!r}; {hint}")
    return BENCHMARKS[name]


def extract_answer(benchmark: str, text: str) -> str:
    """The canonical final answer that a generated text states; NO_ANSWER if it states none."""
    return find_benchmark(benchmark).kind.extract(text) or NO_ANSWER


def canonical_answer(benchmark: str, answer: str) -> str:
    """A bare gold answer in its canonical spelling. ValueError: it is no such answer."""
    canonical = find_benchmark(benchmark).kind.canonical(answer)
    if canonical is None or answer == NO_ANSWER:
        raise ValueError(f"{answer!r} is no answer to a question of {benchmark}")
    return canonical


def same_answer(benchmark: str, given: str, gold: str) -> bool:
    """Whether an extracted answer agrees with the gold one; both canonical. NO_ANSWER agrees with nothing."""
    return given != NO_ANSWER and find_benchmark(benchmark).kind.same(given, gold)
