"""The table of one run over several test files."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_json

from experiments.out_of_distribution import table
from preprocessing.prosqa import chain_records, prosqa_records
from systems.writing import append_jsonl
from utils import UserError


def write_evaluation(run: Path, file: Path, correct: list[bool], **asked: int) -> None:
    place = run / "eval" / f"{file.stem}-run-checkpoint_1"
    place.mkdir(parents=True)
    scores = {"accuracy": sum(correct) / len(correct), "low": 0.1, "high": 0.9, "wrote_steps": 0.0}
    fixed = {f"{key}_fixed": value for key, value in {**scores, "accuracy": 0.25}.items()}
    append_jsonl(
        place / "metrics.jsonl", {"kind": "evaluation", "val_path": str(file), "questions": 4, **asked, **scores, **fixed}
    )
    for idx, right in enumerate(correct):
        append_jsonl(place / "predictions_1.jsonl", {"idx": idx, "correct": right})


def test_both_questions_of_a_graph_count_where_a_file_has_pairs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pairs = write_json(tmp_path / "pairs.json", prosqa_records(4, 0, "test", shape="dag"))
    single = write_json(tmp_path / "single.json", chain_records(4, 0, "test"))
    write_evaluation(run, pairs, [True, True, False, True])
    write_evaluation(run, single, [True, True, False, True], eval_latents=8)  # as SETTINGS of the script may ask
    first, second = table(run, [pairs, single]).splitlines()[2:]
    assert "| 4 | 75.0% (10.0% to 90.0%) | 25.0% (10.0% to 90.0%) | 100.0% | 50.0% |" in first
    assert second.endswith("| 100.0% |  |")


def test_a_file_without_an_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval: no evaluation of x; run.py with only_eval=true makes one"):
        table(tmp_path, [tmp_path / "x.json"])
