"""When a stage is left, which learning rate a step has, which checkpoint is the best: what only the training loop decides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import read_rows

import run
from config import RunConfig
from training import Loop, next_epoch
from utils import load_config


@pytest.mark.parametrize(
    ("settings", "stage", "accuracy", "cot_match", "following"),
    [
        ([], 0, 1.0, 1.0, 1),  # no threshold: all epochs of the stage
        (["advance_accuracy=0.9"], 0, 0.89, 1.0, 1),
        (["advance_accuracy=0.9"], 0, 0.9, 0.0, 3),
        (["advance_accuracy=0.9", "advance_cot_match=0.8"], 0, 0.95, 0.79, 1),
        (["advance_accuracy=0.9", "advance_cot_match=0.8"], 0, 0.95, 0.8, 3),
        (["advance_accuracy=0.9", "advance_cot_match=0.8"], 0, 0.85, 1.0, 1),
        (["advance_accuracy=0.9"], 2, 1.0, 1.0, 9),  # the stage after max_latent_stage is one, too
        (["advance_accuracy=0.9"], 3, 1.0, 1.0, 1),  # nothing comes after the last one
        (["advance_accuracy=0.9", "num_epochs=9"], 2, 1.0, 1.0, 1),  # nor after the last one that the run has
        (["advance_accuracy=0.9", "num_epochs=3"], 0, 1.0, 1.0, 1),
    ],
)
def test_a_stage_is_left_once_it_is_learned(
    run_arguments: list[str], settings: list[str], stage: int, accuracy: float, cot_match: float, following: int
) -> None:
    """The first epoch of three of a stage is done; the next stage begins with epoch 3 (counted from 0)."""
    config = load_config(RunConfig, [*run_arguments, "epochs_per_stage=3", "num_epochs=12", *settings])
    evaluation: Any = SimpleNamespace(accuracy=accuracy, cot_match=cot_match)
    assert next_epoch(config.part(Loop), config.curriculum, 1, stage, evaluation) == following


def test_the_learning_rate_grows_over_the_warm_up(run_arguments: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", *run_arguments, "num_epochs=1", "warmup_steps=4", "lr=1e-3"])
    run.main()
    rows = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "step")
    assert [row["lr"] for row in rows] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert [row["examples"] for row in rows] == [4, 8, 12, 16, 20, 22]


def test_the_warm_up_may_be_a_share_of_the_steps_that_are_taken(
    run_arguments: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Epochs that count as done are not taken."""
    for more in (
        ["num_epochs=2"],
        ["num_epochs=7", "resume=5", "from_scratch=false", f"load_model_path={tmp_path}/checkpoints/a"],
    ):
        name = "b" if more[1:] else "a"
        arguments = ["run.py", *run_arguments, *more, "warmup_share=0.25", "lr=1e-3", f"name={name}", "log_every=1"]
        monkeypatch.setattr("sys.argv", arguments)
        run.main()
        rows = read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "step")
        assert [row["lr"] for row in rows] == pytest.approx([1e-3 / 3, 2e-3 / 3] + [1e-3] * 10)


def test_the_learning_rate_falls_in_the_last_stage_alone(run_arguments: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Stage 0 for one epoch of six steps, then stage 1 for two."""
    settings = ["num_epochs=3", "max_latent_stage=1", "lr=1e-3", "lr_schedule=linear"]
    monkeypatch.setattr("sys.argv", ["run.py", *run_arguments, *settings, "epochs_per_stage=[1, 2]"])
    run.main()
    rows = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "step")
    falling = [1e-3 * (1 - step / 12) for step in range(12)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3] * 6 + falling)
