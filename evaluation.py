"""Loss, accuracy and predictions over a data set, spread over all processes; every question counts once."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from coconut import Coconut
from dataset import IGNORE_INDEX, MyCollator, get_cot_latent_dataset, get_question_latent_dataset
from methods import METHODS, Curriculum, EvalLatents, sequence, stage_shape
from systems import distributed
from systems.batches import batch_loader, cut
from systems.distributed import ParallelName, unwrap
from systems.models import LatentIds
from thoughts import gather_thoughts, thought_health
from utils import UserError, is_main_process

HEALTH_QUESTIONS = 300  # of an evaluation: enough for its numbers, little memory for large models


@dataclass
class Prediction:
    """One row of predictions_<epoch>.jsonl.

    output: the generated text. answer: what follows its last "#". wrote_steps: whether text stands before the answer's "###";
    else the answer was given at once.
    """

    idx: int
    output: str
    answer: str
    gold: str
    correct: bool
    cot_match: bool
    wrote_steps: bool
    new_tokens: int


@dataclass
class Evaluation:
    """Accuracy, cot_match and wrote_steps are fractions of `questions`; loss is the mean cross entropy per labelled token.

    low, high: the 95% interval of accuracy. accuracy_at_once: of the answers that were given at once, None if there are none.
    seconds_per_question: answering time of all processes together, divided by the questions.
    health: as `thoughts.thought_health` gives it, of at most HEALTH_QUESTIONS questions; empty where there are no thoughts.
    """

    loss: float
    accuracy: float
    low: float
    high: float
    accuracy_at_once: float | None
    wrote_steps: float
    cot_match: float
    questions: int
    new_tokens: float
    seconds_per_question: float
    predictions: list[Prediction]
    health: dict[str, float]

    def metrics(self) -> dict[str, Any]:
        return {**{key: value for key, value in asdict(self).items() if key not in ("predictions", "health")}, **self.health}


@dataclass(frozen=True)
class Asking:
    """The part of a configuration that says how questions are asked; `RunConfig` explains the keys."""

    eval_latents: EvalLatents
    max_new_tokens: int
    batch_size_eval: int
    tokens_per_batch: int | None
    num_workers: int
    bf16: bool | Literal["pure"]
    parallel: ParallelName


@dataclass
class Evaluator:
    """Evaluates one model on one data set at any stage. progress: called with what was done after each batch.

    Raises UserError if eval_latents is a number and the method has no latents.
    """

    config: Asking
    curriculum: Curriculum
    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    ids: LatentIds
    device: torch.device
    progress: Callable[[str], None] = lambda done: None

    def __post_init__(self) -> None:
        latents, method = self.config.eval_latents, self.curriculum.method
        if isinstance(latents, int) and not METHODS[str(method)].markers:
            raise UserError(f"eval_latents: {latents}: a model trained with method {method} has no latents; leave it out")

    def evaluate(self, model: nn.Module, stage: int) -> Evaluation:
        """Loss, then greedy answers for all questions with `eval_latents`, with the model in evaluation mode.

        The loss is the cross entropy of what is written after the prompt; its latents are always those of the gold steps.
        """
        with self._evaluating(model):
            loss, health = self._loss(model, stage)
            began = time.perf_counter()
            predictions = self.predict(model, stage, self.config.eval_latents)
            seconds = time.perf_counter() - began
        count = len(predictions)
        return Evaluation(
            loss=loss,
            **answer_scores(predictions),
            cot_match=sum(one.cot_match for one in predictions) / count,
            questions=count,
            new_tokens=sum(one.new_tokens for one in predictions) / count,
            seconds_per_question=seconds / count,
            predictions=predictions,
            health=health,
        )

    def answers_with_fixed_latents(self, model: nn.Module, stage: int) -> list[Prediction] | None:
        """Answers with as many latents for every question; None where those of `evaluate` are that already."""
        numbers = {len(steps) for steps in self.dataset["steps"]}
        shape = functools.partial(stage_shape, self.curriculum, stage)
        if self.config.eval_latents != "gold" or all(shape(steps) == shape(steps, "max") for steps in numbers):
            return None
        return self.predict(model, stage, "max")

    def predict(self, model: nn.Module, stage: int, latents: EvalLatents) -> list[Prediction]:
        """Greedy answers for all questions with so many latents (see `stage_shape`), in the order of the questions."""
        markers = (self.ids.start, self.ids.thought, self.ids.end)
        prompts = get_question_latent_dataset(stage, self.dataset, self.curriculum, *markers, latents)
        collator = MyCollator(self.tokenizer, self.ids.latent, align_end=True)
        predictions = []
        with self._evaluating(model):
            for batch, filler in self._batches(prompts, collator, "answers", self.config.max_new_tokens):
                new = self._generate(unwrap(model), batch)
                if not filler:
                    predictions += [self._judge(int(idx), row, stage) for idx, row in zip(batch["idx"], new, strict=True)]
        gathered = [one for part in distributed.gather_objects(predictions) for one in part]
        return sorted(gathered, key=lambda one: one.idx)

    @contextlib.contextmanager
    def _evaluating(self, model: nn.Module) -> Iterator[None]:
        was_training = model.training
        model.eval()
        with torch.no_grad(), distributed.autocast(self.config.bf16, self.config.parallel, self.device):
            yield
        distributed.reshard(model)
        model.train(was_training)

    def _loss(self, model: nn.Module, stage: int) -> tuple[float, dict[str, float]]:
        """The loss, and the health of the thoughts that it was computed with."""
        # Every question at the stage that is evaluated.
        curriculum = replace(self.curriculum, uniform_prob=0.0, earlier_stage_prob=0.0, icot_smoothing=None)
        examples = get_cot_latent_dataset(stage, self.dataset, curriculum, self.ids.start, self.ids.thought, self.ids.end)
        collator = MyCollator(self.tokenizer, self.ids.latent)
        total, count = 0.0, 0.0
        share = -(-HEALTH_QUESTIONS // distributed.world_size())
        kept: list[torch.Tensor] = []
        for batch, filler in self._batches(examples, collator, "validation loss"):
            items = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            inputs = sequence(batch)
            outputs = unwrap(model)(**inputs, labelled_only=True)
            if filler:
                continue
            total, count = total + float(outputs.loss) * items, count + items
            if len(kept) < share:
                kept += _thoughts(outputs.inputs_embeds, inputs, self.ids.latent)
        total, count = distributed.all_reduce([total, count], self.device)
        every = [one for part in distributed.gather_objects(kept[:share]) for one in part]
        return total / count, thought_health(every) if every else {}

    def _generate(self, model: Coconut, batch: dict[str, torch.Tensor]) -> list[list[int]]:
        """New tokens of each row, up to and without EOS."""
        ids = model.generate(
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=self.config.max_new_tokens,
            synced_gpus=self.config.parallel == "fsdp",
        )
        rows = cast("torch.Tensor", ids)[:, batch["input_ids"].shape[1] :].tolist()
        return [row[: row.index(self.ids.eos)] if self.ids.eos in row else row for row in rows]

    def _judge(self, idx: int, new: list[int], stage: int) -> Prediction:
        record = self.dataset[idx]
        output = str(self.tokenizer.decode(new, skip_special_tokens=True))
        shape = stage_shape(self.curriculum, stage, len(record["steps"]))
        expected = str(self.tokenizer.decode(shape.remaining(record["steps_tokenized"]), skip_special_tokens=True))
        answer, gold = written_answer(output), clean_answer(record["answer"])
        return Prediction(
            idx=record["idx"],
            output=output,
            answer=answer,
            gold=gold,
            correct=answer == gold,
            cot_match=_lines(output.split("#")[0]) == _lines(expected),
            wrote_steps=wrote_steps(output),
            new_tokens=len(new),
        )

    def _batches(self, examples: Dataset, collator: MyCollator, title: str, new_tokens: int = 0) -> Any:
        """(batch on the device, whether it repeats another): this process's share, questions of like length together.

        new_tokens: for which there must be room beside the examples, where tokens_per_batch counts.

        Sharded models take every pass together, so there all processes get equally many batches.
        """
        lengths = [len(ids) for ids in self.dataset["question_tokenized"]]
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        size, world = self.config.batch_size_eval, distributed.world_size()
        room = self.config.tokens_per_batch
        widths = [0] * len(order) if room is None else [len(one["input_ids"]) + new_tokens for one in examples]
        most = -(-len(order) // world)  # a small set still gives every process its share
        rows = min(size, most) if room is None else most
        chunks = [(chunk, False) for chunk in cut(order, widths, rows, room)]
        mine = chunks[distributed.rank() :: world]
        if self.config.parallel == "fsdp" and len(mine) < -(-len(chunks) // world):
            mine.append((chunks[0][0], True))
        loader = batch_loader(examples, mine, collator, self.config.num_workers)
        bar = tqdm(loader, total=len(mine), desc=title, leave=False, disable=not is_main_process())
        for number, (batch, (_, filler)) in enumerate(zip(bar, mine, strict=True), start=1):
            yield {key: value.to(self.device) for key, value in batch.items()}, filler
            self.progress(f"{title}, batch {number} of {len(mine)}")


def _thoughts(embeds: torch.Tensor, inputs: dict[str, torch.Tensor], latent_id: int) -> list[torch.Tensor]:
    """Of each row with latents its thoughts (N, D), by the mean norm of its other embeddings; float32 on the CPU."""
    latent = inputs["input_ids"] == latent_id
    if not latent.any():
        return []
    text = (inputs["attention_mask"] > 0) & ~latent
    norms = (embeds.float().norm(dim=-1) * text).sum(dim=1) / text.sum(dim=1)
    thoughts = (gather_thoughts(embeds, latent).float() / norms[:, None, None]).cpu()
    return [own[:count] for own, count in zip(thoughts, latent.sum(dim=1).tolist(), strict=True) if count]


def answer_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """accuracy, low, high, accuracy_at_once and wrote_steps, as `Evaluation` has them."""
    correct = sum(one.correct for one in predictions)
    at_once = [one.correct for one in predictions if not one.wrote_steps]
    low, high = interval(correct, len(predictions))
    return {
        "accuracy": correct / len(predictions),
        "low": low,
        "high": high,
        "accuracy_at_once": sum(at_once) / len(at_once) if at_once else None,
        "wrote_steps": 1 - len(at_once) / len(predictions),
    }


def written_answer(output: str) -> str:
    """What follows the last "#", without commas and outer blanks; empty where there is no "#"."""
    return clean_answer(output.rsplit("#", 1)[1]) if "#" in output else ""


def wrote_steps(output: str) -> bool:
    """Whether text stands before the answer's "###"; a text without any is all steps."""
    return bool(output.rsplit("#", 1)[0].strip("# \n"))


def clean_answer(text: str) -> str:
    return text.replace(",", "").strip()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def interval(correct: int, total: int) -> tuple[float, float]:
    """95% Wilson score interval of a fraction (Wilson 1927). Not scipy's: that takes a second to import, at each start."""
    squared = NormalDist().inv_cdf(0.975) ** 2
    share = correct / total
    half = math.sqrt(squared * (share * (1 - share) / total + squared / (4 * total**2)))
    low, high = ((share + squared / (2 * total) + sign * half) / (1 + squared / total) for sign in (-1, 1))
    return (low if correct else 0.0), (high if correct < total else 1.0)
