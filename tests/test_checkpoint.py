"""Checkpoints: whole or absent, found again, resumed from exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_json
from safetensors.torch import load_file
from same_run import differences
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import run
import training
from systems import checkpoint, convert, files
from systems.checkpoint import CheckpointError
from systems.storage import complete_checkpoints
from utils import UserError


def start(arguments: list[str], *more: str) -> None:
    run.main.__wrapped__([*arguments, *more])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during optimizer step `step`."""
    original = training.Trainer._optimizer_step

    def optimizer_step(self: training.Trainer, batches: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, batches)

    monkeypatch.setattr(training.Trainer, "_optimizer_step", optimizer_step)


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGTERM), (6, signal.SIGUSR1), (9, signal.SIGTERM)])
def test_a_run_that_a_signal_stopped_goes_on_bit_for_bit(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int, capsys: Any
) -> None:
    extra = ["gradient_accumulation_steps=2", "uniform_prob=0.3", "log_every=2", "grad_clip=1.0"]
    start(run_arguments, "name=whole", *extra)
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        start(run_arguments, "name=halves", *extra)
    assert f"stopped by a signal at step {step}" in capsys.readouterr().out
    start(run_arguments, "name=halves", *extra)
    assert differences(save_dir / "whole", save_dir / "halves") == []
    inside_epochs = [path.name for path in complete_checkpoints(save_dir / "halves") if "_step" in path.name]
    assert inside_epochs == []  # no longer needed once the epoch is finished


