"""A run beside the numbers of other seeds: it is named where it leaves them, and only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config import RunConfig
from experiments import expected
from systems.writing import append_jsonl, save_config
from utils import UserError, load_config

FILE = "args/prosqa_quick_coconut.yaml"
WHERE = {"device": "a processor", "processes": 1, "threads": 1, "versions": {"torch": "2"}, "git_commit": None}


def write_run(directory: Path, stages: list[tuple[int, int, float]], seed: int = 0, *more: str) -> Path:
    """A finished run: (stage, its epochs, the accuracy after each of them)."""
    directory.mkdir()
    save_config(load_config(RunConfig, [str(expected.ROOT / FILE), f"seed={seed}", *more]), directory / "config.yaml")
    for stage, epochs, accuracy in stages:
        row = {
            "kind": "epoch",
            "stage": stage,
            "accuracy": accuracy,
            "val_loss": 1 - accuracy,
            "seconds": 2.0,
            "machine": WHERE,
        }
        for _ in range(epochs):
            append_jsonl(directory / "metrics.jsonl", row)
    return directory


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What two seeds are expected to show."""
    monkeypatch.setattr(expected, "DATA", tmp_path / "expected.json")
    monkeypatch.setattr(expected, "PAGE", tmp_path / "EXPECTED.md")
    seeds = [[(1, 1, 0.99), (2, 4, 0.98)], [(1, 2, 0.98), (2, 6, 0.94)]]
    expected.make([write_run(tmp_path / f"seed{seed}", stages, seed) for seed, stages in enumerate(seeds)])
    return json.loads((tmp_path / "expected.json").read_text())[FILE]


def test_a_run_is_named_at_the_stage_where_it_leaves_the_range(made: dict[str, Any], tmp_path: Path) -> None:
    assert made["seeds"] == [0, 1]
    assert made["stages"]["2"] == {
        "accuracy": [0.98, 0.94],
        "val_loss": pytest.approx([0.02, 0.06]),
        "epochs": [4, 6],
        "seconds": [8, 12],
    }
    like = write_run(tmp_path / "like", [(1, 3, 0.975), (2, 7, 0.925)], 7)  # a little beyond, as another seed may be
    assert expected.compare(like, made)[-1] == "as expected"
    better = write_run(tmp_path / "better", [(1, 1, 1.0), (2, 1, 1.0)], 7)
    assert expected.compare(better, made)[-1] == "as expected"
    stuck = write_run(tmp_path / "stuck", [(1, 1, 0.99), (2, 12, 0.5)], 7)
    *_, second, verdict = expected.compare(stuck, made)
    assert "accuracy 50.0%, expected 96.0% (94.0% to 98.0%)" in second
    assert "epochs 12, expected 5.0 (4 to 6)" in second
    assert verdict == "leaves the expected range at stage 2"
    begun = write_run(tmp_path / "begun", [(1, 1, 0.99)], 7)
    assert expected.compare(begun, made)[-1] == "as expected; not there yet: stages 2"


def test_a_changed_setting_is_said_and_a_changed_seed_is_not(made: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "other", [(1, 1, 0.99)], 7, "lr=0.5", "wandb=offline")
    assert expected.differences(run, expected.owner_of(run)) == ["lr 0.5, there 0.001"]
    named = write_run(tmp_path / "named", [(1, 1, 0.99)], 7, "name=mine")
    with pytest.raises(UserError, match="no file in args/ has the name mine"):
        expected.owner_of(named)


def test_runs_of_a_script_belong_to_it_and_their_method(made: dict[str, Any], tmp_path: Path) -> None:
    place = "save_path=checkpoints/compare"
    runs = [
        write_run(tmp_path / f"c{seed}", [(3, 2, 0.9)], seed, place, f"name=simcot-seed{seed}", "lr=0.5") for seed in (3, 4)
    ]
    assert {expected.owner_of(run) for run in runs} == {"scripts/compare_methods.sh, simcot"}
    assert expected.differences(runs[0], "scripts/compare_methods.sh, simcot") == []  # the script sets what it wants
    expected.make(runs)
    data = json.loads(expected.DATA.read_text())
    assert data["scripts/compare_methods.sh, simcot"]["seeds"] == [3, 4]
    assert FILE in data
    assert "## scripts/compare_methods.sh, simcot" in expected.PAGE.read_text()
    later = write_run(tmp_path / "later", [(2, 3, 0.5), (3, 2, 0.7)], 5, place, "name=simcot-seed5")
    expected.make([later], add=True)
    entry = json.loads(expected.DATA.read_text())["scripts/compare_methods.sh, simcot"]
    assert (entry["seeds"], entry["machine"].count("; and ")) == ([3, 4, 5], 1)
    assert entry["stages"]["2"]["accuracy"] == [0.5]
    assert entry["stages"]["3"]["accuracy"][-1] == 0.7
    assert len(entry["stages"]["3"]["accuracy"]) == 3
    elsewhere = write_run(tmp_path / "elsewhere", [(3, 2, 0.9)], 3, "name=simcot-seed3")
    with pytest.raises(UserError, match="no file in args/ has the name simcot-seed3"):
        expected.owner_of(elsewhere)


def test_the_page_is_what_its_data_say() -> None:
    """Made anew by `python -m experiments.expected --make RUN ...`."""
    data = json.loads(expected.DATA.read_text(encoding="utf-8"))
    assert expected.PAGE.read_text(encoding="utf-8") == expected.page(data)
