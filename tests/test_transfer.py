"""Whose answer is given with another question's thoughts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.transfer import report, transfer
from utils import UserError


def record(index: int, gold: str, said: str, other: int) -> dict:
    outcome = {"branches": [{"answer": said}], "displaced_by": other}
    return {"index": index, "gold": gold, "error": None, "conditions": {"other/all": outcome, "greedy": {}}}


RECORDS = [
    record(0, "Tom is a lempus.", "Tom is a zumpus.", 1),  # the other's
    record(1, "Eva is a zumpus.", "Eva is a zumpus.", 0),  # its own
    record(2, "Bob is a lempus.", "NO_ANSWER_FOUND", 1),  # neither
    record(3, "Bob is a lempus.", "Bob is a lempus.", 0),  # cannot be told apart
    record(4, "Bob is a lempus.", "Bob is a zumpus.", 9),  # the other one failed
    {"index": 9, "gold": "x", "error": "ValueError: too long"},
]


def test_shares() -> None:
    found = transfer(RECORDS)["other/all"]
    assert found["questions"] == 3
    assert found["answer_of_the_other"]["percent"] == pytest.approx(100 / 3)
    assert found["own_answer"]["percent"] == pytest.approx(100 / 3)
    assert found["own_answer"]["low"] < 100 / 3 < found["own_answer"]["high"]


def test_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no experiment with the control `other`"):
        report(tmp_path)
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "part-0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    assert report(tmp_path).startswith("other/all: 3 questions, answer of the other 33.3% (")
    assert json.loads((tmp_path / "transfer.json").read_text())["other/all"]["questions"] == 3
