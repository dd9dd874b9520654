"""LoRA: what is trained, what a checkpoint holds, exact resuming, and what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_evaluation, read_rows
from processes import launch
from safetensors.torch import load_file
from tiny_models import assert_near, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import run
import training
from coconut import Coconut
from config import RunConfig
from systems import checkpoint, files
from systems.checkpoint import Facts, TrainingState
from systems.lora import Lora, adapter_weights, add_adapters, load_adapter_state, merged_weights
from systems.models import verify_projection
from utils import UserError

NEW = [61, 62, 63]


def configuration(**values: Any) -> RunConfig:
    needed = {"name": "x", "model_id": "m", "method": "coconut", "train_path": "t", "val_path": "v", "lora_r": 4}
    return RunConfig(**{**needed, **values})


def start(arguments: list[str], *more: str) -> None:
    run.main.__wrapped__([*arguments, *more])


@pytest.fixture
def lora_arguments(run_arguments: list[str], model_directory: Path) -> list[str]:
    """The run of `run_arguments` from saved weights, with LoRA."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_directory)).save_pretrained(model_directory)
    return [*run_arguments, "from_scratch=false", "lora_r=4", "lr=1e-2"]


FAMILIES = [("gpt2", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {"tie_word_embeddings": False}), ("gemma2", {})]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_only_adapters_and_new_rows_change_and_merging_keeps_the_logits(family: str, overrides: dict, tmp_path: Path) -> None:
    base, ids = tiny_model(family, **overrides)
    frozen = {name: parameter.detach().clone() for name, parameter in base.state_dict().items()}
    tokens = torch.tensor([[5, 6, 61, 63, 62, 7, 8]])
    expected = base(tokens).logits
    add_adapters(base, configuration().part(Lora), NEW)
    assert_near(base(tokens).logits, expected)  # the matrices start as zero
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
    verify_projection(model)
    optimizer = torch.optim.AdamW(adapter_weights(base).values(), lr=0.05)
    for _ in range(3):
        loss = model(tokens, labels=torch.tensor([[-100] * 5 + [7, 8]])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = model(tokens).logits
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = merged_weights(base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())  # merging changes no weight
    assert merged.keys() == frozen.keys()
    for name, weight in merged.items():
        changed = [row for row in range(len(weight)) if not torch.equal(weight[row], frozen[name][row])]
        if "embed" in name or "head" in name or "wte" in name:
            assert changed == NEW, name
        elif weight.ndim == 1 or "wpe" in name:
            assert changed == [], name
        else:
            assert changed, name
    plain, _ = tiny_model(family, **overrides)
    plain.load_state_dict(merged)
    plain = Coconut(plain, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
    assert_near(plain(tokens).logits, trained)


def test_a_run_with_lora_resumes_bit_for_bit_and_its_checkpoint_is_a_plain_model(
    lora_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    start(lora_arguments, "name=whole", "lora_dropout=0.1")
    assert "LoRA of rank 4: " in capsys.readouterr().out
    original = training.Trainer._optimizer_step

    def stop_at_eight(self: training.Trainer, batches: Any) -> Any:
        if self.state.global_step + 1 == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_optimizer_step", stop_at_eight)
        start(lora_arguments, "name=halves", "lora_dropout=0.1")
    start(lora_arguments, "name=halves", "lora_dropout=0.1")
    whole, halves = (tmp_path / "checkpoints" / name / "checkpoint_3" for name in ("whole", "halves"))
    for key, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(value, load_file(halves / "model.safetensors")[key]), key
    epochs = read_rows(whole.parent / "metrics.jsonl", "epoch")
    assert [row["train_loss"] for row in epochs] == [
        row["train_loss"] for row in read_rows(halves.parent / "metrics.jsonl", "epoch")
    ]
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_parameters())
    start(lora_arguments, "name=again", "only_eval=true", f"load_model_path={whole}")
    row = read_evaluation(tmp_path / "checkpoints" / "again")
    assert row["loss"] == pytest.approx(epochs[-1]["val_loss"], abs=1e-5)


def test_lora_learns(lora_arguments: list[str], tmp_path: Path) -> None:
    start(lora_arguments, "num_epochs=6", "epochs_per_stage=6")
    losses = [row["train_loss"] for row in read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "epoch")]
    assert losses[-1] < losses[0] - 0.3


def test_a_checkpoint_goes_on_only_with_the_same_adapters_and_base(lora_arguments: list[str], model_directory: Path) -> None:
    start(lora_arguments, "num_epochs=1")
    with pytest.raises(UserError, match="trained with LoRA and cannot go on without it: choose another name"):
        start([one for one in lora_arguments if not one.startswith("lora")], "num_epochs=2")
    with pytest.raises(UserError, match="the checkpoint was trained with others"):
        start(lora_arguments, "num_epochs=2", "lora_r=2")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_directory)).save_pretrained(model_directory)
    with pytest.raises(UserError, match="no longer holds the weights that the LoRA weights"):
        start(lora_arguments, "num_epochs=2")
    start([one for one in lora_arguments if not one.startswith("lora")], "num_epochs=1", "name=full")
    with pytest.raises(UserError, match="trained without LoRA and cannot go on with it"):
        start(lora_arguments, "num_epochs=2", "name=full")


