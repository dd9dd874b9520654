"""The questions of the benchmarks, from the hub or from local files, in one form.

A local file takes the place of a data set on the hub: a JSON list or one JSON object a line, either records ({"question",
"answer"}, for letters also "choices") or rows as on the hub. ProsQA and ProntoQA are always local files of records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset import half_character
from experiments.answers.judging import OPTIONS, answer_kind, canonical_answer, extract_answer
from preprocessing.common import parse_rows
from utils import UserError, read_text

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkQuestion:
    """index: place in the whole data set. gold: canonical (see answers). choices: the options in the order of their letters,
    empty where there are none or where the question's text holds them. steps: how many reasoning steps its record has, None if
    it has no such field. subject: as its row names it (MMLU, GPQA)."""

    benchmark: str
    index: int
    question: str
    gold: str
    choices: tuple[str, ...] = ()
    steps: int | None = None
    subject: str | None = None


class Source(NamedTuple):
    """A data set on the hub: its id, configuration (None: it has one alone) and split."""

    hub: str
    subset: str | None
    split: str = "test"


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main"),
    "gsm-symbolic": Source("apple/GSM-Symbolic", "main"),
    "mmlu": Source("cais/mmlu", "all"),
    "math": Source("nlile/hendrycks-MATH-benchmark", None),
    "gpqa": Source("Idavidrein/gpqa", "gpqa_diamond", "train"),  # its one split has this name
}


def load_questions(
    benchmark: str,
    path: str | Path | None = None,
    subset: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[BenchmarkQuestion]:
    """`limit` questions (all if None) of a benchmark, in the order of their index: the first ones of the file `path`, or
    else drawn with the seed from the hub, whose data sets may be ordered by subject.

    subset, split: of the data set on the hub, in place of those in SOURCES (`p1` of gsm-symbolic, `gpqa_main`).
    seed: also of the order of GPQA's options, which is drawn for each question from (seed, index) alone.
    UserError: an unknown benchmark, a file that is missing or malformed, a data set that cannot be had; always one line.
    """
    answer_kind(benchmark)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, is {limit}")
    if path is None:
        source, rows = _hub_rows(benchmark, subset, split)
    else:
        source, rows = str(path), _file_rows(Path(path))
    chosen: Sequence[int] = range(len(rows))[:limit]
    if path is None and len(chosen) < len(rows):
        chosen = sorted(np.random.default_rng(seed).choice(len(rows), len(chosen), replace=False).tolist())
    numbered = iter(chosen)

    def parse(row: Row) -> Any:
        return _question(benchmark, next(numbered), row, seed)

    try:
        questions: list[Any] = parse_rows(source, "row", [rows[index] for index in chosen], parse)
    except ValueError as error:
        raise UserError(str(error)) from None
    return questions


def selection(path: str | Path | None, limit: int | None, seed: int) -> str:
    """How `load_questions` chooses, for the results."""
    if limit is None:
        return "all"
    return f"the first {limit}" if path is not None else f"{limit} drawn with seed {seed}"


# --- where rows come from ---


def _hub_rows(benchmark: str, subset: str | None, split: str | None) -> tuple[str, list[Row]]:
    if benchmark not in SOURCES:
        hint = f"python preprocessing/{benchmark}.py makes data/{benchmark}_test.json"
        raise UserError(f"{benchmark}: not on the hub; give a file of records ({hint})")
    import datasets

    source = SOURCES[benchmark]
    names = [name for name in (source.hub, subset or source.subset) if name]
    try:
        rows = datasets.load_dataset(*names, split=split or source.split)
    except Exception as error:  # whatever goes wrong between here and the hub
        raise UserError(_hub_problem(source.hub, error)) from None
    return " ".join(names), list(rows)


def _hub_problem(hub: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "gated" in f"{type(error).__name__} {reason}".lower():
        page = f"https://huggingface.co/datasets/{hub}"
        return f"{hub}: access is gated; accept the terms at {page} and run `hf auth login`, or give a local JSON file"
    return f"cannot load {hub}: {reason or type(error).__name__}; a local JSON file can be given in its place"


def _file_rows(path: Path) -> list[Row]:
    """The rows of a JSON list, or of a file with one JSON object a line. UserError: it is neither."""
    text = read_text(path).removeprefix("\ufeff").strip()
    if text.startswith("["):
        return list(_json(text, str(path)))
    # Not splitlines: it also cuts at characters that stand inside a question.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_json(line, f"{path}: line {number}") for number, line in lines]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of more than 4,300 digits
        raise UserError(f"{where}: not JSON ({error}); expected a list of records or one a line") from None


# --- rows ---


def _question(benchmark: str, index: int, row: object, seed: int) -> BenchmarkQuestion:
    """ValueError: the row is no question of this benchmark."""
    if not isinstance(row, dict):
        raise ValueError("expected an object")
    question, gold, choices = _READERS[benchmark](row, np.random.default_rng((seed, index)))
    right = canonical_answer(benchmark, gold)
    return BenchmarkQuestion(benchmark, index, question, right, tuple(choices), _steps(row), _subject(row))


def _subject(row: Row) -> str | None:
    found = row.get("subject") or row.get("Subdomain")
    return found if isinstance(found, str) and half_character(found) is None else None


def _steps(row: Row) -> int | None:
    """As `dataset` counts them: an empty rationale is no step."""
    steps = row.get("steps")
    if steps is None:
        return None
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError("field 'steps': expected a list of texts")
    return sum(bool(step.strip()) for step in steps)


Parts = tuple[str, str, list[str]]  # question, bare gold answer, options


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        fields = ", ".join(sorted(map(str, row))) or "none"
        raise ValueError(f"field {field!r}: expected a text that is not empty (fields here: {fields})")
    if problem := half_character(value):
        raise ValueError(f"field {field!r} {problem}")
    return value.strip()


def _plain(row: Row, generator: np.random.Generator) -> Parts:
    return _text(row, "question"), _text(row, "answer"), []


def _worded(row: Row, generator: np.random.Generator) -> Parts:
    """A record's answer is the number, a row's on the hub a solution that ends in #### and the number."""
    answer = _text(row, "answer")
    return _text(row, "question"), extract_answer("gsm8k", answer) if "####" in answer else answer, []


