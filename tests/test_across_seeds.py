"""Intervals over seeds and questions, and the table of an experiment on several checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.across_seeds import interval_over_seeds, write_results
from utils import UserError


def test_seeds_and_questions_both_widen_the_interval() -> None:
    alike = np.tile(np.arange(400) % 4 != 0, (5, 1)).astype(float)  # every seed answers the same 75% of the questions
    low, high = interval_over_seeds(alike)
    assert (low, high) == pytest.approx((0.7075, 0.7925), abs=0.006)  # that of 400 questions, not of 2,000
    apart = np.repeat([[1.0], [1.0], [1.0], [0.0]], 400, axis=1)  # one seed of four fails, on every question
    low, high = interval_over_seeds(apart)
    assert low <= 0.26
    assert high == 1.0
    assert interval_over_seeds(np.ones((3, 7))) == (1.0, 1.0)


def outcome(answer: str, gold: str, **more: Any) -> dict[str, Any]:
    return {"branches": [{"answer": answer}], "majority": {"correct": answer == gold}, "noise_ratio": None, **more}


def experiment(directory: Path, zeroed: int, failed: int) -> Path:
    """Four questions; without thoughts so many of them are right; the thoughts of the next question give its answer."""
    rows = []
    for index in range(4):
        gold, other = f"Tom is a {'abcd'[index]}.", f"Tom is a {'bcda'[index]}."
        conditions = {
            "greedy": outcome(gold, gold),
            "clean": outcome(gold, gold),
            "gaussian@1.0": outcome(gold if index else "no", gold, noise_ratio=[0.5]),
            "zero/all": outcome(gold if index < zeroed else "no", gold),
            "other/all": outcome(other, gold, displaced_by=(index + 1) % 4),
        }
        error = "boom" if index == failed else None
        rows.append({"index": index, "gold": gold, "n_latents": 2, "seconds": 0.1, "error": error, "conditions": conditions})
    path = directory / "progress" / "part-0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_table_over_checkpoints(tmp_path: Path) -> None:
    directories = [experiment(tmp_path / "a", zeroed=4, failed=9), experiment(tmp_path / "b", zeroed=0, failed=3)]
    found = write_results(directories, tmp_path / "out")
    assert found["clean"]["seeds"] == [100, 100]
    assert found["zero/all"]["seeds"] == [100, 0]
    assert found["zero/all"]["questions"] == 3  # the question that failed for one seed is left out for both
    assert found["zero/all"]["difference"]["mean"] == -50
    assert found["gaussian@1.0"]["mean"] == pytest.approx(200 / 3)
    written = json.loads((tmp_path / "out" / "across_seeds.json").read_text())
    assert written["conditions"] == found
    assert "| zero/all | 2 | 3 | 50.0 (0.0 to 100.0) | 0.0 to 100.0 |" in (tmp_path / "out" / "across_seeds.md").read_text()
    assert (tmp_path / "out" / "gaussian.png").exists()


def test_the_likeliest_of_several_branches_and_any_of_them(tmp_path: Path) -> None:
    for name in "ab":
        path = experiment(tmp_path / name, zeroed=1, failed=9) / "progress" / "part-0.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:  # the first branch is right, and in two questions of four the likelier one
            likely = -0.5 if row["index"] < 2 else -2.0
            row["conditions"]["gaussian@1.0"]["branches"] = [
                {"answer": row["gold"], "correct": True, "log_probability": likely, "new_tokens": 1},
                {"answer": "no", "correct": False, "log_probability": -1.0, "new_tokens": 1},
            ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = write_results([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert (found["gaussian@1.0, best of 2"]["mean"], found["gaussian@1.0, any of 2"]["mean"]) == (50, 100)
    assert found["gaussian@1.0, best of 2"]["difference"]["mean"] == -50
    assert "clean, best of 2" not in found


def test_answers_of_the_other_question_are_counted(tmp_path: Path) -> None:
    directories = [experiment(tmp_path / name, zeroed=1, failed=9) for name in "ab"]
    found = write_results(directories, tmp_path / "out")
    assert found["other/all, answers of the other"]["mean"] == 100


def test_answers_of_the_other_are_those_of_the_same_questions(tmp_path: Path) -> None:
    """One seed has those of questions 1 and 2, the other those of 0 and 3: none in common."""
    directories = [experiment(tmp_path / "a", zeroed=1, failed=0), experiment(tmp_path / "b", zeroed=1, failed=2)]
    found = write_results(directories, tmp_path / "out")
    assert "other/all, answers of the other" not in found


def test_noise_that_reached_no_thought_does_not_count(tmp_path: Path) -> None:
    for name in "ab":
        path = experiment(tmp_path / name, zeroed=1, failed=9) / "progress" / "part-0.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0]["conditions"]["gaussian@1.0"]["noise_ratio"] = None  # the one that is wrong
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = write_results([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert (found["gaussian@1.0"]["questions"], found["gaussian@1.0"]["mean"]) == (3, 100)


def test_only_seeds_of_one_experiment_are_pooled(tmp_path: Path) -> None:
    directories = [experiment(tmp_path / name, zeroed=1, failed=9) for name in "ab"]
    settings = {"name": "a", "load_model_path": "checkpoints/a", "model_id": None, "noise_at_step": 1, "batch_size": 8}
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(settings))

    def other(**changes: Any) -> dict[str, Any]:
        (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump({**settings, "load_model_path": "checkpoints/b", **changes}))
        return write_results(directories, tmp_path / "out")

    assert other(name="b", batch_size=9)["clean"]["seeds"] == [100, 100]
    with pytest.raises(UserError, match="noise_at_step is 1 in .*/a and 2 in .*/b: these are no seeds of one experiment"):
        other(noise_at_step=2)
    with pytest.raises(UserError, match="are of one checkpoint, so of one seed: checkpoints/a"):
        other(load_model_path="checkpoints/a")
    with pytest.raises(UserError, match="one directory is given twice"):
        write_results([directories[0], directories[0]], tmp_path / "out")
    with pytest.raises(UserError, match="beside OUT .* 1 experiment is given"):
        write_results(directories[:1], tmp_path / "out")


def ablation(directory: Path, shared: list[bool]) -> Path:
    cells = [
        {"value": "own", "noise": "1", "right": {"0": True, "1": True, "2": False}},
        {"value": "shared", "noise": "1", "right": {str(index): answer for index, answer in enumerate(shared)}},
    ]
    directory.mkdir()
    (directory / "right.json").write_text(json.dumps({"shared_noise": {"default": "own", "cells": cells}}))
    return directory


def test_an_ablation_over_checkpoints_compares_with_the_default_value(tmp_path: Path) -> None:
    directories = [ablation(tmp_path / "a", [True, False, True]), ablation(tmp_path / "b", [False, False])]
    found = write_results(directories, tmp_path / "out")
    assert found["shared_noise own, noise 1"]["questions"] == 3
    assert "difference" not in found["shared_noise own, noise 1"]
    shared = found["shared_noise shared, noise 1"]  # the third question has not got it with both seeds
    assert (shared["seeds"], shared["questions"], shared["difference"]["seeds"]) == ([50, 0], 2, [-50, -100])


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = experiment(tmp_path / "a", zeroed=1, failed=9)
    with pytest.raises(UserError, match="no questions of an experiment there"):
        write_results([one, tmp_path / "none"], tmp_path / "out")
