"""What every probe is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from coconut import Coconut
from dataset import MyCollator, get_question_latent_dataset
from evaluation import Asking, Evaluator
from methods import stage_shape
from states import Details, Outputs
from systems.tokens import get_dataset

Series = dict[str, np.ndarray]  # condition -> one number for each question, NaN where it has none
Measure = Callable[["Probed"], Series]


@dataclass(frozen=True)
class Probe:
    """One way to look at the thoughts.

    about: a sentence for the report. measure: of one model; the same conditions for every seed. unit: of its numbers.
    needs_thoughts: whether a model without latents or pauses has nothing to measure.
    """

    about: str
    measure: Measure
    unit: str = "%"
    needs_thoughts: bool = True


@dataclass
class Probed:
    """A checkpoint and the questions that it is asked.

    data: the file of the records. dataset: they with their tokens. stage: the one that it was trained to. thoughts: of a
    question at that stage.
    """

    model: Coconut
    data: Path
    dataset: Dataset
    evaluator: Evaluator
    stage: int
    thoughts: int

    @classmethod
    def load(cls, checkpoint: str, data: Path, questions: int, settings: dict[str, Any], device: torch.device) -> Probed:
        """settings: keys of an evaluation. Raises UserError if there is no such checkpoint, or its data cannot be used."""
        model = Coconut.from_pretrained(checkpoint).to(device)
        trained = model.trained
        update = {**settings, "pad_latent_to_max": True}
        config = trained.config.model_copy(update=update)
        dataset = get_dataset(data, trained.tokenizer, questions, config.chat_template)
        evaluator = Evaluator(config.part(Asking), config.curriculum, dataset, trained.tokenizer, trained.ids, device)
        thoughts = stage_shape(config.curriculum, trained.facts.stage, 0, "max").thoughts
        return cls(model, data, dataset, evaluator, trained.facts.stage, thoughts)

    def passes(self) -> Iterator[tuple[list[int], Outputs, Details, Tensor]]:
        """Of each batch: places of its questions, what the model gives for their prompts, and where thoughts stand (B, T)."""
        ids, evaluator = self.evaluator.ids, self.evaluator
        examples = get_question_latent_dataset(
            self.stage, self.dataset, evaluator.curriculum, ids.start, ids.thought, ids.end, "max"
        )
        collator = MyCollator(evaluator.tokenizer, ids.thought, align_end=True)
        size = evaluator.config.batch_size_eval
        for begin in range(0, len(self.dataset), size):
            places = list(range(begin, min(begin + size, len(self.dataset))))
            batch = {name: value.to(evaluator.device) for name, value in collator([examples[at] for at in places]).items()}
            thought = batch["input_ids"] == ids.thought
            outputs, details = self.model(
                batch["input_ids"], batch["attention_mask"], position_ids=batch["position_ids"], return_details=True
            )
            yield places, outputs, details, thought

    def states(self) -> Iterator[tuple[list[int], Tensor]]:
        """Of each batch: places of its questions, and the last states (B, N, D) at the positions before their N thoughts.

        These are what the thought map of a model with latents reads; of pauses they are the states in the same places.
        """
        for places, _, details, thought in self.passes():
            before = torch.roll(thought, -1, dims=1)  # (B, T): the position before each thought
            yield places, details.hidden[before].unflatten(0, (len(places), -1))


def empty(questions: int) -> np.ndarray:
    return np.full(questions, np.nan)
