"""Shared by the tests: one thread, a word-level tokenizer, tiny model directories, small ProsQA files."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
PUBLISHED = Path(
    os.environ.get("COCONUT_DATA") or ROOT.parent / "shared" / "data"
).resolve()  # published data sets, where they are


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked published_data("a file", ...) is left out where COCONUT_DATA has no such file."""
    for item in items:
        for marker in item.iter_markers("published_data"):
            missing = [name for name in marker.args if not (PUBLISHED / name).is_file()]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"published data: {PUBLISHED} has no {missing[0]}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    left_out = [one for one in terminalreporter.stats.get("skipped", []) if "published_data" in one.keywords]
    if left_out:
        terminalreporter.write_line(
            f"left out: {len(left_out)} tests on published data, whose files are not in {PUBLISHED}; "
            "COCONUT_DATA=DIR names their place, CONTRIBUTING.md lists them"
        )


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's word-level tokenizer, saved in Hugging Face form."""
    directory = tmp_path_factory.mktemp("tokenizer")
    source = ROOT / "configs" / "llama_small"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    return directory


@pytest.fixture
def tokenizer(tokenizer_directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)


@pytest.fixture
def model_directory(tokenizer_directory: Path, tmp_path: Path) -> Path:
    """A tiny Llama's configuration with a tokenizer, for from_scratch."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    for path in tokenizer_directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    config.save_pretrained(directory)
    return directory


def chain_records(count: int) -> list[dict[str, Any]]:
    """Questions with 1 to 3 steps over the names and concepts that the tokenizer knows."""
    names = ["Tom", "Sally", "Bob", "Max", "Eva", "Rex", "Sam"]
    concepts = ["lempus", "yumpus", "zumpus", "terpus", "rempus", "gerpus", "lorpus", "numpus"]
    records = []
    for number in range(count):
        name = names[number % 7]
        path = [concepts[(number + 3 * step) % 8] for step in range(1 + number % 3)]
        steps = [f"{name} is a {path[0]}."] + [f"Every {a} is a {b}." for a, b in itertools.pairwise(path)]
        other = concepts[(number + 1) % 8]
        question = " ".join([*steps, f"Is {name} a {path[-1]} or {other}?"])
        records.append({"question": question, "answer": f"{name} is a {path[-1]}.", "steps": steps, "number": number})
    return records


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def run_arguments(model_directory: Path, tmp_path: Path) -> list[str]:
    """A training run of seconds: 22 training and 7 validation questions, stages 0 to 2."""
    train = write_json(tmp_path / "train.json", chain_records(22))
    valid = write_json(tmp_path / "valid.json", chain_records(7))
    values = {
        "name": "run",
        "save_path": tmp_path / "checkpoints",
        "method": "coconut",
        "max_latent_stage": 2,
        "num_epochs": 3,
        "lr": "1e-3",
        "batch_size_training": 4,
        "reset_optimizer": True,
        "model_id": model_directory,
        "from_scratch": True,
        "train_path": train,
        "val_path": valid,
        "max_new_tokens": 8,
        "num_workers": 0,
        "wandb": "disabled",
        "log_every": 1,
    }
    return [f"{key}={value}" for key, value in values.items()]


def read_evaluation(run: Path) -> dict[str, Any]:
    """The row of the only evaluation below a run's directory."""
    (path,) = (run / "eval").glob("*/metrics.jsonl")
    (row,) = read_rows(path, "evaluation")
    return row


def read_rows(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if kind is None or row["kind"] == kind]
