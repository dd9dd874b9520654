"""run.py as users start it: in one process and in several, and what it says to bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PUBLISHED, ROOT, chain_records, read_evaluation, read_rows, write_json
from processes import ENVIRONMENT, launch
from safetensors.torch import load_file

import run
from config import RunConfig
from methods import METHODS
from utils import UserError, load_config


def start(arguments: list[str], *more: str) -> None:
    run.main.__wrapped__([*arguments, *more])


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in read_rows(directory / "metrics.jsonl", "step")]


# --- one process ---


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_evaluates_and_is_evaluated_again(
    run_arguments: list[str], tmp_path: Path, method: str, capsys: Any
) -> None:
    start(run_arguments, f"method={method}", "epochs_per_stage=1", "num_epochs=2")
    directory = tmp_path / "checkpoints" / "run"
    epochs = read_rows(directory / "metrics.jsonl", "epoch")
    stages = {
        "cot": [0, 0],
        "no_cot": [0, 0],
        "no_curriculum": [3, 3],
        "pause": [3, 3],
        "codi": [3, 3],
        "codi_simcot": [3, 3],
        "codi_kv": [3, 3],
        "icot": [7, 15],
    }
    assert [row["stage"] for row in epochs] == stages.get(method, [0, 1])
    thoughts = {"coconut": 1, "pause_as_thought": 1, "no_curriculum": 2, "pause": 2, "simcot": 1}
    assert epochs[1]["latents"] == thoughts.get(method, 2 if method.startswith("codi") else 0)
    learned = "loss_answer" if method == "simcot" else "train_loss"  # whose steps count from stage 1 on
    assert epochs[1][learned] < epochs[0][learned]
    assert (directory / "config.yaml").is_file()
    # A wrong method, stage and number of latents in the configuration do not change what a checkpoint is evaluated as.
    wrong = ["method=no_cot" if method != "no_cot" else "method=cot", "c_thought=2", "resume=40", "name=again"]
    start(run_arguments, *wrong, "only_eval=true", f"load_model_path={directory}")
    row = read_evaluation(tmp_path / "checkpoints" / "again")
    assert row["loss"] == pytest.approx(epochs[1]["val_loss"], rel=1e-5)
    assert (row["accuracy"], row["stage"]) == (epochs[1]["accuracy"], epochs[1]["stage"])
    assert row["low"] <= row["accuracy"] <= row["high"]
    assert "latent tokens" in capsys.readouterr().out  # the schedule


def test_predictions_say_what_was_answered(run_arguments: list[str], tmp_path: Path) -> None:
    start(run_arguments, "num_epochs=1", "method=no_cot", "batch_size_eval=3")
    rows = read_rows(tmp_path / "checkpoints" / "run" / "predictions_1.jsonl")
    assert [row["idx"] for row in rows] == list(range(7))
    for row, record in zip(rows, chain_records(7), strict=True):
        assert row["gold"] == record["answer"]
        assert row["answer"] == (row["output"].rsplit("#", 1)[1].replace(",", "").strip() if "#" in row["output"] else "")


def test_evaluations_of_two_checkpoints_stay_apart(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the run's own have short names, all others are named by their whole way."""
    monkeypatch.chdir(tmp_path)
    given = ["only_eval=true", "name=quick", "val_path=data/test.json", "save_path=checkpoints"]
    names = {
        source: load_config(RunConfig, [*run_arguments, *given, f"load_model_path={source}"]).save_dir.name
        for source in ("checkpoints/quick/checkpoint_3", "checkpoints/seed2/quick/checkpoint_3", "kept/quick/checkpoint_3")
    }
    assert list(names.values()) == ["test-quick-checkpoint_3", "test-seed2-quick-checkpoint_3", "test-kept-quick-checkpoint_3"]


