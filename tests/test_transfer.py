"""Whose answer is given with another question's thoughts; records that are kept, and those that are not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from experiments import compare
from experiments.transfer import report, transfer
from utils import UserError


def record(index: int, gold: str, said: str, other: int) -> dict:
    outcome = {"branches": [{"answer": said}], "displaced_by": other}
    return {
        "index": index,
        "gold": gold,
        "error": None,
        "n_latents": 1,
        "seconds": 1.0,
        "conditions": {"other/all": outcome, "greedy": {}},
    }


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
    with pytest.raises(UserError, match="no questions of an experiment there"):
        report(tmp_path)
    (tmp_path / "progress").mkdir()
    part = tmp_path / "progress" / "part-0.jsonl"
    part.write_text(
        json.dumps({"index": 0, "error": None, "n_latents": 1, "seconds": 1.0, "conditions": {"greedy": {}}}) + "\n"
    )
    with pytest.raises(UserError, match="no experiment with the control `other`"):
        report(tmp_path)
    part.write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    assert report(tmp_path).startswith("other/all: 3 questions, answer of the other 33.3% (")
    assert json.loads((tmp_path / "transfer.json").read_text())["other/all"]["questions"] == 3


def test_kept_records_are_compared_as_the_experiment_itself(tmp_path: Path) -> None:
    directory, kept = tmp_path / "results" / "a b", tmp_path / "kept"
    (directory / "progress").mkdir(parents=True)
    for name in ("summary_1.json", "gaussian_1.json", "progress/settings.json"):
        (directory / name).write_text("{}")
    for rank in (0, 1):
        conditions = {"clean": {"majority": {"correct": True}}, "zero/all": {"majority": {"correct": rank == 0}}}
        line = json.dumps({"index": rank, "error": None, "n_latents": 1, "seconds": 1.0, "conditions": conditions})
        (directory / "progress" / f"part-{rank}.jsonl").write_text(line + "\n")
    found = compare.report(directory, ["clean", "zero/all"])
    assert found.startswith("zero/all minus clean: -50.0 points")
    script = [str(shutil.which("bash")), str(ROOT / "scripts" / "keep_records.sh"), str(tmp_path / "results"), str(kept)]
    for _ in range(2):
        subprocess.run(script, check=True, capture_output=True)
    assert compare.report(kept / "a b", ["clean", "zero/all"]) == found
    files = {path.relative_to(kept / "a b").as_posix() for path in kept.rglob("*.*")}
    progress = {f"progress/{name}.gz" for name in ("part-0.jsonl", "part-1.jsonl", "settings.json")}
    assert files == {"summary_1.json.gz", *progress}

    shutil.rmtree(directory / "progress")
    with pytest.raises(UserError, match="only its tables are kept; run its command for the answers"):
        compare.report(directory, [])
    nothing = subprocess.run([*script[:2], str(tmp_path / "x"), str(kept)], capture_output=True, text=True)
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
