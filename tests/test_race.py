"""scripts/race.sh and its report, and scripts/gpu_day.sh, for a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_rows
from transformers import GPT2Config, GPT2LMHeadModel

from experiments import race

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository without its data, with this Python as its environment."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "checkpoints", "results") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    stamp = 'touch ".venv/installed-requirements-$(cat requirements*.txt | sha256sum | cut -c1-16)"'
    subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    made = ["preprocessing/prosqa.py", "--train", "40", "--valid", "4", "--test", "0", "--out-prefix", "data/prosqa"]
    subprocess.run([sys.executable, *made], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def start(checkout: Path, script: str = "race.sh", *arguments: str, **settings: str) -> str:
    environment = {**os.environ, "BATCH": "8", "OMP_NUM_THREADS": "1", "CONFIG": "configs/gpt2_small", **settings}
    ended = subprocess.run(
        ["bash", str(checkout / "scripts" / script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_race_goes_on_piece_by_piece(checkout: Path) -> None:
    small = "epochs_per_stage=1 max_new_tokens=2 num_workers=0"
    told = start(checkout, SETTINGS=f"{small} num_epochs=2")
    assert "finished: checkpoints/race-coconut" in told
    assert "0 epochs to come" in told
    assert "stopped after 0.1 seconds; the same command goes on" in start(
        checkout, SETTINGS=f"{small} num_epochs=3", PIECE="0.1"
    )
    start(checkout, SETTINGS=f"{small} num_epochs=3")
    rows = read_rows(checkout / "checkpoints" / "race-coconut" / "metrics.jsonl", "epoch")
    assert [(row["epoch"], row["stage"]) for row in rows] == [(1, 0), (2, 1), (3, 2)]


@pytest.mark.parametrize("piece", ["1", "2"])  # the third is the race
def test_pieces_of_a_gpu_day(checkout: Path, piece: str) -> None:
    start(checkout, "gpu_day.sh", piece, TINY="1")
    kept = (checkout / "results" / "gpu_day" / f"{piece}.txt").read_text()
    expected = {
        "1": [
            "a layer, forward + backward",
            "of the matrix rate",
            "--naive-rows 4 --bf16",
            "answers compared: 1, different: 0",
        ],
        "2": ["gpu-day-coconut-stage1", "gpu-day-cot-stage0"],
    }
    assert [text for text in expected[piece] if text not in kept] == []
    if piece == "2":  # a stage alone: from the epoch where it begins
        [row] = read_rows(checkout / "checkpoints" / "gpu-day-coconut-stage1" / "metrics.jsonl", "epoch")
        assert (row["epoch"], row["stage"]) == (6, 1)


def test_operations_of_a_token_are_those_of_the_blocks(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=50, n_layer=2, n_embd=8, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    config.save_pretrained(tmp_path)
    inner = GPT2LMHeadModel(config).transformer
    blocks = sum(parameter.numel() for part in (inner.h, inner.ln_f, inner.wpe) for parameter in part.parameters())
    assert race.operations_of_a_token(race.model_without_memory(str(tmp_path)), 10) == 6 * blocks + 6 * 2 * 8 * 10


def test_the_rate_is_that_of_matrix_products() -> None:
    rate = race.matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15


def test_stages_are_means_over_their_epochs_with_evaluation() -> None:
    common = {"seconds_per_question": 0.5, "questions": 4, "machine": {"processes": 2}, "accuracy": 0.5}
    rows = [
        {"stage": 0, "examples": 100, "seconds": 10.0, "tokens_per_second": 50.0, **common},
        {"stage": 1, "examples": 200, "seconds": 20.0, "tokens_per_second": 25.0, **common},
        {"stage": 1, "examples": 300, "seconds": 40.0, "tokens_per_second": 12.5, **common},
    ]
    first, second = race.stages(rows)
    assert (first["questions_per_second"], second["questions_per_second"]) == (10, 3.75)
    assert second["tokens_per_question"] == 5
    assert (first["seconds_per_epoch"], second["seconds_per_epoch"]) == (11, 31)
    assert second["epochs"] == 2
