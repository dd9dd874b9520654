"""From JSON records to batches: tokenising, the examples of each stage, and the collator (paper, section 3 and figure 2).

A record is {"question": str, "answer": str, "steps": [str, ...]}; further fields are carried along in the column `extra`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from coconut import IGNORE_INDEX
from methods import (
    ANSWER_AT,
    MAIN,
    MARKERS,
    METHODS,
    Curriculum,
    EvalLatents,
    Parts,
    StageShape,
    TokenSequence,
    sequence_key,
    stage_shape,
)
from utils import UserError, parse_json, read_text

# --- records ---


def load_records(path: str | Path) -> list[dict[str, Any]]:
    """The validated records of a JSON file. Raises UserError naming file, index, field and reason."""
    return parse_records(read_text(Path(path)), path)


def parse_records(text: str, path: str | Path) -> list[dict[str, Any]]:
    records = parse_json(text, path)
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of records, found {_type_name(records)}")
    if not records:
        raise UserError(f"{path}: the data set is empty; expected at least one record")
    for index, record in enumerate(records):
        if problem := record_problem(record):
            raise UserError(f"{path}: record {index}: {problem}")
    return records


def record_problem(record: object) -> str | None:
    """Why this is not a record, naming the field; None if it is one."""
    if not isinstance(record, dict):
        return f"expected an object with question, answer and steps, found {_type_name(record)}"
    if missing := [field for field in ("question", "answer", "steps") if field not in record]:
        without = '; a question without reasoning has "steps": []' if missing == ["steps"] else ""
        return f"field '{missing[0]}' is missing{without}"
    if not isinstance(record["steps"], list):
        return f"field 'steps': expected a list of strings, found {_type_name(record['steps'])}"
    steps = {f"steps[{number}]": step for number, step in enumerate(record["steps"])}
    for field, text in {"question": record["question"], "answer": record["answer"], **steps}.items():
        if not isinstance(text, str):
            return f"field '{field}': expected a string, found {_type_name(text)}"
        if field in ("question", "answer") and not text.strip():
            return f"field '{field}' is blank"
        if problem := text_problem(text):
            return f"field '{field}' {problem}"
    return None


def text_problem(text: str) -> str | None:
    """Why a text cannot be tokenised as what it says; None if it can."""
    if problem := half_character(text):
        return problem
    found = next((marker for marker in MARKERS if marker in text), None)
    return f"holds {found}, which stands for a thought: questions must not bring their own" if found else None


def half_character(text: str) -> str | None:
    """That a text holds half a surrogate pair, which JSON allows and no file can take; None if it holds none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character ({text[error.start]!a} alone)"
    return None


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def row_of(index: int, record: dict[str, Any]) -> dict[str, Any]:
    extra = {key: value for key, value in record.items() if key not in ("question", "answer", "steps")}
    return {
        "idx": index,
        "question": record["question"],
        "answer": record["answer"],
        "steps": [step for step in record["steps"] if step.strip()],  # an empty rationale is no step, not a blank one
        "extra": json.dumps(extra) if extra else "",
    }


# --- stages ---


@dataclass
class _StageExamples:
    """Lazy transform of the tokenised data set into prompts, or into training sequences with labels."""

    curriculum: Curriculum
    stage: int
    start_id: int
    thought_id: int
    end_id: int
    epoch: int = 0
    with_labels: bool = True
    latents: EvalLatents = "gold"

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns = [rows[name] for name in ("idx", "question_tokenized", "steps_tokenized", "answer_tokenized")]
        before_answer = rows.get("before_answer") or [0] * len(rows["idx"])  # only sequences with labels need it
        examples = [self._example(*values) for values in zip(*columns, before_answer, strict=True)]
        return {key: [example[key] for example in examples] for key in examples[0]}

    def _example(
        self, idx: int, question: list[int], steps: list[list[int]], answer: list[int], before_answer: int
    ) -> dict[str, Any]:
        method = METHODS[self.curriculum.method]
        stage = self.stage
        if self.with_labels:
            stage = method.schedule.sample(self.curriculum, stage, self.epoch, idx, len(steps))
        shape = stage_shape(self.curriculum, stage, len(steps), self.latents)
        thoughts = [self.thought_id] * shape.thoughts
        if method.brackets:
            thoughts = [self.start_id, *thoughts, self.end_id]
        prompt = question + thoughts
        if not self.with_labels:
            return {**_tensors(prompt), "idx": idx}
        parts = Parts(question, prompt, steps, answer, shape, self.curriculum, self.thought_id)
        sequences = {MAIN: TokenSequence(prompt, shape.remaining(steps) + answer)}
        sequences |= {} if method.sequences is None else method.sequences(parts)
        example: dict[str, Any] = {"idx": idx}
        for name, (before, target, has_answer) in sequences.items():
            values = {**_tensors(before + target), "labels": [IGNORE_INDEX] * len(before) + target}
            if method.sequences is not None and has_answer:
                values[ANSWER_AT] = len(before) + len(target) - len(answer) + before_answer
            example |= {sequence_key(name, key): value for key, value in values.items()}
        return example


def _tensors(ids: list[int]) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids)))}


