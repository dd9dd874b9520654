"""Who answers the quick checks, and what they are asked, where nothing is named: a small random model, made questions."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.answers.benchmarks import canonical_answer
from experiments.answers.questions import BenchmarkQuestion
from experiments.noise.settings import BranchConfig
from experiments.noise.subjects import Subject, load_subject
from preprocessing.prosqa import CONCEPTS, NAMES, chain_record, record_rng
from utils import set_seed

ROOT = Path(__file__).resolve().parents[2]
RANDOM = str(ROOT / "configs" / "llama_small")  # a configuration and a tokenizer without weights
RANDOM_SOURCE = "a small random model"
MADE = "prosqa"  # the benchmark whose questions can be made on the spot
SPREAD = 0.07  # of random weights: at 0.02 all tokens are almost as likely, from 0.1 on rounding grows from thought to thought


class QuickConfig(BranchConfig):
    """Keys of the experiments for checks that leave nothing behind; those without effect there are refused.

    Without a model the small random one of RANDOM answers.
    """

    name: str = "quick"
    benchmark: str = MADE

    @model_validator(mode="before")
    @classmethod
    def _someone_answers(cls, values: Any) -> Any:
        if without_effect := [key for key in cls.unused() if key in values]:
            raise ValueError(f"{without_effect[0]} has no effect here; leave it out")
        named = [values.get(key) not in (None, "None") for key in ("model_id", "load_model_path")]
        return values if any(named) else {**values, "model_id": RANDOM}

    @classmethod
    def unused(cls) -> tuple[str, ...]:
        return ("name", "results_path", "fresh", "controls")


def quick_subject(config: QuickConfig, device: torch.device) -> Subject:
    """The model that the configuration names.

    In place of RANDOM a random Llama of a million weights, made as a directory, so that it is loaded like any other model.
    """
    if config.model_id != RANDOM:
        return load_subject(config, device)
    set_seed(config.seed)
    model_config = AutoConfig.from_pretrained(RANDOM, initializer_range=SPREAD, tie_word_embeddings=False)
    weights = AutoModelForCausalLM.from_config(model_config).state_dict()
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(RANDOM, directory, dirs_exist_ok=True)
        model_config.save_pretrained(directory)
        # A model's save_pretrained writes nothing in processes other than the first.
        save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        subject = load_subject(config.model_copy(update={"model_id": directory}), device)
    subject.source = RANDOM_SOURCE
    return subject


def quick_questions(config: QuickConfig) -> list[BenchmarkQuestion]:
    """Those of the configuration. For prosqa without a file they are made, over two chains as the quick start's
    (scripts/quickstart.sh): 12 concepts, 8 names, 2 to 3 hops."""
    if config.benchmark != MADE or config.data_path is not None:
        return config.questions()
    seeds = (record_rng(config.seed, "test", index) for index in range(config.num_questions or 1))
    records = [chain_record(seed, concepts=CONCEPTS[:12], names=NAMES[:8]) for seed in seeds]
    return [
        BenchmarkQuestion(MADE, index, record["question"], canonical_answer(MADE, record["answer"]), steps=len(record["steps"]))
        for index, record in enumerate(records)
    ]
