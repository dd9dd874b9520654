"""The training loop: epochs of a stage, optimizer steps over micro-batches, evaluation, checkpoints."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from config import RunConfig
from dataset import MyCollator, get_cot_latent_dataset
from evaluation import Evaluation, Evaluator
from methods import MAIN, Curriculum, Loss, Totals, first_epoch, last_stage_share, scheduled_stage, stage_at, stage_shape
from systems import checkpoint, distributed
from systems.batches import EXAMPLES, POSITIONS, TOKENS, Batch, MicroBatch, Samples, batch_loader, counts_of, described
from systems.files import Facts, TrainingState, read_training_state
from systems.machine import machine
from systems.metrics import Outputs, Reporter, epoch_table, save_nonfinite, save_predictions, show, strict
from systems.optimization import Optimization, learning_rate, new_optimizer
from systems.signals import StopRequest
from utils import UserError, get_logger, is_main_process

SKIPPED_IN_A_ROW = 20  # with nonfinite_loss: skip; after so many steps it is not the data


class EvaluationStopped(Exception):
    """A signal asked to stop in the middle of an evaluation."""


@dataclass
class InterruptibleEvaluator(Evaluator):
    """An evaluation that all processes leave together, between two batches, when one of them is asked to stop."""

    stop: StopRequest = field(default_factory=StopRequest)

    def _batches(self, examples: Dataset, collator: MyCollator, title: str, new_tokens: int = 0) -> Iterator[Any]:
        """As in Evaluator. Raises EvaluationStopped; processes with fewer batches wait for the others."""
        batches = super()._batches(examples, collator, title, new_tokens)
        while True:
            batch = next(batches, None)
            more, stopped = distributed.all_reduce([float(batch is not None), float(self.stop.requested)], self.device)
            if stopped:
                raise EvaluationStopped
            if not more:
                return
            if batch is not None:
                yield batch


@dataclass(frozen=True)
class Loop:
    """The part of a configuration about epochs and optimizer steps; `RunConfig` explains the keys."""

    num_epochs: int
    bf16: bool | Literal["pure"]
    parallel: distributed.ParallelName
    fsdp_gather: distributed.GatherName
    grad_clip: float | None
    reset_optimizer: bool | Literal["epoch"]
    nonfinite_loss: Literal["stop", "skip"]
    advance_accuracy: float | None
    advance_cot_match: float | None
    log_every: int


class Trainer:
    """Everything that one run changes: the wrapped model, the optimizer, and the state that a checkpoint saves."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        samples: Samples,
        evaluator: InterruptibleEvaluator,
        facts: Facts,
        resume_from: Path | None = None,
    ) -> None:
        """facts: what checkpoints say of the run; `facts.epoch` epochs count as done."""
        self.loop = config.part(Loop)
        self.optimization = config.part(Optimization)
        self.saving = config.part(checkpoint.Saving)
        self.outputs = config.part(Outputs)
        self.curriculum = evaluator.curriculum
        self.model = model
        self.samples = samples
        self.evaluator = evaluator
        self.device = evaluator.device
        self.facts = facts
        self.machine = machine(self.device)
        self.history: list[dict[str, Any]] = []
        self.stop = evaluator.stop
        self.progress = evaluator.progress
        self.writer = checkpoint.Writer(self.saving.async_save)
        self.saved: tuple[int, int] | None = None  # (epoch, step in it) of the newest checkpoint
        self.state = TrainingState(epoch=facts.epoch, optimizer_stage=stage_at(self.curriculum, facts.epoch, 0, 1))
        self.optimizer = self._new_optimizer()
        if resume_from is not None:
            self._resume(resume_from)
        self.reporter = Reporter(self.outputs, config.model_dump(), self.state.metrics_rows, self.state.wandb_id)
        self.state.wandb_id = self.reporter.wandb_id

    def _resume(self, directory: Path) -> None:
        loaded = read_training_state(directory)
        self.state = state = TrainingState(**loaded["state"])
        if state.samples_in_epoch < 0:
            state.samples_in_epoch = state.step_in_epoch * self.samples.per_step
        self.saved = (state.epoch, state.step_in_epoch)
        checkpoint.restore(directory, loaded, self.model, self.optimizer)
        get_logger().info(f"resuming from {directory}: epoch {state.epoch + 1}, after step {state.global_step}")

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return new_optimizer(self.model, self.optimization)

    # --- the loop ---

    def fit(self) -> bool:
        """Train until num_epochs, or until a signal asks to stop. Returns whether training is complete."""
        with self.stop.listening():
            try:
                return self._epochs()
            except UserError:
                self.writer.settle()  # a checkpoint that is being written is not lost with the run
                raise

    def _epochs(self) -> bool:
        while self.state.epoch < self.loop.num_epochs:
            if not self._epoch():
                self._save_inside_epoch()
                self.writer.wait()
                get_logger().info(f"stopped by a signal at step {self.state.global_step}; the same command goes on from here")
                return False
        self.writer.wait()
        return True

    def _epoch(self) -> bool:
        """What is left of the epoch in progress, its evaluation and its checkpoint; False if it was cut short."""
        if self._asked_to_stop() or not self._train_epoch():
            return False
        stage = scheduled_stage(self.curriculum, self.state.epoch)
        try:
            evaluation = self.evaluator.evaluate(self.model, stage)
        except EvaluationStopped:  # nothing is lost: a checkpoint at the epoch's last step is evaluated first
            return False
        self._finish_epoch(stage, evaluation)
        return True

    def _asked_to_stop(self) -> bool:
        """Whether some process was asked to stop, or cannot write any more."""
        return distributed.all_reduce([float(self._must_stop)], self.device)[0] > 0

    @property
    def _must_stop(self) -> bool:
        """Whether this process was. What could not be written is raised by all processes when they save."""
        return self.stop.requested or self.reporter.failure is not None or self.writer.failure is not None

    def _renew_optimizer(self, stage: int) -> None:
        """A fresh optimizer where reset_optimizer asks for it: on a new stage, or on every epoch."""
        new_epoch = self.loop.reset_optimizer == "epoch" and self.state.step_in_epoch == 0
        new_stage = self.loop.reset_optimizer is True and stage != self.state.optimizer_stage
        self.state.optimizer_stage = stage
        if self.state.global_step > 0 and (new_epoch or new_stage):
            self.optimizer = self._new_optimizer()

    def _train_epoch(self) -> bool:
        """The rest of the epoch in progress, stage by stage; False if a signal cut it short."""
        self.model.train()
        state, done = self.state, self.state.step_in_epoch
        groups = self.samples.groups(state.epoch, state.samples_in_epoch, done)  # of micro-batches, one for each step left
        stages = [stage_at(self.curriculum, self.state.epoch, done + step, done + len(groups)) for step in range(len(groups))]
        for stage, part in itertools.groupby(zip(stages, groups, strict=True), key=lambda pair: pair[0]):
            self._renew_optimizer(stage)
            if not self._train_steps(stage, [group for _, group in part], done + len(groups)):
                return False
        return True

    def _train_steps(self, stage: int, groups: list[list[MicroBatch]], steps_in_epoch: int) -> bool:
        """Optimizer steps of one stage; False if a signal cut them short."""
        loader = self._loader(stage, groups)
        title = f"epoch {self.state.epoch + 1}/{self.loop.num_epochs} stage {stage}"
        bar = tqdm(groups, desc=title, leave=False, disable=not is_main_process(), mininterval=1)
        for group in bar:
            began = time.perf_counter()
            batches = [next(loader) for _ in group]
            if self.state.step_in_epoch == 0:
                self.reporter.first_batch(batches[0], self.evaluator.tokenizer, self.state.epoch + 1, self.state.global_step)
            self._set_learning_rate(steps_in_epoch)
            losses, stop = self._optimizer_step(batches)
            self.progress(f"step {self.state.global_step}")
            self.state.epoch_seconds += time.perf_counter() - began
            self._log_step(losses, stage, bar)
            if stop:
                return False
            every = self.saving.save_every_steps
            if every and self.state.global_step % every == 0 and self.state.step_in_epoch < steps_in_epoch:
                self._save_inside_epoch()
        return True

    def _loader(self, stage: int, groups: list[list[MicroBatch]]) -> Iterator[Batch]:
        ids = self.evaluator.ids
        examples = get_cot_latent_dataset(
            stage, self.samples.dataset, self.curriculum, ids.start, ids.thought, ids.end, self.state.epoch
        )
        micro_batches = [micro_batch for group in groups for micro_batch in group]
        return batch_loader(
            examples, micro_batches, MyCollator(self.evaluator.tokenizer, ids.latent), self.samples.config.num_workers
        )

    def _set_learning_rate(self, steps_in_epoch: int) -> None:
        state = self.state
        epochs = state.epoch + state.step_in_epoch / steps_in_epoch
        share = last_stage_share(self.curriculum, epochs, self.loop.num_epochs)
        steps = (self.loop.num_epochs - self.facts.epoch) * steps_in_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optimization, state.global_step, steps, share)

    def _optimizer_step(self, batches: list[Batch]) -> tuple[dict[str, float], bool]:
        """One update from all micro-batches of all processes, as if they were one batch.

        A step that is skipped, its loss or its gradients not being finite, counts as done: the order of samples goes on.

        Returns "loss" and its named parts ("loss_distillation"), and whether some process was asked to stop.
        """
        counts = [counts_of(batch) for batch in batches]
        keys = [*counts[0]]
        own = [float(sum(count[key] for count in counts)) for key in keys]
        *sums, stop = distributed.all_reduce([*own, float(self._must_stop)], self.device)
        counted = dict(zip(keys, sums, strict=True))
        labels = {name: counted[name] / distributed.world_size() for name in keys if name not in (TOKENS, POSITIONS, EXAMPLES)}
        losses = self._accumulate_gradients(batches, Totals(labels, counted[EXAMPLES] / distributed.world_size()))
        norm = distributed.clip_gradients(self.model, self.loop.grad_clip)
        stacked = [torch.stack([loss.total, *loss.parts.values()]) for loss in losses]
        values = sum(stacked, torch.zeros_like(stacked[0])).tolist()
        *values, broken = distributed.all_reduce([*values, float(not math.isfinite(norm))], self.device)
        names = ["loss", *(f"loss_{name}" for name in losses[0].parts)]
        told = {name: value / distributed.world_size() for name, value in zip(names, values, strict=True)}
        loss, state = told["loss"], self.state
        if broken or not math.isfinite(loss):  # before the step, so that the weights stay as they were
            self._leave_out(loss, norm, described(batches, [each.total for each in losses], labels[MAIN]))
        else:
            self.optimizer.step()
            state.epoch_loss += loss
            for name in names[1:]:
                state.epoch_parts[name] = state.epoch_parts.get(name, 0.0) + told[name]
            state.skipped_in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        state.global_step += 1
        state.step_in_epoch += 1
        state.samples_in_epoch += self.samples.per_step
        state.examples += int(counted[EXAMPLES])
        state.epoch_tokens += int(counted[TOKENS])
        state.epoch_positions += int(counted[POSITIONS])
        return told, stop > 0

    def _accumulate_gradients(self, batches: list[Batch], totals: Totals) -> list[Loss]:
        """Gradients of the method's loss, summed over the micro-batches; returns each one's share of the loss and its parts.

        DDP and FSDP2 average over processes, so `totals` are those of all processes divided by their number.
        """
        losses = []
        for number, batch in enumerate(batches):
            inputs = {key: value.to(self.device, non_blocking=True) for key, value in batch.items() if key != "idx"}
            with distributed.gradient_sync(self.model, number + 1 == len(batches), self.loop.fsdp_gather):
                with distributed.autocast(self.loop.bf16, self.loop.parallel, self.device):
                    loss: Loss = self.model(inputs, totals)
                loss.total.backward()
            losses.append(Loss(loss.total.detach(), {name: part.detach() for name, part in loss.parts.items()}))
        return losses

    def _leave_out(self, loss: float, norm: float, micro_batches: list[dict[str, Any]]) -> None:
        """Keep what the step was made of; then stop, or count the step and go on without it, as nonfinite_loss says.

        Raises UserError on all processes when training stops.
        """
        state = self.state
        step = {"step": state.global_step + 1, "epoch": state.epoch + 1, "stage": state.optimizer_stage}
        facts = {**step, "train_path": self.samples.path, "loss": loss, "gradient_norm": norm}
        place = save_nonfinite(self.outputs, facts, distributed.gather_objects(micro_batches))
        what = f"the norm of the gradients is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        problem = f"step {step['step']}: {what}"
        if self.loop.nonfinite_loss == "stop":
            raise UserError(f"{problem}; lower lr or set grad_clip: 1.0, or skip such steps (nonfinite_loss: skip); {place}")
        state.skipped += 1
        state.skipped_in_epoch += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row == SKIPPED_IN_A_ROW:
            raise UserError(
                f"{problem}; {SKIPPED_IN_A_ROW} steps in a row had to be skipped, so the weights themselves are broken: "
                f"go on from an earlier checkpoint, with a lower lr; {place}"
            )
        self.reporter.row("skipped", {**step, "loss": strict(loss), "skipped": state.skipped})
        if is_main_process():
            get_logger().warning(f"{problem}; skipped, {state.skipped} so far; {place}")

    def _log_step(self, losses: dict[str, float], stage: int, bar: tqdm) -> None:
        if self.state.skipped_in_a_row or self.state.global_step % self.loop.log_every:
            return
        bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
        self.reporter.row(
            "step",
            {
                "step": self.state.global_step,
                "epoch": self.state.epoch + 1,
                "stage": stage,
                **losses,
                "lr": self.optimizer.param_groups[0]["lr"],
                "examples": self.state.examples,
            },
        )

    # --- the end of an epoch ---

    def _finish_epoch(self, stage: int, evaluation: Evaluation) -> None:
        """Report, then move on to the next epoch and save where it is wanted."""
        state = self.state
        done = state.epoch + 1
        row = self._epoch_row(stage, evaluation)
        self.reporter.row("epoch", row)
        save_predictions(self.outputs, done, evaluation.predictions)
        self.history.append(row)
        show(epoch_table(self.history))
        name = f"checkpoint_{done}"
        improved = evaluation.accuracy > state.best.get(str(stage), -1.0)
        if improved:
            state.best[str(stage)] = evaluation.accuracy
            state.best_checkpoint = name
        state.begin(next_epoch(self.loop, self.curriculum, done, stage, evaluation))
        if improved or not self.saving.save_only_improve:
            self._save(name, stage, done, evaluation.accuracy)
        self.progress(f"epoch {done}")

    def _epoch_row(self, stage: int, evaluation: Evaluation) -> dict[str, Any]:
        state = self.state
        updates = state.step_in_epoch - state.skipped_in_epoch
        return {
            "step": state.global_step,
            "epoch": state.epoch + 1,
            "stage": stage,
            "latents": stage_shape(self.curriculum, stage, 1000).thoughts,
            "train_loss": state.epoch_loss / updates if updates else None,
            **{name: value / updates for name, value in state.epoch_parts.items() if updates},
            **{f"val_{key}" if key == "loss" else key: value for key, value in evaluation.metrics().items()},
            "examples": state.examples,
            "skipped": state.skipped,
            "seconds": state.epoch_seconds,
            "padding": 1 - state.epoch_tokens / state.epoch_positions if state.epoch_positions else None,
            "tokens_per_second": state.epoch_tokens / max(state.epoch_seconds, 1e-9),
            "machine": self.machine,
        }

    def _save_inside_epoch(self) -> None:
        state = self.state
        self._save(f"checkpoint_{state.epoch}_step{state.global_step}", state.optimizer_stage, state.epoch, None)

    def _save(self, name: str, stage: int, epoch: int, accuracy: float | None) -> None:
        """Save under a name, unless this very state is saved already. Raises UserError if something cannot be written."""
        config, state = self.saving, self.state
        distributed.run_on_main(self.reporter.flush)
        self.writer.wait()
        if config.debug or self.saved == (state.epoch, state.step_in_epoch):
            return
        state.metrics_rows = self.reporter.rows
        facts = replace(self.facts, stage=stage, epoch=epoch, accuracy=accuracy)
        path = config.save_dir / name
        trained = (self.model, self.optimizer, self.evaluator.tokenizer)
        checkpoint.save(path, *trained, facts, state, self.writer, config.keep_last, config.sharded_checkpoints)
        self.saved = (state.epoch, state.step_in_epoch)
        self.progress(f"saving {name}")


def next_epoch(loop: Loop, curriculum: Curriculum, done: int, stage: int, evaluation: Evaluation) -> int:
    """The epoch after the first `done`; with advance_accuracy, the next stage's first one as soon as this stage is learned."""
    if loop.advance_accuracy is None or stage >= scheduled_stage(curriculum, loop.num_epochs - 1):
        return done  # nothing to go on to: the last stage takes all its epochs
    if evaluation.accuracy < loop.advance_accuracy or evaluation.cot_match < (loop.advance_cot_match or 0):
        return done
    first = first_epoch(curriculum, stage + 1)
    if first > done:
        get_logger().info(f"stage {stage} learned in epoch {done} (advance_accuracy): going on with epoch {first + 1}")
    return max(first, done)
