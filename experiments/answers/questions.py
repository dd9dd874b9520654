"""The questions of the benchmarks, from the hub or from local files, in one form.

A local file takes the place of a data set on the hub: a JSON list or one JSON object a line, either records ({"question",
"answer"}, for letters also "choices") or rows as on the hub. ProsQA and ProntoQA are always local files of records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset import half_character
from experiments.answers.benchmarks import Row, canonical_answer, find_benchmark
from preprocessing.common import parse_rows, read_rows
from utils import UserError


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

    subset, split: of the data set on the hub, in place of those of its row (`p1` of gsm-symbolic, `gpqa_main`).
    seed: also of the order of GPQA's options, which is drawn for each question from (seed, index) alone.
    UserError: an unknown benchmark, a file that is missing or malformed, a data set that cannot be had; always one line.
    """
    find_benchmark(benchmark)
    if path is None:
        source, rows = _hub_rows(benchmark, subset, split)
    else:
        source, rows = str(path), read_rows(Path(path))
    chosen: Sequence[int] = range(len(rows))[:limit]
    if path is None and len(chosen) < len(rows):
        chosen = sorted(np.random.default_rng(seed).choice(len(rows), len(chosen), replace=False).tolist())

    def parse(numbered: tuple[int, Row]) -> Any:
        return _question(benchmark, *numbered, seed)

    questions: list[Any] = parse_rows(source, "row", [(index, rows[index]) for index in chosen], parse)
    return questions


def selection(path: str | Path | None, limit: int | None, seed: int) -> str:
    """How `load_questions` chooses, for the results."""
    if limit is None:
        return "all"
    return f"the first {limit}" if path is not None else f"{limit} drawn with seed {seed}"


# --- where rows come from ---


def _hub_rows(benchmark: str, subset: str | None, split: str | None) -> tuple[str, list[Row]]:
    source = find_benchmark(benchmark).source
    if source is None:
        hint = f"python preprocessing/{benchmark}.py makes data/{benchmark}_test.json"
        raise UserError(f"{benchmark}: not on the hub; give a file of records ({hint})")
    import datasets

    names = [name for name in (source.hub, subset or source.subset) if name]
    try:
        rows = datasets.load_dataset(*names, split=split or source.split)
    except Exception as error:  # whatever goes wrong between here and the hub
        reason = " ".join(str(error).split())
        if "gated" in f"{type(error).__name__} {reason}".lower():
            terms = f"accept the terms at https://huggingface.co/datasets/{source.hub} and run `hf auth login`"
            raise UserError(f"{source.hub}: access is gated; {terms}, or give a local JSON file") from None
        problem = f"cannot load {source.hub}: {reason or type(error).__name__}"
        raise UserError(f"{problem}; a local JSON file can be given in its place") from None
    return " ".join(names), list(rows)


# --- rows ---


def _question(benchmark: str, index: int, row: object, seed: int) -> BenchmarkQuestion:
    """ValueError: the row is no question of this benchmark."""
    if not isinstance(row, dict):
        raise ValueError("expected an object")
    question, gold, choices = find_benchmark(benchmark).reader(row, np.random.default_rng((seed, index)))
    subject = row.get("subject") or row.get("Subdomain")
    named = subject if isinstance(subject, str) and half_character(subject) is None else None
    right = canonical_answer(benchmark, gold)
    return BenchmarkQuestion(benchmark, index, question, right, tuple(choices), _steps(row), named)


def _steps(row: Row) -> int | None:
    """As `dataset` counts them: an empty rationale is no step."""
    steps = row.get("steps")
    if steps is None:
        return None
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError("field 'steps': expected a list of texts")
    return sum(bool(step.strip()) for step in steps)