def get_cot_latent_dataset(
    scheduled_stage: int,
    base_dataset: Dataset,
    configs: Curriculum,
    start_id: int,
    latent_id: int,
    end_id: int,
    epoch: int = 0,
) -> Dataset:
    """Training sequences of a stage, built when they are read: input_ids, labels, attention_mask, position_ids, idx.

    latent_id: the token in a thought's place: `<|latent|>`, or `<pause>` for the methods that put it there.
    """
    return base_dataset.with_transform(_StageExamples(configs, scheduled_stage, start_id, latent_id, end_id, epoch))


def get_question_latent_dataset(
    scheduled_stage: int,
    base_dataset: Dataset,
    configs: Curriculum,
    start_id: int,
    latent_id: int,
    end_id: int,
    latents: EvalLatents = "gold",
) -> Dataset:
    """Prompts of a stage (question, markers, latents): input_ids, attention_mask, position_ids, idx.

    latents: how many, see `stage_shape`.
    """
    examples = _StageExamples(configs, scheduled_stage, start_id, latent_id, end_id, with_labels=False, latents=latents)
    return base_dataset.with_transform(examples)


def check_lengths(
    datasets: Sequence[Dataset],
    curriculum: Curriculum,
    max_new_tokens: int,
    positions: int | None,
    latents: EvalLatents = "gold",
) -> None:
    """Raise UserError naming the first record that needs more positions than the model has, trained or answered.

    latents: how many an answer gets, see `stage_shape`.
    """
    if positions is None:
        return
    method = METHODS[curriculum.method]
    markers = 2 if method.brackets else 0

    @functools.cache
    def shapes_of(steps: int) -> tuple[list[StageShape], int]:
        """Of a question in training at every stage (tokens that icot removes one by one count), and its most thoughts."""
        shapes = [stage_shape(curriculum, stage, steps) for stage in range(curriculum.max_latent_stage + 1)]
        asked = stage_shape(curriculum, curriculum.max_latent_stage, steps, latents)
        return shapes, max(shape.thoughts for shape in [*shapes, asked])

    for dataset in datasets:
        columns = (dataset[name] for name in ("question_tokenized", "steps_tokenized", "answer_tokenized"))
        for index, (question, steps, answer) in enumerate(zip(*columns, strict=True)):
            shapes, thoughts = shapes_of(len(steps))
            trained = max(shape.thoughts + sum(map(len, steps[shape.steps_removed :])) for shape in shapes)
            needed = len(question) + markers + max(trained + len(answer), thoughts + max_new_tokens)
            if method.sequences is not None:
                prompt = question + [0] * (markers + thoughts)
                parts = Parts(question, prompt, steps, answer, StageShape(thoughts, 0), curriculum)
                needed = max([needed, *(len(one.prompt) + len(one.target) for one in method.sequences(parts).values())])
            if needed > positions:
                raise UserError(
                    f"record {index} needs up to {needed} positions (max_new_tokens included); the model has {positions}"
                )


# --- batches ---


def machine_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class MyCollator:
    """Examples to one padded batch of tensors (B, T) int64: input_ids, attention_mask, position_ids, labels if given, idx (B,).

    Rows are padded on the left until every row's first latent stands in one column, so that all columns before it are one
    pass; the rest is padded on the right. With `align_end` all padding is on the left, as generation needs it.
    Position ids count real tokens and are 0 on padding. Further sequences of a method are padded alike, each for itself.
    """

    tokenizer: PreTrainedTokenizerBase
    latent_id: int
    label_pad_token_id: int = IGNORE_INDEX
    align_end: bool = False

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        for key in examples[0]:
            if key.endswith("input_ids"):
                batch |= self._padded(examples, key.removesuffix("input_ids"))
        batch["idx"] = torch.tensor([example["idx"] for example in examples])
        return batch

    def _padded(self, examples: Sequence[dict[str, Any]], prefix: str) -> dict[str, torch.Tensor]:
        rows = [example[prefix + "input_ids"] for example in examples]
        left = self._left_padding(rows)
        width = max(pad + len(row) for pad, row in zip(left, rows, strict=True))
        fill = {"input_ids": pad_token_id(self.tokenizer), "attention_mask": 0, "position_ids": 0}
        if prefix + "labels" in examples[0]:
            fill["labels"] = self.label_pad_token_id
        batch = {}
        for key, value in fill.items():
            padded = np.full((len(examples), width), value, dtype=np.int64)
            for row, pad, example in zip(padded, left, examples, strict=True):
                row[pad : pad + len(example[prefix + key])] = example[prefix + key]
            batch[prefix + key] = torch.from_numpy(padded)
        if prefix + ANSWER_AT in examples[0]:
            at = [pad + example[prefix + ANSWER_AT] for pad, example in zip(left, examples, strict=True)]
            batch[prefix + ANSWER_AT] = torch.tensor(at)
        return batch

    def _left_padding(self, rows: Sequence[list[int]]) -> list[int]:
        if self.align_end:
            longest = max(map(len, rows))
            return [longest - len(row) for row in rows]
        first = [row.index(self.latent_id) if self.latent_id in row else None for row in rows]
        column = max((at for at in first if at is not None), default=0)
        return [0 if at is None else column - at for at in first]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token; any token will do where the attention mask is 0, so EOS stands in where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
