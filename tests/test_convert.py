"""Published checkpoints become directories of this project."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_evaluation, read_rows
from test_checkpoint import published, run_convert, save_dir, start, weights  # noqa: F401

from systems import convert, files
from utils import UserError


def test_a_published_checkpoint_becomes_a_directory(
    run_arguments: list[str], save_dir: Path, published: Path, model_directory: Path, tmp_path: Path
) -> None:
    target = tmp_path / "converted"
    run_convert(published, target, "--model-id", model_directory, "--stage", 2, "--max-latent-stage", 2, "--epoch", 33)
    for key, value in weights(save_dir / "run" / "checkpoint_3").items():
        assert torch.equal(weights(target)[key], value), key
    original, facts = (files.read_facts(path) for path in (save_dir / "run" / "checkpoint_3", target))
    assert facts == dataclasses.replace(original, epoch=33, accuracy=None, data={})
    start(run_arguments, "name=again", "from_scratch=false", "only_eval=true", f"load_model_path={target}", "resume=99")
    row = read_evaluation(save_dir / "again")
    assert row["loss"] == pytest.approx(read_rows(save_dir / "run" / "metrics.jsonl", "epoch")[-1]["val_loss"], rel=1e-5)
    start(run_arguments, "name=further", "from_scratch=false", f"load_model_path={target}", "num_epochs=1")  # training goes on


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    published: Path, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = tmp_path / "converted"
    with pytest.raises(UserError, match="nowhere.pt: no such file; a state dict in one file is needed"):
        run_convert(tmp_path / "nowhere.pt", target, "--stage", 1)
    with pytest.raises(UserError, match="--stage"):
        run_convert(published, target)
    with pytest.raises(UserError, match="expected a whole number that is not negative, got '-1'"):
        run_convert(published, target, "--stage=-1")
    with pytest.raises(UserError, match="--stage 5: the last stage of method cot is 0"):
        run_convert(published, target, "--stage", 5, "--method", "cot")
    with pytest.raises(UserError, match="--stage 5: the last stage of method coconut is 4, as max-latent-stage is 3"):
        run_convert(published, target, "--stage", 5, "--max-latent-stage", 3)
    with pytest.raises(UserError, match="--c-thought 0 leaves stage 1 of coconut without thoughts"):
        run_convert(published, target, "--stage", 1, "--c-thought", 0)
    with pytest.raises(UserError, match="--lora-alpha: .* is not of CODI's form"):
        run_convert(published, target, "--stage", 1, "--model-id", model_directory, "--lora-alpha", 32)
    with pytest.raises(UserError, match="is there already: choose another directory"):
        run_convert(published, model_directory, "--stage", 1)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    monkeypatch.setattr("sys.argv", ["systems.checkpoint", "convert", str(tmp_path / "other.pt"), str(target), "--stage", "1"])
    monkeypatch.setattr("sys.argv", [*sys.argv, "--model-id", str(model_directory)])
    with pytest.raises(SystemExit) as caught:
        convert.main()
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not target.exists()
