"""Which samples an optimizer step takes, and its batches, loaded ahead; what is counted of them.

The order depends on the seed and the epoch alone, however the samples are spread over processes.
"""

from __future__ import annotations

import functools
import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset

from coconut import IGNORE_INDEX
from dataset import MyCollator, machine_cpus
from methods import MAIN, sequence_key, sequence_name
from systems.signals import STOP_SIGNALS
from utils import UserError

Batch = dict[str, torch.Tensor]
MicroBatch = tuple[list[int], bool]  # indices; True: it only fills up, for a process that has no share of the last group
TOKENS, POSITIONS, EXAMPLES = "tokens", "positions", "examples"  # of an optimizer step, beside each sequence's labelled tokens
WINDOW = 50  # optimizer steps whose samples are sorted by length together


def epoch_order(size: int, seed: int, epoch: int, examples: int | None = None) -> np.ndarray:
    """Indices of an epoch's samples, from (seed, epoch) alone: all in random order.

    With `examples`, so many instead: the epochs then take turns through one random order after another of the whole set.
    """
    if examples is None:
        return np.random.default_rng((seed, epoch)).permutation(size)
    first, last = epoch * examples, (epoch + 1) * examples
    passes = range(first // size, (last - 1) // size + 1)
    orders = np.concatenate([np.random.default_rng((seed, number)).permutation(size) for number in passes])
    return orders[first - passes.start * size :][:examples]


def example_lengths(dataset: Dataset) -> np.ndarray:
    """(size,) tokens of each tokenised record: question, steps and answer."""
    columns = (dataset[name] for name in ("question_tokenized", "steps_tokenized", "answer_tokenized"))
    return np.array([len(q) + sum(map(len, steps)) + len(a) for q, steps, a in zip(*columns, strict=True)])


def group_by_length(order: np.ndarray, lengths: np.ndarray, per_step: int, seed: tuple[int, int]) -> np.ndarray:
    """The samples of an epoch in another order: those of an optimizer step are of like length, so that little is padding.

    WINDOW steps' samples are sorted at a time; steps then come in random order. The last, shorter step stays what it was.
    order: indices. lengths: of all samples. per_step: samples of a step of all processes together.
    """
    generator, whole = np.random.default_rng((*seed, per_step)), len(order) // per_step * per_step
    steps = []
    for begin in range(0, whole, WINDOW * per_step):
        window = order[begin : min(begin + WINDOW * per_step, whole)]
        by_length = window[np.argsort(lengths[window], kind="stable")].reshape(-1, per_step)
        steps.append(generator.permutation(by_length).ravel())
    return np.concatenate([*steps, order[whole:]])


def epoch_groups(order: np.ndarray, batch_size: int, accumulation: int, rank: int, world_size: int) -> list[list[MicroBatch]]:
    """This process's micro-batches of each optimizer step, through the indices in `order`.

    A step takes the same batch_size * accumulation * world_size samples however they are spread over processes. The last,
    shorter group is spread evenly.
    """
    per_step = batch_size * accumulation * world_size
    groups = []
    for start in range(0, len(order), per_step):
        samples = order[start : start + per_step]
        micro_steps = math.ceil(len(samples) / (batch_size * world_size))
        shares = np.array_split(samples, micro_steps * world_size)[rank::world_size]
        groups.append([(share.tolist() or [int(samples[0])], len(share) == 0) for share in shares])
    return groups


@dataclass(frozen=True)
class Batching:
    """The part of a configuration that says of which samples optimizer steps are made; `RunConfig` explains the keys."""

    seed: int
    examples_per_epoch: int | None
    group_by_length: bool
    batch_size_training: int
    gradient_accumulation_steps: int
    num_workers: int | None


class Samples:
    """The tokenised training records of a file, and which of them each optimizer step takes on each process."""

    def __init__(self, config: Batching, dataset: Dataset, path: str, rank: int = 0, world_size: int = 1) -> None:
        self.config = config
        self.dataset = dataset
        self.path = path
        self.rank, self.world_size = rank, world_size
        self.lengths = example_lengths(dataset) if config.group_by_length else None

    @property
    def per_step(self) -> int:
        """Samples of an optimizer step of all processes together; the last step of an epoch may have fewer."""
        return self.config.batch_size_training * self.config.gradient_accumulation_steps * self.world_size

    def groups(self, epoch: int, done: int = 0, steps: int = 0) -> list[list[MicroBatch]]:
        """This process's micro-batches of each optimizer step of an epoch, after its first `done` samples in `steps` steps."""
        config = self.config
        order = epoch_order(len(self.dataset), config.seed, epoch, config.examples_per_epoch)
        if self.lengths is not None:
            if done and done != steps * self.per_step:
                raise UserError("group_by_length: inside an epoch a run goes on with the global batch that it began with only")
            order = group_by_length(order, self.lengths, self.per_step, (config.seed, epoch))
        size, accumulation = config.batch_size_training, config.gradient_accumulation_steps
        return epoch_groups(order[done:], size, accumulation, self.rank, self.world_size)


def cut(order: Sequence[int], widths: Sequence[int], rows: int, room: int | None = None) -> list[list[int]]:
    """Batches of neighbours in an order of items: at most `rows`, and no more than fit into `room` positions, but one at least.

    widths: positions of each item, which `order` holds the number of. Every item of a batch takes those of its widest one.
    """
    batches: list[list[int]] = []
    widest = 0
    for item in order:
        widest = max(widest, widths[item])
        count = len(batches[-1]) + 1 if batches else 1
        if not batches or count > rows or (room is not None and count * widest > room):
            batches.append([])
            widest = widths[item]
        batches[-1].append(item)
    return batches


def collated(examples: Dataset, collator: MyCollator, micro_batch: MicroBatch) -> Batch:
    """The padded batch of a micro-batch; one that only fills up carries no label."""
    indices, filler = micro_batch
    batch = collator(examples.__getitems__(indices))
    for key in batch if filler else ():
        if key.endswith("labels"):
            batch[key].fill_(collator.label_pad_token_id)
    return batch


def batch_loader(
    examples: Dataset, micro_batches: Sequence[MicroBatch], collator: MyCollator, num_workers: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated micro-batches in order, prepared by `num_workers` processes; None chooses from the machine."""
    cpus = max(1, machine_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # shared with torchrun's other processes
    workers = min(4, cpus - 1) if num_workers is None else num_workers
    loader = torch.utils.data.DataLoader(
        cast("Any", micro_batches),
        batch_size=None,
        collate_fn=functools.partial(collated, examples, collator),
        num_workers=min(workers, len(micro_batches)),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),  # else each new loader draws from the generator of dropout, and resuming is not exact
    )
    return iter(loader)


def _ignore_stop_signals(worker: int) -> None:
    """Torchrun, SLURM and Ctrl-C signal all processes of a job; training still needs its batches for the last step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def labelled_tokens(batch: Batch, name: str = MAIN) -> float:
    """Labelled tokens of a sequence of a micro-batch, as the loss counts them."""
    return float((batch[sequence_key(name, "labels")][:, 1:] != IGNORE_INDEX).sum())


def counts_of(batch: Batch) -> dict[str, float]:
    """Of a micro-batch: labelled tokens of each sequence by its name, all tokens, and examples (0 where it only fills up)."""
    names = [sequence_name(key) for key in batch if key.endswith("labels")]
    labelled = {name: labelled_tokens(batch, name) for name in names}
    masks = [batch[sequence_key(name, "attention_mask")] for name in names]
    tokens, positions = sum(float(mask.sum()) for mask in masks), float(sum(mask.numel() for mask in masks))
    return {**labelled, TOKENS: tokens, POSITIONS: positions, EXAMPLES: len(batch["idx"]) if labelled[MAIN] else 0}


def described(batches: list[Batch], losses: list[torch.Tensor], items: float) -> list[dict[str, Any]]:
    """Of each micro-batch its loss per labelled token, its labelled tokens, and its questions by their index in the file.

    losses: each divided by `items`, as `Trainer._accumulate_gradients` returns them.
    """
    return [
        {
            "loss": float(loss) * items / max(1.0, labelled_tokens(batch)),
            "labelled_tokens": int(labelled_tokens(batch)),
            "questions": batch["idx"].tolist(),
        }
        for batch, loss in zip(batches, losses, strict=True)
    ]
