"""What an earlier version left is gone on with: a training run, its checkpoint, a finished sweep and an interrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_rows

import run
from experiments.compare import report
from experiments.noise.settings import SweepConfig
from experiments.noise.sweep import run_sweep
from utils import load_config

VERSION_0_1 = ROOT / "tests" / "fixtures" / "version_0_1"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what version 0.1 left, and the place from which it is gone on with."""
    copy = tmp_path / "old"
    shutil.copytree(VERSION_0_1, copy)
    monkeypatch.chdir(copy)
    return copy


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    run.main()


def test_a_training_run_goes_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, "run.yaml")
    found, expected = (
        {(row["kind"], row["step"]): row for row in read_rows(path)}
        for path in (directory / "checkpoints" / "run" / "metrics.jsonl", directory / "expected_metrics.jsonl")
    )
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        name = "loss" if key[0] == "step" else "val_loss"
        assert found[key][name] == pytest.approx(row[name], rel=1e-4)
        assert found[key].get("accuracy") == row.get("accuracy")


def test_a_checkpoint_is_evaluated(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, "run.yaml", "only_eval=true", "from_scratch=false", "load_model_path=checkpoints/run")
    [path] = (directory / "checkpoints" / "run" / "eval").glob("*/metrics.jsonl")
    [row] = read_rows(path, "evaluation")
    [expected] = [row for row in read_rows(directory / "expected_metrics.jsonl", "epoch") if row["epoch"] == 2]
    assert row["stage"] == expected["stage"]
    assert row["loss"] == pytest.approx(expected["val_loss"], rel=1e-4)


def test_sweeps_are_read_and_gone_on_with(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = directory / "results"
    assert "snr@1.0 minus clean" in report(results / "finished", ["clean", "snr@1.0"])
    old = (results / "interrupted" / "progress" / "part-0.jsonl").read_text().splitlines()
    kept = {json.loads(line)["index"] for line in old}
    assert len(kept) == 2
    sweeps = {
        name: run_sweep(load_config(SweepConfig, ["sweep.yaml", f"name={name}"]), torch.device("cpu"))
        for name in ("finished", "interrupted")
    }
    for name, sweep in sweeps.items():
        assert sweep is not None, name
        assert [record["index"] for record in sweep.records] == [0, 1, 2, 3, 4, 5]
    interrupted = sweeps["interrupted"]
    assert interrupted is not None
    assert {one["index"] for one in interrupted.records if one.get("git_commit") is None} == kept
    assert all("no_latents" in one["conditions"] for one in interrupted.records if one["index"] not in kept)
