"""Checkpoints from Python: `Coconut.from_pretrained`, `save_pretrained` and `answer`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coconut import Coconut
from config import EvalLatents, RunConfig
from dataset import get_question_latent_dataset, text_problem
from methods import METHODS
from states import Details
from systems import checkpoint, sources
from systems.files import Facts, read_facts
from systems.last_layer import skip_unread_states
from systems.models import LatentIds, build_model, latent_ids
from systems.tokens import check_known, question_ids
from systems.weights import weights_beside
from utils import UserError


@dataclass
class Trained:
    """What a model from a checkpoint knows besides its weights."""

    facts: Facts
    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    ids: LatentIds


def load(source: str, dtype: torch.dtype) -> Coconut:
    """See `Coconut.from_pretrained`."""
    run = resolved(source)
    facts = read_facts(Path(str(run.load_model_path)))
    if facts is None:
        raise UserError(f"{source}: not a checkpoint of this project: it has no coconut.json")
    run = run.model_copy(update={key: getattr(facts, key) for key in sources.TRAINED_WITH})
    tokenizer = sources.load_run_tokenizer(run)
    ids = latent_ids(tokenizer, run.method)
    model = build_model(run, tokenizer, ids, dtype).eval()
    skip_unread_states(model)
    model.trained = Trained(facts, run, tokenizer, ids)
    return model


def resolved(source: str) -> RunConfig:
    """The configuration of an evaluation, whose `load_model_path` is the checkpoint that a name stands for."""
    run = RunConfig(name="python", val_path="", only_eval=True, method="coconut", model_id=source, load_model_path=source)
    return sources.resolve_paths(run)


def save(model: Coconut, directory: Path) -> None:
    """See `Coconut.save_pretrained`. The thought map is the model's own, which may have been changed since it was loaded."""
    trained = _trained(model)
    facts = replace(trained.facts, thought_map=model.thought_map.setting)
    checkpoint.write_model(directory, model.base_causallm, weights_beside(model), trained.tokenizer, facts)


def answer(model: Coconut, question: str, max_new_tokens: int, latents: EvalLatents) -> tuple[str, Tensor]:
    """See `Coconut.answer`."""
    prompt = prompt_of(model, question, latents)
    generated = model.generate(prompt, max_new_tokens=max_new_tokens, return_details=True)
    output, details = cast("tuple[Tensor, Details]", generated)
    text = _trained(model).tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    return str(text), details.thoughts[0]


def prompt_of(model: Coconut, question: str, latents: EvalLatents) -> Tensor:
    """The prompt (1, T) of a question, made by the code that makes those of an evaluation.

    Raises UserError for a number of latents that there cannot be, and for a question with markers or half a character in it.
    """
    trained = _trained(model)
    ids, config = trained.ids, trained.config
    if latents not in ("gold", "max") and (not isinstance(latents, int) or latents < 0):
        raise UserError(f"latents: {latents!r}: a whole number of at least 0, or 'max'")
    if latents not in ("gold", "max", 0) and not METHODS[trained.facts.method].markers:
        raise UserError(f"latents: {latents}: a model trained with method {trained.facts.method} has no latents")
    if problem := text_problem(question):
        raise UserError(f"the question {problem}")
    [tokens] = question_ids(trained.tokenizer, [question], config.chat_template)
    check_known([tokens], trained.tokenizer, "the question")
    row = Dataset.from_dict({"idx": [0], "question_tokenized": [tokens], "steps_tokenized": [[]], "answer_tokenized": [[]]})
    example = get_question_latent_dataset(
        trained.facts.stage, row, config.curriculum, ids.start, ids.thought, ids.end, latents
    )[0]
    return torch.tensor([example["input_ids"]], device=model.embedding.weight.device)


def _trained(model: Coconut) -> Trained:
    if model.trained is None:
        raise UserError("the model knows neither its tokenizer nor its training: load it with Coconut.from_pretrained")
    return model.trained
