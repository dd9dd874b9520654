"""Who answers the questions of a noise experiment: a trained checkpoint, or any causal language model without training."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coconut import Coconut
from config import RunConfig
from dataset import MyCollator
from experiments.answers.judging import message_ids, user_message
from experiments.answers.questions import BenchmarkQuestion
from experiments.noise.settings import SweepConfig
from generation import MAX_N_LATENT, branch_point
from methods import METHODS, EvalLatents, stage_shape
from states import BranchPoint
from systems import distributed, files, sources
from systems.last_layer import skip_unread_states
from systems.machine import warn_of_slow_bfloat16
from systems.models import LatentIds, build_model, latent_ids
from systems.shards import SHARDS
from systems.tokens import in_chat_template, question_ids
from utils import UserError


@dataclass
class Subject:
    """A model with its prompts.

    source: the checkpoint or the model. curriculum, stage: how the checkpoint was trained; None for a model without training.
    n_latents: so many for every question; None is as it was trained, by the rule eval_latents (`dataset.stage_shape`).
    """

    model: Coconut
    tokenizer: PreTrainedTokenizerBase
    ids: LatentIds
    device: torch.device
    source: str
    curriculum: RunConfig | None
    stage: int
    n_latents: int | None
    eval_latents: EvalLatents = "gold"

    def prompt(self, question: BenchmarkQuestion) -> list[int]:
        """Token ids of the question, the markers and the latents. UserError: it holds any, or does not say how many."""
        if self.curriculum is None:
            count = self.n_latents or MAX_N_LATENT
            tokens = message_ids(self.tokenizer, user_message(question.benchmark, question.question, question.choices))
        else:
            count = self.n_latents or self._trained_latents(question, self.curriculum)
            [tokens] = question_ids(self.tokenizer, [question.question], self.curriculum.chat_template)
        if {self.ids.start, self.ids.latent, self.ids.end} & set(tokens):
            raise UserError(f"question {question.index} holds a marker that stands for a thought: it must not bring its own")
        return [*tokens, self.ids.start, *[self.ids.latent] * count, self.ids.end]

    def plain_prompt(self, question: BenchmarkQuestion) -> list[int]:
        """Token ids without thoughts: a checkpoint's markers side by side; without training the message alone."""
        with_thoughts = self.prompt(question)
        if self.curriculum is None:
            return with_thoughts[: with_thoughts.index(self.ids.start)]
        return [token for token in with_thoughts if token != self.ids.latent]

    def _trained_latents(self, question: BenchmarkQuestion, curriculum: RunConfig) -> int:
        if question.steps is None and not curriculum.pad_latent_to_max and self.eval_latents == "gold":
            raise UserError(
                f"question {question.index}: {self.source} was trained with as many thoughts as steps (pad_latent_to_max: "
                "False), but the record has no steps: add them, or set eval_latents"
            )
        return stage_shape(curriculum.curriculum, self.stage, question.steps or 0, self.eval_latents).thoughts

    def count_thoughts(self, questions: Sequence[BenchmarkQuestion]) -> dict[int, int]:
        """How many thoughts each question gets, by its index. One without a prompt is left out: it is said when it is asked."""
        counts = {}
        for question in questions:
            with contextlib.suppress(Exception):
                counts[question.index] = self.prompt(question).count(self.ids.latent)
        return counts

    def batch(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, T) of some prompts, padded on the left."""
        collator = MyCollator(self.tokenizer, self.ids.latent, align_end=True)
        batch = collator(
            [
                {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": range(len(ids)), "idx": row}
                for row, ids in enumerate(prompts)
            ]
        )
        return batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)

    def branch_point(self, prompts: Sequence[list[int]], noise_at_step: int) -> BranchPoint:
        """The prompts as one batch, thought through up to where this thought is fed back."""
        return branch_point(self.model, *self.batch(prompts), noise_at_step)

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def describe(self) -> dict[str, Any]:
        """For the results: model family, width, layers, and how it was trained."""
        config = self.model.base_causallm.config.get_text_config()
        trained = None
        if self.curriculum is not None:
            trained = {"method": self.curriculum.method, "stage": self.stage, "c_thought": self.curriculum.c_thought}
        return {
            "model": self.source,
            "family": config.model_type,
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "trained": trained,
            "hidden_layer_idx": self.model.thought_map.layers[0],
            "thought_map": self.model.thought_map.setting,
        }


def load_subject(config: SweepConfig, device: torch.device) -> Subject:
    """The model that a configuration names, in evaluation mode. Raises UserError with one line if it cannot be used."""
    if config.dtype == "bfloat16":
        warn_of_slow_bfloat16("dtype: bfloat16", "dtype=float32", device)
    run = _run_config(config)
    source = str(run.load_model_path)
    facts = files.read_facts(Path(source))
    curriculum, stage = None, 0
    if facts is not None:
        run, stage, _ = sources.evaluation_config(run)
        curriculum = run
        if not METHODS[str(curriculum.method)].feeds_back:
            raise UserError(f"{source} was trained with method {curriculum.method}, which has no thoughts to put noise into")
        if stage == 0 and config.n_latents is None:
            raise UserError(f"{source} is of stage 0, which has no thoughts yet: take a later checkpoint, or set n_latents")
    elif config.eval_latents != "gold":
        raise UserError(f"eval_latents: {config.eval_latents}: {source} was not trained with thoughts; set n_latents")
    tokenizer = sources.load_run_tokenizer(run)
    if tokenizer.chat_template is not None if curriculum is None else curriculum.chat_template:
        in_chat_template(tokenizer, "What is 1 plus 1?")  # what is wrong with it is said now, not at each question
    ids = latent_ids(tokenizer, run.method)
    if config.device_map is not None and (config.gguf_file is not None or (Path(source) / SHARDS).is_dir()):
        raise UserError(
            "device_map: not for GGUF files and sharded checkpoints: `systems.checkpoint consolidate` makes whole files"
        )
    if config.device_map is not None and distributed.world_size() > 1:
        raise UserError("device_map: auto spreads a model over all GPUs: start a single process, without torchrun")
    layer = None if config.hidden_layer_idx is None else {"name": "layer", "layer": config.hidden_layer_idx}
    run = run.model_copy(update={"thought_map": layer or config.thought_map or run.thought_map})
    model = build_model(run, tokenizer, ids, getattr(torch, config.dtype), config.device_map).eval()
    if config.device_map is None:
        model.to(device)
        skip_unread_states(model)
    return Subject(model, tokenizer, ids, device, source, curriculum, stage, config.n_latents, config.eval_latents)


def _run_config(config: SweepConfig) -> RunConfig:
    """The loading half of a run's configuration, its paths resolved."""
    source = config.load_model_path or config.model_id
    if Path(str(source)).is_file() and Path(str(source)).suffix != ".gguf":
        raise UserError(
            f"{source} does not say how it was trained: `python -m systems.checkpoint convert {source} DIR` makes a checkpoint"
        )
    kept = config.model_dump(include={"name", "gguf_file", "attn_implementation", "trust_remote_code"})
    kept |= {"model_id": str(config.model_id or source), "load_model_path": source}
    run = RunConfig(val_path="", only_eval=True, method="coconut", **kept)
    resolved = sources.resolve_paths(run)
    if config.model_id is None:
        resolved = resolved.model_copy(update={"model_id": resolved.load_model_path})
    return resolved
