"""The quick start's summary and figures, from metrics as run.py writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_json
from matplotlib import image

from experiments import quickstart
from preprocessing.prosqa import chain_records
from utils import UserError, append_jsonl


def write_run(directory: Path, accuracies: list[tuple[int, float]], test_accuracy: float) -> None:
    """Metrics of a finished training run and of its evaluation on 40 test questions."""
    evaluation = directory.with_name(directory.name + "-test")
    directory.mkdir(parents=True)
    evaluation.mkdir()
    for number, (stage, accuracy) in enumerate(accuracies, start=1):
        row = {"epoch": number, "stage": stage, "accuracy": accuracy, "train_loss": 1 / number, "val_loss": 1.1 / number}
        append_jsonl(directory / "metrics.jsonl", {"kind": "step", "step": number, "loss": 1.0})
        append_jsonl(directory / "metrics.jsonl", {"kind": "epoch", **row, "examples": 64 * number, "seconds": 2.5})
    facts = {"accuracy": test_accuracy, "low": test_accuracy - 0.1, "high": test_accuracy + 0.05, "questions": 40, "stage": 3}
    append_jsonl(evaluation / "metrics.jsonl", {"kind": "evaluation", **facts})
    append_jsonl(evaluation / "predictions_4.jsonl", {"idx": 0, "correct": True})


@pytest.fixture
def save_path(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs" / "quick-coconut", [(0, 0.6), (1, 0.7), (2, 0.8), (3, 0.9)], 0.9)
    write_run(tmp_path / "runs" / "quick-no-cot", [(0, 0.5)] * 4, 0.5)
    return tmp_path / "runs"


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    return write_json(tmp_path / "test.json", chain_records(40, 0, "test"))


def test_the_summary_says_what_was_measured(
    save_path: Path, test_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["quickstart", str(save_path), str(test_file), str(out), "--seconds", "123"])
    quickstart.main()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["coconut"]["accuracy"] == 0.9
    assert summary["coconut"]["examples"] == summary["no_cot"]["examples"] == 256
    assert summary["no_cot"]["questions"] == 40
    assert summary["depth_shortcut"] == summary["chance"] == 0.5
    assert (summary["seconds_total"], summary["seconds_training"]) == (123, 20)
    for name in ("curves.png", "accuracy.png"):
        picture = image.imread(out / name)
        assert picture[..., :3].std() > 0.05  # something is drawn
    for method in ("coconut", "no_cot"):
        assert (out / f"metrics_{method}.jsonl").is_file()
        assert (out / f"predictions_{method}.jsonl").is_file()
    shown = capsys.readouterr().out
    assert "90.0%" in shown
    assert "80.0% to 95.0%" in shown


def test_a_missing_run_is_one_line(test_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        quickstart.summarise(tmp_path, test_file, 1.0)
    monkeypatch.setattr(sys, "argv", ["quickstart", str(tmp_path), str(test_file), str(tmp_path / "out"), "--seconds", "1"])
    with pytest.raises(SystemExit) as caught:
        quickstart.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
