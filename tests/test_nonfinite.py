"""A step whose loss or gradients are not finite: it stops the run or is left out, and says which questions it was made of."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read_rows
from processes import launch
from same_run import differences, timeless_rows

import coconut
import run
import training
from systems import files, metrics
from systems.batches import epoch_order
from systems.storage import newest_whole
from utils import UserError

SMALL = ["num_epochs=2", "batch_size_training=4", "gradient_accumulation_steps=2", "batch_size_eval=7", "max_new_tokens=2"]
STEPS = 3  # in each epoch: 8, 8 and 6 samples


def start(arguments: list[str], *more: str) -> None:
    run.main.__wrapped__([*arguments, *SMALL, *more])


def poison(patch: pytest.MonkeyPatch, questions: set[int], factor: float = math.nan, last_epoch: int = 0) -> None:
    """Multiply the loss of every micro-batch that holds one of the questions, and so its gradients, up to an epoch (from 0)."""
    accumulate, forward = training.Trainer._accumulate_gradients, coconut.Coconut.forward
    queue: list[bool] = []

    def accumulate_gradients(self: Any, batches: Any, items: float) -> Any:
        early = self.state.epoch <= last_epoch
        queue[:] = [early and not questions.isdisjoint(batch["idx"].tolist()) for batch in batches]
        return accumulate(self, batches, items)

    def poisoned(self: Any, *arguments: Any, **options: Any) -> Any:
        outputs = forward(self, *arguments, **options)
        return outputs._replace(loss=outputs.loss * factor) if self.training and queue.pop(0) else outputs

    patch.setattr(training.Trainer, "_accumulate_gradients", accumulate_gradients)
    patch.setattr(coconut.Coconut, "forward", poisoned)


def infinite_gradient(patch: pytest.MonkeyPatch, step: int) -> None:
    """One entry of one gradient is infinite in a step, whose loss is finite."""
    clip = training.distributed.clip_gradients
    calls: list[int] = []

    def clip_gradients(model: torch.nn.Module, max_norm: float | None) -> float:
        calls.append(len(calls) + 1)
        if len(calls) == step:
            gradient = next(model.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[3] = math.inf
        return clip(model, max_norm)

    patch.setattr(training.distributed, "clip_gradients", clip_gradients)


def questions_of(step: int) -> list[list[int]]:
    """The micro-batches of a step (from 0) of the first epoch."""
    samples = epoch_order(22, 0, 0).tolist()[8 * step : 8 * step + 8]
    return [samples[: len(samples) // 2], samples[len(samples) // 2 :]]


def strict_json(path: Path) -> Any:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return (
        [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else (json.loads(path.read_text(), parse_constant=refuse))
    )


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "run"


# --- stop ---


def test_stop_keeps_the_questions_and_the_weights(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Exit code 2 with one line; the file names the micro-batch; what was saved before is the run's newest state."""
    first, second = questions_of(1)
    updates: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(1) or step(self))
    poison(monkeypatch, {second[2]})
    monkeypatch.setattr(sys, "argv", ["run.py", *run_arguments, *SMALL, "save_every_steps=1"])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert caught.value.code == 2
    path = save_dir / "nonfinite_step_2.json"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 2: the loss is nan; lower lr or set grad_clip: 1.0, or skip such steps")
    assert line.endswith(f"its questions are in {path}")
    assert len(updates) == 1
    assert newest_whole(save_dir) == save_dir / "checkpoint_0_step1"
    record = strict_json(path)
    assert {key: record[key] for key in ("step", "epoch", "stage", "loss", "gradient_norm")} == {
        **{"step": 2, "epoch": 1, "stage": 0},
        **{"loss": "nan", "gradient_norm": "nan"},
    }
    assert record["train_path"].endswith("train.json")
    ((rank, batches),) = [(process["rank"], process["micro_batches"]) for process in record["processes"]]
    assert rank == 0
    assert [batch["questions"] for batch in batches] == [first, second]
    assert 2 < batches[0]["loss"] < 10  # of a random model with 100 tokens: a mean per token, not a sum
    assert batches[1]["loss"] == "nan"
    assert all(batch["labelled_tokens"] > 4 for batch in batches)


def test_debug_saves_nothing(run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {questions_of(0)[1][0]}, factor=math.inf)
    with pytest.raises(UserError, match="the loss is inf;.*with debug: False a file would say of which questions"):
        start(run_arguments, "debug=true")
    assert not save_dir.exists()


