"""Branches that vote, on a few questions with all details: what each said, how they are counted, where they agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from rich import box
from rich.table import Table

from experiments.answers.judging import AGGREGATIONS, agreement_level
from experiments.answers.questions import BenchmarkQuestion
from experiments.checks.stand_ins import RANDOM, RANDOM_SOURCE, QuickConfig, quick_questions, quick_subject
from experiments.noise.progress import Record
from experiments.noise.summary import JUDGE, coverage_table, summarise, summary_table
from experiments.noise.sweep import Answerer, conditions
from systems.metrics import show
from utils import Positive, UserError, get_logger

CHECKPOINT = Path("checkpoints/quick-coconut")  # of scripts/quickstart.sh
QUESTION_END = 90  # characters of a question that are shown: what is asked stands at its end
CHUNK = 16  # questions that are thought about at once
LEGEND = "behind the answers: log-probability of a branch's text; confidence of a vote. Diversity: also by the thoughts' norm"


class QuickBranchConfig(QuickConfig):
    """Keys of quick_branch_test.py."""

    num_questions: Positive | None = 8
    max_new_tokens: Positive = 64

    @model_validator(mode="before")
    @classmethod
    def _one_scale(cls, values: Any) -> Any:
        return {"noise_type": "gaussian_scaled", "noise_scales": 0.5, **values}


def with_quick_start(config: QuickBranchConfig) -> QuickBranchConfig:
    """Where no model is named: the quick start's checkpoint if it is there, else the random model; said in one line."""
    if config.model_id != RANDOM:
        return config
    questions = config.data_path or "made questions"
    if not CHECKPOINT.is_dir():
        get_logger().info(f"{CHECKPOINT} is not there (scripts/quickstart.sh): {RANDOM_SOURCE}, {questions}")
        return config
    get_logger().info(f"the quick start's {CHECKPOINT}, {questions}")
    return config.model_copy(update={"model_id": None, "load_model_path": str(CHECKPOINT)})


def show_branches(config: QuickBranchConfig, device: torch.device) -> None:
    """Answer all questions and show everything. UserError: all of them failed."""
    subject, questions = quick_subject(config, device), quick_questions(config)
    answerer = Answerer(config, subject, conditions(config), None)
    records = [one for begin in range(0, len(questions), CHUNK) for one in answerer.answer(questions[begin : begin + CHUNK])]
    if all(record["error"] is not None for record in records):
        raise UserError(f"all {len(records)} questions failed; the first with {records[0]['error']}")
    for question, record in zip(questions, records, strict=True):
        if record["error"] is None:  # what went wrong otherwise has been said
            show(question_table(question, record))
    get_logger().info(LEGEND)
    summary = summarise(records)
    show(summary_table(summary, f"{subject.source} on {len(questions)} questions of {config.benchmark}"))
    show(coverage_table(summary, "Answered only where so many branches agree"))


def question_table(question: BenchmarkQuestion, record: Record) -> Table:
    """A column for each condition: what its branches answer, what each way of counting makes of them, how far they part."""
    text = " ".join(question.question.split())
    text = text if len(text) <= QUESTION_END else f"... {text[-QUESTION_END:]}"
    outcomes: dict[str, Any] = record["conditions"]
    title = f"{question.index}: {text}  ({question.gold})"
    table = Table("", *outcomes, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    most = max(len(one["branches"]) for one in outcomes.values())
    names = [*(f"branch {number}" for number in range(most)), *(name.replace("_", " ") for name in AGGREGATIONS)]
    rows = zip([*names, "agreement", "diversity"], *(cells(one, most) for one in outcomes.values()), strict=True)
    for number, row in enumerate(rows, start=1):
        table.add_row(*row, end_section=number == most)
    return table


def cells(outcome: Mapping[str, Any], most: int) -> list[str]:
    """A column from top to bottom. most: branches that another condition may have."""
    marks = {True: "✓", False: "✗"}
    branches, paths, agreeing = outcome["branches"], outcome["diversity"], outcome[JUDGE]["votes"]
    votes = [outcome[name] for name in AGGREGATIONS]
    level = agreement_level(agreeing, len(branches))
    return [
        *(f"{marks[one['correct']]} {one['answer']} {one['log_probability']:.2f}" for one in branches),
        *[""] * (most - len(branches)),
        *(f"{marks[one['correct']]} {one['answer']} {one['confidence']:.2f}" for one in votes),
        f"{agreeing} of {len(branches)}" + (f", {level}" if level else ""),
        "" if paths is None or paths["diversity"] is None else f"{paths['diversity']:.3g} ({paths['normalised']:.3g})",
    ]