def test_a_run_that_died_between_checkpoints_repeats_the_lost_steps(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(run_arguments, "name=whole", "save_every_steps=2")

    def die(self: training.Trainer, batches: Any) -> Any:
        if self.state.global_step == 9:
            raise RuntimeError("power failure")
        return original(self, batches)

    original = training.Trainer._optimizer_step
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_optimizer_step", die)
        with pytest.raises(RuntimeError, match="power failure"):
            start(run_arguments, "name=halves", "save_every_steps=2")
    assert complete_checkpoints(save_dir / "halves")[-1].name == "checkpoint_1_step8"
    start(run_arguments, "name=halves", "save_every_steps=2")
    assert differences(save_dir / "whole", save_dir / "halves") == []


def test_dropout_goes_on_with_the_saved_generators(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch, model_directory: Path
) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    (model_directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    start(run_arguments, "name=whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        start(run_arguments, "name=halves")
    start(run_arguments, "name=halves")
    assert differences(save_dir / "whole", save_dir / "halves") == []


def test_a_finished_run_is_not_trained_again(run_arguments: list[str], save_dir: Path) -> None:
    start(run_arguments)
    before = (save_dir / "run" / "metrics.jsonl").read_bytes()
    start(run_arguments)
    assert (save_dir / "run" / "metrics.jsonl").read_bytes() == before


def test_stray_and_half_written_things_are_never_picked_up(run_arguments: list[str], save_dir: Path) -> None:
    start(run_arguments, "num_epochs=1")
    directory = save_dir / "run"
    (directory / "checkpoint_9").mkdir()  # no content
    (directory / ".checkpoint_8.partial").mkdir()
    (directory / "checkpoint_final.bak").write_text("stray")
    (directory / "checkpoint_7").write_text("a file, not a directory")
    assert [path.name for path in complete_checkpoints(directory)] == ["checkpoint_1"]
    start(run_arguments, "num_epochs=2")
    assert (directory / "checkpoint_final.bak").read_text() == "stray"
    assert [path.name for path in complete_checkpoints(directory)] == ["checkpoint_1", "checkpoint_2"]


def test_a_failed_save_keeps_what_was_there(run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(run_arguments, "num_epochs=1")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="could not be written: .*No space left"):
        start(run_arguments, "num_epochs=2")
    assert sorted(path.name for path in (save_dir / "run").glob("*checkpoint*")) == ["checkpoint_1"]


def test_a_checkpoint_loads_as_a_plain_model(run_arguments: list[str], save_dir: Path) -> None:
    start(run_arguments)
    directory = save_dir / "run" / "checkpoint_3"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for key, value in model.state_dict().items():
        if key in weights(directory):
            assert torch.equal(value, weights(directory)[key])
    assert tokenizer.convert_tokens_to_ids("<|latent|>") == files.read_facts(directory).latent_token_id
    facts = files.read_facts(directory)
    assert (facts.method, facts.stage, facts.epoch, facts.c_thought) == ("coconut", 2, 3, 1)
    assert torch.load(directory / "training_state.pt", weights_only=True)["state"]["global_step"] == 18


def test_keep_last_spares_the_best(run_arguments: list[str], save_dir: Path) -> None:
    start(run_arguments, "keep_last=1")
    state = files.read_training_state(save_dir / "run" / "checkpoint_3")["state"]
    kept = {path.name for path in complete_checkpoints(save_dir / "run")}
    assert kept == {"checkpoint_3", state["best_checkpoint"]}


def test_markers_that_are_not_the_tokenizers_are_refused(run_arguments: list[str], save_dir: Path) -> None:
    start(run_arguments, "num_epochs=1")
    directory = save_dir / "run" / "checkpoint_1"
    facts = files.read_facts(directory)
    assert facts is not None
    facts.start_latent_id, facts.end_latent_id = facts.end_latent_id, facts.start_latent_id
    write_json(directory / "coconut.json", dataclasses.asdict(facts))
    (directory / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"coconut.json: damaged or of another version: start_latent_id is \d+, its"):
        start(run_arguments, "from_scratch=false", "only_eval=true", f"load_model_path={directory}")


def test_random_states_survive_the_file(tmp_path: Path) -> None:
    state = checkpoint._rng_state()
    torch.save(state, tmp_path / "rng.pt")
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    checkpoint._set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


# --- converting published single-file checkpoints ---


@pytest.fixture
def published(run_arguments: list[str], save_dir: Path, model_directory: Path, tmp_path: Path) -> Path:
    """A trained model as the published code saves it: one file, with the prefix; the base model's weights beside its config."""
    start(run_arguments)
    state = weights(save_dir / "run" / "checkpoint_3")
    torch.save({f"base_causallm.{key}": value for key, value in state.items()}, tmp_path / "checkpoint_33")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_directory)).save_pretrained(model_directory)
    return tmp_path / "checkpoint_33"


def run_convert(*arguments: Any) -> None:
    convert.main.__wrapped__(["convert", *map(str, arguments)])


def test_an_optimizer_state_of_another_shape_is_one_line(run_arguments: list[str], save_dir: Path) -> None:
    """A fused AdamW would write past the end of the smaller tensor."""
    start(run_arguments, "num_epochs=1")
    directory = save_dir / "run" / "checkpoint_1"
    (directory / "manifest.json").unlink()
    saved = torch.load(directory / "training_state.pt", weights_only=True)
    name = next(iter(saved["optimizer"]["state"]))
    for quantity, needed in (("step", r"\[\]"), ("exp_avg", r"\[\d.*\]"), ("exp_avg_sq", r"\[\d.*\]")):
        moments = saved["optimizer"]["state"][name]
        whole, moments[quantity] = moments[quantity], torch.ones(1)
        torch.save(saved, directory / "training_state.pt")
        moments[quantity] = whole
        with pytest.raises(UserError, match=rf"training_state.pt: .* {quantity} of {name} has shape \[1\]; {needed} is needed"):
            start(run_arguments, "num_epochs=2")
    saved["optimizer"]["state"] = {"elsewhere": saved["optimizer"]["state"][name]}
    torch.save(saved, directory / "training_state.pt")
    with pytest.raises(UserError, match="step of elsewhere has shape .*; the model has no such parameter"):
        start(run_arguments, "num_epochs=2")