def _problem(row: Row, generator: np.random.Generator) -> Parts:
    """A row on the hub has `problem` in place of `question`, and perhaps no answer but in the box of its solution."""
    question = _text(row, "problem" if "problem" in row else "question")
    return question, _text(row, "answer") if row.get("answer") else extract_answer("math", _text(row, "solution")), []


def _multiple_choice(row: Row, generator: np.random.Generator) -> Parts:
    """The answer is a letter, an index from 0 (as on the hub), or the text of an option."""
    choices, answer = _choices(row), row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise ValueError(f"field 'answer': {answer} is no index of the {len(choices)} choices")
        return _text(row, "question"), OPTIONS[answer], choices
    text = _text(row, "answer")
    return _text(row, "question"), OPTIONS[choices.index(text)] if text in choices else text, choices


def _choices(row: Row) -> list[str]:
    choices = row.get("choices", [])
    if (
        not isinstance(choices, list)
        or len(choices) not in (0, len(OPTIONS))
        or not all(isinstance(one, str) and half_character(one) is None for one in choices)
    ):
        raise ValueError(f"field 'choices': expected a list of {len(OPTIONS)} texts of whole characters")
    return [choice.strip() for choice in choices]


_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _shuffled(row: Row, generator: np.random.Generator) -> Parts:
    """On the hub the right answer has its own field; options are put in random order. Records stay as they are."""
    if "Question" not in row:
        return _multiple_choice(row, generator)
    answers, order = [_text(row, field) for field in _GPQA], generator.permutation(len(_GPQA)).tolist()
    return _text(row, "Question"), OPTIONS[order.index(0)], [answers[place] for place in order]


_READERS: dict[str, Callable[[Row, np.random.Generator], Parts]] = {
    "gsm8k": _worded,
    "gsm-symbolic": _worded,
    "mmlu": _multiple_choice,
    "math": _problem,
    "gpqa": _shuffled,
    "prosqa": _plain,
    "prontoqa": _plain,
}