def test_gradients_alone_stop_too(run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infinite_gradient(monkeypatch, step=3)
    with pytest.raises(UserError, match="step 3: the norm of the gradients is inf;"):
        start(run_arguments, "save_every_steps=1")
    record = strict_json(save_dir / "nonfinite_step_3.json")
    assert record["gradient_norm"] == "inf"
    assert 2 < record["loss"] < 10
    assert newest_whole(save_dir) == save_dir / "checkpoint_0_step2"


def test_a_file_that_cannot_be_written_does_not_hide_the_loss(
    run_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, text: str) -> None:
        raise UserError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(metrics, "write_text", fail)
    poison(monkeypatch, {questions_of(0)[0][0]})
    with pytest.raises(UserError, match=r"the loss is nan; .*nonfinite_step_1.json: cannot be written: No space left"):
        start(run_arguments)


# --- skip ---


@pytest.mark.parametrize("kind", ["loss", "gradients"])
def test_skip_leaves_the_update_out_and_nothing_else(
    run_arguments: list[str], tmp_path: Path, save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str
) -> None:
    """As a run with dropout in which the second step's update is not made; with a warm-up, which counts the step."""
    more = ["warmup_steps=4", "save_every_steps=1"]
    with monkeypatch.context() as patch:
        step, calls = torch.optim.AdamW.step, []
        patch.setattr(torch.optim.AdamW, "step", lambda self: calls.append(1) or (len(calls) != 2 and step(self)))
        start(run_arguments, *more, "name=left_out")
    if kind == "loss":
        poison(monkeypatch, {questions_of(1)[0][1]})
    else:
        infinite_gradient(monkeypatch, step=2)
    start(run_arguments, *more, "nonfinite_loss=skip")
    assert "skipped, 1 so far; its questions are in" in capsys.readouterr().out
    assert strict_json(save_dir / "nonfinite_step_2.json")["step"] == 2
    found = differences(tmp_path / "checkpoints" / "left_out", save_dir)
    assert found == ["training state: state", "metrics.jsonl"]
    expected, rows = timeless_rows(tmp_path / "checkpoints" / "left_out"), strict_json(save_dir / "metrics.jsonl")
    assert rows[1].pop("loss") == ("nan" if kind == "loss" else expected[1]["loss"])
    assert rows[1] == {"kind": "skipped", "step": 2, "epoch": 1, "stage": 0, "skipped": 1}
    steps = [row["loss"] for row in expected if row["kind"] == "step" and row["epoch"] == 1]
    epochs = read_rows(save_dir / "metrics.jsonl", "epoch")
    assert epochs[0]["train_loss"] == pytest.approx((steps[0] + steps[2]) / 2, abs=1e-12)
    assert [row["skipped"] for row in epochs] == [1, 1]
    assert epochs[1]["train_loss"] == [row["train_loss"] for row in expected if row["kind"] == "epoch"][1]
    others = [row for row in timeless_rows(save_dir) if row["kind"] == "step"]
    assert others == [row for row in expected if row["kind"] == "step" and row["step"] != 2]
    state = files.read_training_state(newest_whole(save_dir))["state"]  # type: ignore[arg-type]
    assert (state["skipped"], state["skipped_in_a_row"], state["global_step"]) == (1, 0, 6)


def test_an_epoch_without_any_update_goes_by(run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(22)))
    start(run_arguments, "nonfinite_loss=skip")
    first, second = [row for row in strict_json(save_dir / "metrics.jsonl") if row["kind"] == "epoch"]
    assert (first["train_loss"], first["skipped"], first["step"]) == (None, STEPS, STEPS)
    assert (second["skipped"], second["step"]) == (STEPS, 2 * STEPS)
    assert second["train_loss"] > 0


def test_broken_weights_end_the_run(run_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an update in between nor an epoch's end must be taken for one in a row; nor a restart."""
    monkeypatch.setattr(training, "SKIPPED_IN_A_ROW", 4)
    poison(monkeypatch, set(questions_of(0)[0] + questions_of(2)[0]), last_epoch=9)
    start(run_arguments, "nonfinite_loss=skip", "num_epochs=1", "name=some")
    poison(monkeypatch, set(range(22)), last_epoch=9)
    start(run_arguments, "nonfinite_loss=skip", "num_epochs=1")
    with pytest.raises(
        UserError, match="step 4: the loss is nan; 4 steps in a row had to be skipped, so the weights .* broken"
    ):
        start(run_arguments, "nonfinite_loss=skip")


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resume_around_a_skipped_step_is_exact(
    run_arguments: list[str], tmp_path: Path, save_dir: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Stopped before and after the second step, which is skipped; the same command goes on."""
    poison(monkeypatch, {questions_of(1)[1][0]})
    start(run_arguments, "name=whole", "nonfinite_loss=skip")
    step = training.Trainer._optimizer_step

    def signalled(self: training.Trainer, batches: Any) -> Any:
        if self.state.global_step == stop_after - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_optimizer_step", signalled)
        start(run_arguments, "nonfinite_loss=skip")
    assert newest_whole(save_dir) == save_dir / f"checkpoint_0_step{stop_after}"
    assert len(read_rows(save_dir / "metrics.jsonl", "skipped")) == stop_after - 1
    start(run_arguments, "nonfinite_loss=skip")
    assert differences(tmp_path / "checkpoints" / "whole", save_dir) == []


# --- several processes ---

POISONED = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import pytest, run, test_nonfinite
patch = pytest.MonkeyPatch()
test_nonfinite.poison(patch, {{{question}}})
if os.environ["RANK"] == "1":
    test_nonfinite.infinite_gradient(patch, step=4)
run.main()
"""


def test_all_processes_skip_what_one_of_them_meets(run_arguments: list[str], tmp_path: Path, save_dir: Path) -> None:
    """A loss, and then a gradient, that is not finite in process 1 alone; as with one process that skips these steps."""
    shares = questions_of(1)
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT), question=shares[1][0]))
    common = [*SMALL, "gradient_accumulation_steps=1", "nonfinite_loss=skip", "lr=1e-4"]
    result = launch(2, run_arguments, *common, "hang_timeout=60", script=script)
    assert result.returncode == 0, result.stderr
    record = strict_json(save_dir / "nonfinite_step_2.json")
    (one,), (two,) = [process["micro_batches"] for process in record["processes"]]
    assert [one["questions"], two["questions"]] == shares
    assert one["loss"] != "nan"
    assert two["loss"] == record["loss"] == "nan"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {shares[1][0]})
        infinite_gradient(patch, step=4)
        start(run_arguments, *common, "gradient_accumulation_steps=2", "name=one")
    rows, expected = (read_rows(path / "metrics.jsonl") for path in (save_dir, tmp_path / "checkpoints" / "one"))
    assert [row["step"] for row in rows if row["kind"] == "skipped"] == [2, 4]
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        if row["kind"] == "step":
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
