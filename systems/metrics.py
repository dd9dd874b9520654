"""What a run tells: metrics.jsonl always, wandb if wanted, tables on the terminal of rank 0."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from evaluation import Prediction
from methods import ALL_TOKENS, Curriculum, scheduled_stage, stage_shape
from systems import distributed
from systems.batches import Samples
from systems.writing import append_jsonl, fsync, replacing, write_jsonl, write_text, writing
from utils import Config, UserError, check_regular, get_logger, is_main_process, telling

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Outputs:
    """The part of a configuration that says where a run tells what it does; `RunConfig` explains the keys."""

    save_dir: Path
    debug: bool
    name: str
    project: str
    wandb: Literal["online", "offline", "disabled"]


class Reporter:
    """Writes on rank 0 and does nothing on the others. `rows` counts the rows of metrics.jsonl.

    settings: the whole configuration, for wandb.
    keep_rows: rows that stay of a metrics.jsonl that is there already; None keeps all.
    failure: why a row could not be written. `flush` raises it, where all processes can stop together.
    """

    def __init__(self, config: Outputs, settings: dict[str, Any], keep_rows: int | None, wandb_id: str | None = None) -> None:
        self.active = is_main_process()
        self.path = path = None if config.debug else config.save_dir / METRICS
        self.failure: UserError | None = None
        self.wandb: Any = None
        self.rows: int = 0 if path is None else distributed.run_on_main(lambda: _truncate(path, keep_rows))
        mode = "disabled" if config.debug else config.wandb
        if self.active and mode != "disabled":
            self.wandb = start_wandb(
                config.project, config.name, mode, id=wandb_id, resume="allow", dir=str(config.save_dir), config=settings
            )

    @property
    def wandb_id(self) -> str | None:
        return self.wandb.id if self.wandb is not None else None

    def row(self, kind: str, values: dict[str, Any]) -> None:
        """One object: a logged step, an epoch, or an evaluation."""
        if not self.active:
            return
        if self.path is not None and self.failure is None:
            try:
                append_jsonl(self.path, {"kind": kind, **values})
                self.rows += 1
            except UserError as error:
                self.failure = error
        if self.wandb is not None:
            numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
            self.wandb.log(numbers, step=values["step"])

    def flush(self) -> None:
        """Make the rows so far outlast a power failure. Raises UserError if one could not be written."""
        if self.failure is not None:
            raise self.failure
        if self.path is not None and self.path.exists():
            with writing(self.path):
                fsync(self.path)

    def first_batch(self, batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, epoch: int, step: int) -> None:
        """The first batch of an epoch to wandb, token by token: what stands in it and which tokens carry loss."""
        if self.wandb is None:
            return
        import wandb

        table = wandb.Table(columns=["row", "token id", "label", "text"])
        columns = (batch[key].tolist() for key in ("input_ids", "labels", "attention_mask"))
        for number, row in enumerate(zip(*columns, strict=True)):
            for token, label, real in zip(*row, strict=True):
                if real:
                    table.add_data(number, token, label, tokenizer.decode([token]))
        self.wandb.log({f"first batch of epoch {epoch}": table}, step=step)

    def finish(self) -> None:
        """The end, for all processes. Raises UserError on all of them if a row could not be written."""
        distributed.run_on_main(self.flush)
        if self.wandb is not None:
            self.wandb.finish()


def _truncate(path: Path, keep_rows: int | None) -> int:
    """Drop the rows that an interrupted run wrote after the checkpoint from which it is resumed, and a row cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_regular(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n")][:keep_rows]
    if keep_rows is not None and len(kept) < keep_rows:
        get_logger().warning(f"{path}: {len(kept)} rows are there, {keep_rows} were written before the checkpoint")
    if len(kept) < len(lines):
        with replacing(path) as partial:
            partial.write_bytes(b"".join(kept))
    return len(kept)


def start_wandb(project: str, name: str | None, mode: str, **more: Any) -> Any:
    """wandb.init, offline where nobody has logged in. mode: online or offline."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if mode == "online" and not wandb.api.api_key:
        get_logger().info("wandb: no login found, logging offline (wandb login, or set wandb: offline or disabled)")
        mode = "offline"
    return wandb.init(project=project, name=name, mode=cast("Literal['online', 'offline']", mode), **more)


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich would end the process with exit code 1
        raise BrokenPipeError


def show(table: Table) -> None:
    if is_main_process():
        with telling():
            console = _Console(highlight=False)
            width = 100 if console.is_terminal else table.__rich_measure__(console, console.options.update(width=500)).maximum
            console.width = max(width, console.width)
            console.print(table)
            sys.stdout.flush()


def schedule_table(curriculum: Curriculum, samples: Samples, epochs: range, steps_per_epoch: int) -> Table:
    """Which epochs are which stage, how many latents each has, how many optimizer steps. epochs: those to come, from 0."""
    config = samples.config
    sizes = f"{samples.world_size} x {config.batch_size_training} x {config.gradient_accumulation_steps} accumulated"
    title = f"{curriculum.method}: {len(samples.dataset):,} examples, global batch {samples.per_step} ({sizes})"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "epochs", "steps removed", "latent tokens", "optimizer steps"):
        table.add_column(column, justify="right")
    for stage, group in itertools.groupby(epochs, key=functools.partial(scheduled_stage, curriculum)):
        numbers = [epoch + 1 for epoch in group]
        latents, removed, tokens = stage_shape(curriculum, stage, 1000)
        gone = "all" if removed == 1000 or tokens == ALL_TOKENS else f"{tokens} tokens" if tokens else str(removed)
        most = "" if curriculum.pad_latent_to_max or not latents else "at most "
        these = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        table.add_row(str(stage), these, gone, f"{most}{latents}", f"{len(numbers) * steps_per_epoch:,}")
    return table


def epoch_table(rows: list[dict[str, Any]]) -> Table:
    """The epochs so far of this process, the newest last."""
    table = Table()
    parts = [key for key in rows[-1] if key.startswith("loss_")]
    losses = ["train loss", *(key.replace("_", " ") for key in parts), "val loss"]
    for column in ("epoch", "stage", "latents", *losses, "accuracy", "steps right", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["epoch"]),
            str(row["stage"]),
            str(row["latents"]),
            *("-" if row.get(key) is None else f"{row[key]:.4f}" for key in ("train_loss", *parts)),
            f"{row['val_loss']:.4f}",
            f"{100 * row['accuracy']:.1f}%",
            f"{100 * row['cot_match']:.1f}%",
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    return table


def save_predictions(config: Outputs, epoch: int, predictions: Sequence[Prediction], kind: str = "predictions") -> None:
    """KIND_<epoch>.jsonl, for all processes. Raises UserError on all of them if it cannot be written."""
    rows = [asdict(one) for one in predictions]
    if not config.debug:
        distributed.run_on_main(lambda: write_jsonl(config.save_dir / f"{kind}_{epoch}.jsonl", rows))


def save_nonfinite(config: Outputs, facts: dict[str, Any], processes: list[list[dict[str, Any]]]) -> str:
    """nonfinite_step_<n>.json: of what an optimizer step was made whose loss or gradients are not finite; for all processes.

    facts: of the step. processes: of each process its micro-batches: {"loss", "labelled_tokens", "questions"}.
    Returns words that say where the file is, or why it is not there.
    """
    if config.debug:
        return "with debug: False a file would say of which questions it was made"
    path = config.save_dir / f"nonfinite_step_{facts['step']}.json"
    ranks = [{"rank": rank, "micro_batches": batches} for rank, batches in enumerate(processes)]
    record = {**facts, "questions_are": "indices of records in train_path, from 0", "processes": ranks}
    text = json.dumps(strict(record), indent=1, allow_nan=False) + "\n"
    try:
        distributed.run_on_main(lambda: write_text(path, text))
    except UserError as error:  # what it should tell of is the worse problem
        return str(error)
    return f"its questions are in {path}"


def strict(value: Any) -> Any:
    """The same with "nan", "inf" and "-inf" as strings, since JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    return [strict(entry) for entry in value] if isinstance(value, list) else value


def print_config(config: Config) -> None:
    """The resolved configuration, once."""
    get_logger().info(yaml.safe_dump(config.model_dump(), sort_keys=False).rstrip())
