"""Which concept of a chain an answer names."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from conftest import write_json

from experiments import chain_answers
from systems.writing import append_jsonl
from utils import UserError

RECORD = {
    "question": "Every b is a c. Tom is an a. Every a is a b. Sam is an x. Every x is a y. Every y is a z. Is Tom a c or z?",
    "answer": "Tom is a c.",
    "steps": ["Tom is an a.", "Every a is a b.", "Every b is a c."],
    "idx_to_symbol": ["Tom", "Sam", "a", "b", "c", "x", "y", "z"],
}


def test_answers_are_told_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test_file = write_json(tmp_path / "chains_test.json", [RECORD] * 8)
    for name in ("chains_test-run-checkpoint_1", "others_test-run-checkpoint_1"):  # the newest one is on other questions
        place = tmp_path / "run" / "eval" / name
        place.mkdir(parents=True)
        append_jsonl(place / "metrics.jsonl", {"kind": "evaluation"})
        said = ["Tom is a c.", "Tom is a c", "Tom is a b.", "Tom is an a.", "Tom is a z.", "Sam", "", "Tom is a d."]
        for index, answer in enumerate(said if name.startswith("chains") else ["Tom is a c."] * 8):
            append_jsonl(place / "predictions_1.jsonl", {"idx": index, "answer": answer})
    found = chain_answers.shares([RECORD] * 8, tmp_path / "run", "chains_test")
    assert found == {"1": 1 / 8, "2": 1 / 8, "3": 2 / 8, "the other chain": 2 / 8, "anything else": 2 / 8}
    shutil.copytree(tmp_path / "run", tmp_path / "seed1" / "run")  # the same name in another folder, as the quick start's
    runs = [str(tmp_path / "run"), str(tmp_path / "seed1" / "run")]
    monkeypatch.setattr(sys, "argv", ["chain_answers", str(test_file), *runs])
    chain_answers.main()
    shown = capsys.readouterr().out
    assert [f"| {run} | 12.5 | 12.5 | 25.0 | 25.0 | 25.0 |" in shown for run in runs] == [True, True]
    with pytest.raises(UserError, match="no evaluation of unknown with gold thoughts"):
        chain_answers.shares([RECORD], tmp_path / "run", "unknown")
