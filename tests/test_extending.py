"""Every code block of docs/EXTENDING.md does what the page says: it is registered, trained with, saved, loaded and swept over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read_evaluation, read_rows
from test_run import start

from coconut import Coconut
from experiments.answers.benchmarks import BENCHMARKS
from experiments.checks.noise_laws import NoiseSetting, measure
from experiments.noise.controls import CONTROLS
from experiments.noise.results import write_results
from experiments.noise.settings import SweepConfig
from experiments.noise.sweep import run_sweep
from methods import METHODS
from noise import NOISES
from thoughts import THOUGHT_MAPS

PAGE = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
BLOCKS = {re.match(r"# (\w+)\.py", block)[1]: block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
TABLES: tuple[dict[str, Any], ...] = (THOUGHT_MAPS, METHODS, NOISES, BENCHMARKS, CONTROLS)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """What a block registers is there for one test."""
    before = [dict(table) for table in TABLES]
    yield
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


def run_block(name: str) -> dict[str, Any]:
    namespace = {"__name__": name}
    exec(compile(BLOCKS[name], f"docs/EXTENDING.md, {name}.py", "exec"), namespace)
    return namespace


def trained(run_arguments: list[str], tmp_path: Path, *more: str) -> Path:
    """A run of two epochs, with written steps and with the first one latent."""
    start(run_arguments, "num_epochs=2", "name=extended", *more)
    return tmp_path / "checkpoints" / "extended"


def sweep(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The results of a sweep over the checkpoint's validation questions, by file."""
    given = {"benchmark": "prosqa", "data_path": str(tmp_path / "valid.json"), "noise_scales": [0.5], "max_new_tokens": 4}
    checkpoint = str(tmp_path / "checkpoints" / "extended")
    config = SweepConfig(
        name="sweep", results_path=str(tmp_path / "results"), load_model_path=checkpoint, **{**given, **changes}
    )
    finished = run_sweep(config, CPU)
    assert finished is not None
    write_results(finished)
    return {path.stem.rpartition("_")[0]: json.loads(path.read_text()) for path in config.directory.glob("*_*.json")}


def test_blocks_are_short_and_all_are_run_here() -> None:
    assert set(BLOCKS) == {"my_map", "my_method", "my_noise", "my_data", "my_benchmark", "my_control"}
    assert all(len(block.splitlines()) <= 40 for block in BLOCKS.values())


def test_a_thought_map(run_arguments: list[str], tmp_path: Path) -> None:
    run_block("my_map")
    run = trained(run_arguments, tmp_path, "thought_map={name: mixed, share: 0.25}")
    model = Coconut.from_pretrained(run)
    share = model.thought_map.share.item()
    assert share != 0.25
    assert abs(share - 0.25) < 0.1
    model.save_pretrained(tmp_path / "copy")
    assert Coconut.from_pretrained(tmp_path / "copy").thought_map.share.item() == share
    start(run_arguments, "only_eval=true", f"load_model_path={run}", "name=again")
    assert read_evaluation(tmp_path / "checkpoints" / "again")["loss"] == pytest.approx(
        read_rows(run / "metrics.jsonl", "epoch")[-1]["val_loss"], rel=1e-5
    )
    assert sweep(tmp_path)


def test_a_method(run_arguments: list[str], tmp_path: Path) -> None:
    run_block("my_method")
    run = trained(run_arguments, tmp_path, "method=distilled")
    rows = read_rows(run / "metrics.jsonl", "step")
    assert all(row["loss"] == pytest.approx(row["loss_student"] + row["loss_teacher"] + row["loss_distance"]) for row in rows)
    start(run_arguments, "only_eval=true", f"load_model_path={run}", "name=again")
    assert read_evaluation(tmp_path / "checkpoints" / "again")["questions"] == 7
    assert sweep(tmp_path)


def test_a_noise_type(run_arguments: list[str], tmp_path: Path) -> None:
    run_block("my_noise")
    thoughts = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    checked = measure(thoughts, NoiseSetting("signs", None, 0.5), lambda: torch.Generator().manual_seed(1))
    assert checked["passed"], checked["checks"]
    assert checked["ratio"] == pytest.approx(0.5, rel=1e-4)
    trained(run_arguments, tmp_path)
    results = sweep(tmp_path, noise_type="signs", noise_scales=None)
    assert {*results["signs"]["results"]} == {"0.0", "0.1", "0.2", "0.5", "1.0", "2.0"}


def test_a_data_set(run_arguments: list[str], tmp_path: Path) -> None:
    run_block("my_data")["write"](tmp_path, {"train": 12, "valid": 4})
    run = trained(run_arguments, tmp_path, f"train_path={tmp_path}/sums_train.json", f"val_path={tmp_path}/sums_valid.json")
    assert read_rows(run / "metrics.jsonl", "epoch")[-1]["questions"] == 4


def test_a_benchmark(run_arguments: list[str], tmp_path: Path) -> None:
    run_block("my_data")["write"](tmp_path, {"test": 3})
    run_block("my_benchmark")
    trained(run_arguments, tmp_path)
    results = sweep(tmp_path, benchmark="sums", data_path=str(tmp_path / "sums_test.json"))
    assert results["gaussian"]["experiment_info"]["benchmark"] == "sums"


def test_a_control(run_arguments: list[str], tmp_path: Path) -> None:
    run_block("my_control")
    trained(run_arguments, tmp_path)
    results = sweep(tmp_path, controls=["backwards"])
    assert {*results["controls"]["results"]} == {"backwards/all", "backwards/first", "backwards/after"}
