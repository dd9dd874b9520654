"""What every probe is given, and what it returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from coconut import Coconut
from dataset import MyCollator, get_question_latent_dataset, load_records
from evaluation import Asking, Evaluator
from experiments.across_seeds import Numbers
from methods import EvalLatents, stage_shape
from states import Thinking
from systems.tokens import get_dataset
from thoughts import ThoughtInterventions
from utils import UserError

GRAPH = ("edges", "root", "idx_to_symbol")  # fields of records that hold a graph
Series = dict[str, np.ndarray]  # condition -> one number for each question, NaN where it has none
Measure = Callable[["Probed"], Series]


@dataclass(frozen=True)
class Probe:
    """One way to look at the thoughts.

    about: a sentence for the report. measure: of one model; the same conditions for every seed. unit: of its numbers.
    needs_thoughts: whether a model without latents or pauses has nothing to measure. sketch: draws one question to a file.
    draw: the figure of what was found, by condition and group, in place of points with intervals.
    """

    about: str
    measure: Measure
    unit: str = "%"
    needs_thoughts: bool = True
    sketch: Callable[[Probed, Path], None] | None = None
    draw: Callable[[Mapping[str, Mapping[str, Numbers]], Sequence[str], Path], None] | None = None


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
    kept: dict[str, Series] = field(default_factory=dict)

    @classmethod
    def load(cls, checkpoint: str, data: Path, questions: int, settings: dict[str, Any], device: torch.device) -> Probed:
        """settings: keys of an evaluation. Raises UserError if there is no such checkpoint, or its data cannot be used."""
        model = Coconut.from_pretrained(checkpoint).to(device)
        trained = model.trained
        update = {**settings, "pad_latent_to_max": True}
        if model.attend_padding:  # `layers` takes one pass over all columns, in which padding would not be attended to
            update["batch_size_eval"] = 1
        config = trained.config.model_copy(update=update)
        dataset = get_dataset(data, trained.tokenizer, questions, config.chat_template)
        evaluator = Evaluator(config.part(Asking), config.curriculum, dataset, trained.tokenizer, trained.ids, device)
        thoughts = stage_shape(config.curriculum, trained.facts.stage, 0, "max").thoughts
        return cls(model, data, dataset, evaluator, trained.facts.stage, thoughts)

    def batches(self, latents: EvalLatents = "max") -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
        """Of each batch: places of its questions, their prompts with so many thoughts, and where thoughts stand (B, T).

        Prompts end with the end marker, all in the last column.
        """
        ids, evaluator = self.evaluator.ids, self.evaluator
        examples = get_question_latent_dataset(
            self.stage, self.dataset, evaluator.curriculum, ids.start, ids.thought, ids.end, latents
        )
        collator = MyCollator(evaluator.tokenizer, ids.thought, align_end=True)
        size = evaluator.config.batch_size_eval
        for begin in range(0, len(self.dataset), size):
            places = list(range(begin, min(begin + size, len(self.dataset))))
            batch = {name: value.to(evaluator.device) for name, value in collator([examples[at] for at in places]).items()}
            yield places, batch, batch["input_ids"] == ids.thought

    def think(self, batch: dict[str, Tensor], changes: ThoughtInterventions | None = None) -> Thinking:
        return self.model.think(batch["input_ids"], batch["attention_mask"], batch["position_ids"], interventions=changes)

    def states(self) -> Iterator[tuple[list[int], Tensor]]:
        """Of each batch: places of its questions, and the last states (B, N, D) at the positions before their N thoughts.

        These are what the thought map of a model with latents reads; of pauses they are the states in the same places.
        """
        for places, layers in self.layers():
            yield places, layers[:, -1]

    def layers(self) -> Iterator[tuple[list[int], Tensor]]:
        """As `states`, of all layers: (B, L + 1, N, D), the input embeddings first, the last one after the final norm."""
        for places, batch, thought in self.batches():
            embeds = self.think(batch).inputs_embeds
            # One more pass over all columns, with the thoughts filled in, gives what the passes gave one by one.
            layers = self.model.base_pass(embeds, batch["attention_mask"], batch["position_ids"], None, True).layers
            before = torch.roll(thought, -1, dims=1)  # (B, T): the position before each thought
            yield places, torch.stack([states[before].unflatten(0, (len(places), -1)) for states in layers], dim=1)

    def records(self, *keys: str) -> list[dict[str, Any]]:
        """The questions' records. Raises UserError if they do not have these fields."""
        records = load_records(self.data)[: len(self.dataset)]
        if missing := [key for key in keys if not all(key in record for record in records)]:
            raise UserError(f"{self.data}: its records hold no {missing[0]}")
        return records

    def once(self, measure: Measure) -> Series:
        """What a function gives for this model, computed once for all probes that need it."""
        if measure.__name__ not in self.kept:
            self.kept[measure.__name__] = measure(self)
        return self.kept[measure.__name__]


def empty(questions: int) -> np.ndarray:
    return np.full(questions, np.nan)


def in_order(found: Series) -> Series:
    """By condition, the numbers in it as numbers: thought 2 before thought 10."""

    def key(name: str) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return {name: found[name] for name in sorted(found, key=key)}


def graph_of(record: dict[str, Any]) -> tuple[nx.DiGraph, str]:
    """The graph of a record with the fields GRAPH, by the names of its nodes, and its root."""
    names = record["idx_to_symbol"]
    return nx.DiGraph([(names[parent], names[child]) for parent, child in record["edges"]]), names[record["root"]]
