"""What a training step of each method costs at its last stage, on the same questions: forward and backward.

    python benchmarks/method_steps.py [--out results/benchmarks/method_steps.json]

A question has steps of its own, which most methods leave out at their last stage; cot writes them all. pause_as_thought takes
Coconut's very tokens in one pass, so it is what a step with thoughts costs without them. CODI and what builds on it have the
thought map that they are published with, and codi once more with thoughts that are computed together (PCCoT, three iterations).
codi_kv has eager attention, which it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import common  # first: it makes the repository importable
import torch
from datasets import Dataset
from torch import Tensor

from coconut import Coconut
from config import RunConfig
from dataset import MyCollator, get_cot_latent_dataset
from methods import LATENT, METHODS, PAUSE, Curriculum, Method, Totals
from systems.batches import EXAMPLES, POSITIONS, TOKENS, counts_of
from systems.weights import add_step_decoder
from thoughts import make_thought_map

STEP_TOKENS = 12
JACOBI = "codi, jacobi"


def questions(setting: common.Setting, count: int) -> Dataset:
    """Random ones with as many steps as there are latents."""

    def words(number: int) -> list[int]:
        return torch.randint(setting.ordinary_tokens, (number,)).tolist()

    rows = [
        {
            "idx": index,
            "question_tokenized": question[: -setting.latents - 2].tolist(),
            "steps_tokenized": [words(STEP_TOKENS) for _ in range(setting.latents)],
            "answer_tokenized": words(setting.answer_tokens),
            "before_answer": 1,
        }
        for index, question in enumerate(common.random_questions(setting, count))
    ]
    return Dataset.from_list(rows)


def batch_of(name: str, setting: common.Setting, data: Dataset, device: torch.device) -> dict[str, Tensor]:
    """All questions at the last stage of a method."""
    paths = dict.fromkeys(("name", "model_id", "train_path", "val_path"), "x")
    shape = {"c_thought": 1, "max_latent_stage": setting.latents, **({"icot_smoothing": None} if name == "icot" else {})}
    curriculum = RunConfig.model_validate({**paths, **shape, "method": name}).part(Curriculum)
    stage = METHODS[name].schedule.last(curriculum)
    thought = setting.ordinary_tokens if PAUSE in METHODS[name].markers else setting.latent  # any ordinary embedding
    examples = get_cot_latent_dataset(stage, data, curriculum, setting.start_latent, thought, setting.end_latent)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    batch = MyCollator(tokenizer, setting.latent)([examples[index] for index in range(len(data))])
    return {key: value.to(device) for key, value in batch.items() if key != "idx"} | {"idx": batch["idx"]}


def step_of(method: Method, model: Coconut, batch: dict[str, Tensor]) -> Callable[[int], float]:
    """Forward and backward; returns milliseconds."""
    counted = counts_of(batch)
    labels = {name: value for name, value in counted.items() if name not in (TOKENS, POSITIONS, EXAMPLES)}
    totals = Totals(labels, counted[EXAMPLES])
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    options = method.options and method.options(**{one.name: defaults[one.name] for one in fields(method.options)})
    inputs = {key: value for key, value in batch.items() if key != "idx"}

    def step(_: int) -> float:
        model.base_causallm.set_attn_implementation("eager" if method.reads_attention else "sdpa")
        begun = common.clock(model.embedding.weight.device)
        model.zero_grad(set_to_none=True)
        method.loss(model, inputs, totals, *([] if options is None else [options])).total.backward()
        return 1e3 * (common.clock(model.embedding.weight.device) - begun)

    return step


def steps(setting: common.Setting, data: Dataset, device: torch.device) -> tuple[dict[str, Callable[[int], float]], Any]:
    """How each method takes its step, all on one base model; and the positions of all its sequences."""
    first, found, positions = common.random_model(setting, device).train(), {}, {}
    for name in [*METHODS, JACOBI]:
        method = METHODS[name.partition(",")[0]]
        thought_map = make_thought_map("projection", first.base_causallm) if name.startswith("codi") else None
        ids = (setting.latent, setting.start_latent, setting.end_latent, setting.eos)
        model = Coconut(first.base_causallm, *ids, thought_map, 3 if name == JACOBI else None).to(device).train()
        if method.step_vectors is not None:
            add_step_decoder(model)
        batch = batch_of(name.partition(",")[0], setting, data, device)
        found[name] = step_of(method, model, batch)
        positions[name] = int(counts_of(batch)[POSITIONS])
    return found, positions


def main(argv: Sequence[str]) -> None:
    options = common.parser("What a training step of each method costs.", batch_size=4, repeats=5)
    arguments = options.parse_args(argv)
    setting, device = common.prepare(arguments)
    data = questions(setting, arguments.batch_size)
    taken, positions = steps(setting, data, device)
    measured = common.measure(taken, arguments.warmup, arguments.repeats)
    milliseconds = {name: sorted(times)[len(times) // 2] for name, times in measured.items()}
    thinking = [name for name in METHODS if LATENT in METHODS[name].markers]
    plain = milliseconds["pause_as_thought"]
    result = {
        **common.describe(setting, arguments, device),
        "milliseconds": milliseconds,
        "positions": positions,
        "by_pause_as_thought": {name: value / plain for name, value in milliseconds.items()},
        "with_thoughts": thinking,
        "all_steps": measured,
    }
    common.write(result, arguments.out)
    header = ["method", "forward+backward ms", "by pause_as_thought", "positions"]
    print(
        common.table(header, [[name, value, f"{value / plain:.2f}", positions[name]] for name, value in milliseconds.items()])
    )


if __name__ == "__main__":
    main(sys.argv[1:])