def test_what_lora_cannot_do_is_one_line() -> None:
    base, _ = tiny_model("llama")
    with pytest.raises(UserError, match=r"lora_target_modules: \['nothing'\] fits no module.*down_proj, .*q_proj"):
        add_adapters(base, configuration(lora_target_modules=["nothing"]).part(Lora), NEW)
    for family in ("llama", "gpt2"):  # a head with weights of its own, and one tied to the embeddings
        base, _ = tiny_model(family)
        with pytest.raises(
            UserError, match="adapts the embeddings or the head, whose rows for the markers are trained already"
        ):
            add_adapters(base, configuration(lora_target_modules=["lm_head"]).part(Lora), NEW)
    add_adapters(tiny_model("llama")[0], configuration(lora_target_modules=["lm_head"]).part(Lora), [])
    base, _ = tiny_model("phi")
    with pytest.raises(UserError, match="the language-model head of family 'phi' has a bias"):
        add_adapters(base, configuration().part(Lora), NEW)
    add_adapters(base, configuration(lora_target_modules=["q_proj", "dense"]).part(Lora), [])  # nothing new, nothing in the way
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapter_weights(base)} == {"q_proj", "dense"}


def test_adapters_of_a_checkpoint_are_copied_not_shared(tmp_path: Path) -> None:
    base, ids = tiny_model("llama")
    add_adapters(base, configuration().part(Lora), NEW)
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
    optimizer = torch.optim.AdamW(adapter_weights(base).values())
    facts = Facts("coconut", 1, 1, 1, True, 1, None, 61, 62, 63, 0)
    words = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "configs" / "llama_small")
    checkpoint.save(tmp_path / "checkpoint_1", model, optimizer, words, facts, TrainingState())
    state = files.read_training_state(tmp_path / "checkpoint_1")["adapter"]
    with torch.no_grad():
        for weight in adapter_weights(base).values():
            weight.add_(1)
    load_adapter_state(base, state)
    assert all(torch.equal(weight, state["weights"][name]) for name, weight in adapter_weights(base).items())


def test_two_processes_train_the_adapters_of_one(lora_arguments: list[str], tmp_path: Path) -> None:
    more = ["lr=1e-3", "num_epochs=2"]
    start(lora_arguments, *more, "name=one", "batch_size_training=4")
    result = launch(2, lora_arguments, *more, "name=two", "batch_size_training=2")
    assert result.returncode == 0, result.stderr
    losses = [
        [row["loss"] for row in read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "step")] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    one, two = (load_file(tmp_path / "checkpoints" / name / "checkpoint_2" / "model.safetensors") for name in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(weight, two[key], rtol=1e-2, atol=1e-3)