def test_evaluation_counts_gold_and_fixed_latents_and_written_steps_apart(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A model that answers rightly with as many latents as gold steps, up to two, and writes first in every other answer."""
    import evaluation

    start(run_arguments, "pad_latent_to_max=false", "num_epochs=3", "epochs_per_stage=1")
    steps = [min(2, len(record["steps"])) for record in chain_records(7)]
    assert {1, 2} <= set(steps)
    epoch = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "epoch")[-1]
    assert epoch["stage"] == 2
    assert "accuracy_fixed" not in epoch  # that pass is for evaluations alone
    asked = []

    def generate(self: Any, model: Any, batch: Any) -> list[list[int]]:
        latents = (batch["input_ids"] == self.ids.latent).sum(dim=1).tolist()
        asked.extend(latents)
        words = [
            (self.dataset[idx]["steps"][0] + "\n" if idx % 2 else "")
            + "### "
            + (self.dataset[idx]["answer"] if count == steps[idx] else "no")
            for idx, count in zip(batch["idx"].tolist(), latents, strict=True)
        ]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in words]

    monkeypatch.setattr(evaluation.Evaluator, "_generate", generate)
    evaluate = ["only_eval=true", "from_scratch=false", f"load_model_path={tmp_path}/checkpoints/run"]
    start(run_arguments, *evaluate)
    row = read_evaluation(tmp_path / "checkpoints" / "run")
    assert sorted(asked) == sorted(steps + [2] * 7)
    assert row["accuracy"] == row["accuracy_at_once"] == 1
    assert row["accuracy_fixed"] == pytest.approx(steps.count(2) / 7)
    assert row["low_fixed"] < row["accuracy_fixed"] < row["high_fixed"]
    assert row["accuracy_at_once_fixed"] == pytest.approx(steps[::2].count(2) / 4)
    assert row["wrote_steps"] == row["wrote_steps_fixed"] == pytest.approx(3 / 7)
    assert f"for every question {row['accuracy_fixed']:.1%}" in " ".join(capsys.readouterr().out.split())
    place = tmp_path / "checkpoints" / "run" / "eval"
    [answers] = place.glob("*/predictions_3.jsonl")
    assert [one["wrote_steps"] for one in read_rows(answers)] == [bool(idx % 2) for idx in range(7)]
    [fixed] = place.glob("*/fixed_predictions_3.jsonl")
    assert [one["correct"] for one in read_rows(fixed)] == [count == 2 for count in steps]

    for given, expected in (("max", 2), (5, 5)):
        asked.clear()
        start(run_arguments, *evaluate, f"name=run-{given}", f"eval_latents={given}")
        assert asked == [expected] * 7  # one pass, and no second one
        row = read_evaluation(tmp_path / "checkpoints" / f"run-{given}")
        assert row["accuracy_fixed"] == row["accuracy"] == pytest.approx(steps.count(expected) / 7)
        [place] = (tmp_path / "checkpoints" / f"run-{given}" / "eval").iterdir()
        assert place.name.endswith(f"checkpoint_3-latents_{given}")  # not that of the usual evaluation
    with pytest.raises(UserError, match="eval_latents: 5: a model trained with method cot has no latents"):
        start(run_arguments, "name=cot", "method=cot", "eval_latents=5")


def test_answers_can_be_learned(run_arguments: list[str], tmp_path: Path) -> None:
    """Seven questions, all of them seen in training: accuracy must reach 100%, or judging the answers is broken."""
    start(run_arguments, "num_epochs=24", "epochs_per_stage=12", "max_latent_stage=1", "max_new_tokens=30", "lr=3e-3")
    epochs = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "epoch")
    assert max(row["accuracy"] for row in epochs if row["stage"] == 1) == 1.0
    assert max(row["cot_match"] for row in epochs) == 1.0


def test_gradient_accumulation_equals_the_large_batch(run_arguments: list[str], tmp_path: Path) -> None:
    """22 samples in steps of 8: the last group is shorter, and its micro-batches have other numbers of labels."""
    start(run_arguments, "name=whole", "batch_size_training=8", "lr=1e-4", "num_epochs=2")
    start(run_arguments, "name=parts", "batch_size_training=2", "gradient_accumulation_steps=4", "lr=1e-4", "num_epochs=2")
    directory = tmp_path / "checkpoints"
    assert losses(directory / "whole") == pytest.approx(losses(directory / "parts"), abs=1e-5)
    assert len(losses(directory / "whole")) == 6


def test_reset_optimizer_follows_the_stage(run_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    made = []
    original = training.Trainer._new_optimizer
    monkeypatch.setattr(training.Trainer, "_new_optimizer", lambda self: made.append(self.state.epoch) or original(self))
    for setting, expected in (("true", [0, 2, 4]), ("epoch", [0, 1, 2, 3, 4, 5]), ("false", [0])):
        made.clear()
        start(run_arguments, f"name=reset-{setting}", f"reset_optimizer={setting}", "epochs_per_stage=2", "num_epochs=6")
        assert made == expected, setting


def test_a_learned_stage_is_left_early_when_asked(run_arguments: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    import training

    original = training.Evaluator.evaluate

    def evaluate(self: Any, model: Any, stage: int) -> Any:
        result = original(self, model, stage)
        result.accuracy = result.cot_match = 0.99 if stage == 1 else 0.5
        return result

    monkeypatch.setattr(training.Evaluator, "evaluate", evaluate)
    start(run_arguments, "epochs_per_stage=3", "num_epochs=9", "advance_accuracy=0.98")
    epochs = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "epoch")
    assert [(row["epoch"], row["stage"]) for row in epochs] == [(1, 0), (2, 0), (3, 0), (4, 1), (7, 2), (8, 2), (9, 2)]


def test_debug_takes_few_records_and_saves_nothing(run_arguments: list[str], tmp_path: Path) -> None:
    start(run_arguments, "debug=true", f"val_path={write_json(tmp_path / 'many.json', chain_records(40))}")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("bf16", ["true", "pure"])
def test_bfloat16_trains(run_arguments: list[str], tmp_path: Path, bf16: str) -> None:
    start(run_arguments, f"bf16={bf16}")
    directory = tmp_path / "checkpoints" / "run"
    epochs = read_rows(directory / "metrics.jsonl", "epoch")
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    saved = load_file(directory / "checkpoint_3" / "model.safetensors")["model.norm.weight"]
    assert saved.dtype == (torch.bfloat16 if bf16 == "pure" else torch.float32)


def test_wandb_offline_keeps_the_run_and_falls_back_without_login(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    start(run_arguments, "wandb=online", "num_epochs=1")
    assert "wandb: no login found, logging offline" in capsys.readouterr().out
    assert list((tmp_path / "checkpoints" / "run").glob("wandb/offline-run-*"))


# --- bad input ---


def test_bad_input_is_one_line_and_exit_code_2(run_arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "run.py", *run_arguments, "val_path=nowhere.json"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == "error: nowhere.json: no such file"
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {}}, "expected a list of records"),
        ({"data": []}, "the data set is empty"),
        ({"data": [{"question": "q", "answer": "a"}]}, "record 0: field 'steps' is missing"),
        ({"data": [{"question": "q", "answer": "a", "steps": "s"}]}, "field 'steps': expected a list of strings"),
        ({"arguments": ["unknown=1"]}, "unknown key 'unknown'"),
        ({"arguments": ["cot=true"]}, "found cot and coconut"),
        ({"arguments": ["only_eval=true"]}, "only_eval needs load_model_path"),
        ({"arguments": ["resume=3", "load_model_path=x", "from_scratch=false"]}, "leaves nothing to train"),
        ({"arguments": ["max_new_tokens=100"]}, "positions"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    run_arguments: list[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    more = list(change.get("arguments", []))
    if "data" in change:
        more.append(f"train_path={write_json(tmp_path / 'bad.json', change['data'])}")
    with pytest.raises(UserError, match=message):
        start(run_arguments, *more)
    assert not (tmp_path / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_before_the_step(run_arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"step \d+: the (loss|norm of the gradients) is (nan|inf)"):
        start(run_arguments, "lr=1e30", "num_epochs=3")


# --- several processes ---


@pytest.mark.parametrize(("processes", "parallel"), [(2, "ddp"), (3, "ddp"), (3, "fsdp")])
def test_processes_share_the_work_of_one(run_arguments: list[str], tmp_path: Path, processes: int, parallel: str) -> None:
    """Losses of the first 20 steps within 1e-5 of one process with the same global batch, every question counted once."""
    common = ["lr=1e-4", "num_epochs=6", "epochs_per_stage=2", "save_only_improve=true", "batch_size_eval=2"]
    start(run_arguments, "name=one", "batch_size_training=6", *common)
    more = [f"batch_size_training={6 // processes}", f"parallel={parallel}", "name=several", *common]
    result = launch(processes, run_arguments, *more)
    assert result.returncode == 0, result.stderr
    one, several = (tmp_path / "checkpoints" / name for name in ("one", "several"))
    assert len(losses(one)) == 24
    assert losses(several)[:20] == pytest.approx(losses(one)[:20], abs=1e-5)
    for first, second in zip(
        read_rows(one / "metrics.jsonl", "epoch"), read_rows(several / "metrics.jsonl", "epoch"), strict=True
    ):
        assert second["questions"] == first["questions"] == 7
        assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-5)
        assert second["accuracy"] == first["accuracy"]
    assert [row["idx"] for row in read_rows(several / "predictions_6.jsonl")] == list(range(7))


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import run, training
original = training.InterruptibleEvaluator._generate
def generate(self, *arguments):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return original(self, *arguments)
training.InterruptibleEvaluator._generate = generate
run.main()
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_stop_for_one_and_another_number_goes_on(
    run_arguments: list[str], tmp_path: Path, parallel: str, capsys: Any
) -> None:
    """Process 1 of 2 is signalled while it answers the questions after epoch 1; one process goes on with the same batches."""
    common = ["lr=1e-4", "num_epochs=2", "batch_size_eval=1"]
    start(run_arguments, "name=one", "batch_size_training=6", *common)
    (tmp_path / "signalled.py").write_text(SIGNALLED.format(root=str(ROOT)))
    more = [f"parallel={parallel}", "batch_size_training=3", *common]
    result = launch(2, run_arguments, *more, script=tmp_path / "signalled.py")
    assert result.returncode == 0, result.stderr
    assert "stopped by a signal at step 4" in result.stdout
    capsys.readouterr()
    start(run_arguments, "batch_size_training=6", *common)
    output = capsys.readouterr().out
    assert "resuming with 1 processes, saved with 2: same data order" in output
    one, both = tmp_path / "checkpoints" / "one", tmp_path / "checkpoints" / "run"
    assert losses(both) == pytest.approx(losses(one), abs=1e-5)
    for first, second in zip(*(read_rows(path / "metrics.jsonl", "epoch") for path in (one, both)), strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], abs=1e-5)
        assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-5)


def test_sharded_generation_with_different_latents_does_not_hang(run_arguments: list[str], tmp_path: Path) -> None:
    """Questions with 1 to 3 steps get as many latents (up to 24), and the processes have different numbers of batches."""
    more = ["pad_latent_to_max=false", "c_thought=8", "max_latent_stage=3", "batch_size_eval=1", "num_epochs=4"]
    more += ["examples_per_epoch=8"]
    result = launch(2, run_arguments, *more, "parallel=fsdp", "save_only_improve=true", "max_new_tokens=12")
    assert result.returncode == 0, result.stderr
    assert [row["idx"] for row in read_rows(tmp_path / "checkpoints" / "run" / "predictions_4.jsonl")] == list(range(7))
    start(
        run_arguments, *more, "name=one", "only_eval=true", f"load_model_path={tmp_path}/checkpoints/run", "max_new_tokens=12"
    )
    again = read_evaluation(tmp_path / "checkpoints" / "one")
    rows = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "epoch")
    [last] = [row for row in rows if row["epoch"] == 4]
    assert again["stage"] == last["stage"] == 3
    assert again["questions"] == 7


@pytest.mark.published_data("prosqa_official_valid.json")
def test_the_published_validation_set_trains_the_small_gpt2(run_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr("systems.metrics.Reporter.row", lambda self, kind, values: rows.append({"kind": kind, **values}))
    path = PUBLISHED / "prosqa_official_valid.json"
    start(
        run_arguments,
        "debug=true",
        f"train_path={path}",
        f"val_path={path}",
        f"model_id={ROOT / 'configs' / 'gpt2_small'}",
        "num_epochs=1",
        "batch_size_training=50",
    )
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    [epoch] = [row for row in rows if row["kind"] == "epoch"]
    assert (
        losses[-1] < losses[0] < 1.2 * math.log(json.loads((ROOT / "configs/gpt2_small/config.json").read_text())["vocab_size"])
    )
    assert (epoch["questions"], epoch["examples"]) == (32, 300)
