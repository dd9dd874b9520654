"""Weights' gradients taken over all passes at once: those of the same model without, everywhere; and what cannot be gathered."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from test_coconut import LAYOUTS, assert_same_gradients, draw, gradients, mapped
from test_run import read_rows, start
from tiny_models import assert_near, tiny_model
from torch import nn

from coconut import Coconut
from systems import distributed, weight_gradients
from systems.distributed import Parallelism
from systems.weight_gradients import gather_gradients


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "LARGE", 0)


def pair(family: str, setting: Any = "identity", iterations: int | None = None) -> tuple[Coconut, Coconut]:
    """The same model twice: as it is, and with its gradients gathered."""
    plain = mapped(tiny_model(family)[0], setting)
    plain.jacobi_iterations = iterations
    gathered = copy.deepcopy(plain)
    gather_gradients(gathered)
    return plain, gathered


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])  # qwen2 has layers with and without biases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_stay_what_they_are(family: str, layout: str) -> None:
    plain, gathered = pair(family)
    batch = draw(LAYOUTS[layout])
    first, second = (model(**batch).loss for model in (plain, gathered))
    assert_near(second, first)
    expected = gradients(plain, first)
    assert_same_gradients(gradients(gathered, second), expected)


@pytest.mark.parametrize(
    ("setting", "iterations"), [("projection", None), ({"name": "layer", "layer": 1}, None), ("norm", 0), ("projection", 2)]
)
def test_with_other_thoughts(setting: Any, iterations: int | None) -> None:
    """Where the first pass's last layer has a part in the loss by the labels alone, too."""
    plain, gathered = pair("gpt2", setting, iterations)
    batch = draw(LAYOUTS["ragged"])
    first, second = (model(**batch, labelled_only=True).loss for model in (plain, gathered))
    expected = gradients(plain, first)
    assert_same_gradients(gradients(gathered, second), expected)


def test_several_sequences_of_one_loss() -> None:
    """A teacher's in one pass, and two with thoughts, whose backward passes are one."""
    plain, gathered = pair("llama")
    batches = [draw(LAYOUTS[name]) for name in ("no latents", "ragged", "many")]
    first, second = (torch.stack([model(**batch).loss for batch in batches]).sum() for model in (plain, gathered))
    expected = gradients(plain, first)
    assert_same_gradients(gradients(gathered, second), expected)


@pytest.mark.parametrize("padding", [None, 1])
def test_embeddings_that_are_also_the_head(padding: int | None) -> None:
    """Two sequences of one loss, and a second backward pass that adds to the first; nn.Embedding leaves out its padding row."""
    plain, gathered = pair("gpt2")
    for model in (plain, gathered):
        model.embedding.padding_idx = padding
        for names in (("ragged", "many"), ("no latents",)):
            torch.stack([model(**draw(LAYOUTS[name])).loss for name in names]).sum().backward()
    assert "forward" in vars(gathered.embedding)
    assert_near(gathered.embedding.weight.grad, plain.embedding.weight.grad)


def test_a_loss_without_the_head_is_told() -> None:
    _, gathered = pair("gpt2")
    batch = {key: value for key, value in draw(LAYOUTS["no latents"]).items() if key in ("input_ids", "attention_mask")}
    gathered.think(**batch).hidden.sum().backward()
    with pytest.raises(RuntimeError, match="the head has no part in"):
        gathered(**batch)


def test_thin_products_are_left_to_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    backward = weight_gradients._Linear.backward

    def spy(ctx: Any, gradient: torch.Tensor) -> Any:
        found = backward(ctx, gradient)
        taken.append((ctx.first, found[1] is not None))
        return found

    monkeypatch.setattr(weight_gradients._Linear, "backward", staticmethod(spy))
    _, gathered = pair("llama")
    gathered(**draw(["qqqqqqsLLLeaaaaaa"])).loss.backward()
    layers = sum(isinstance(module, nn.Linear) for module in gathered.decoder.modules())
    assert taken.count((True, True)) == layers
    assert taken.count((False, False)) == 3 * layers  # the passes after the first
    assert len(taken) == 4 * layers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_bfloat16(family: str) -> None:
    """As near to the gradients of float32 as without; autocast has no cast left over from a pass without gradients."""
    plain, gathered = pair(family)
    batch = draw(LAYOUTS["ragged"])
    plain.float()
    gathered.float()
    expected = gradients(plain, plain(**batch).loss)
    for model in (plain, gathered):
        with distributed.autocast(True, "ddp", torch.device("cpu")):
            with torch.no_grad():
                model(**batch)
            loss = model(**batch).loss
        found = gradients(model, loss)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-4, name


def test_gradients_that_would_be_lost_are_told() -> None:
    """A loss of the last pass's states alone, with thoughts from a lower layer: the first pass's last layer has no part in it."""
    _, gathered = pair("llama", {"name": "layer", "layer": 1})
    batch = {key: value for key, value in draw(LAYOUTS["aligned"]).items() if key in ("input_ids", "attention_mask")}
    _, details = gathered(**batch, return_details=True, all_layers=True)
    details.layers[-1].sum().backward()
    with pytest.raises(RuntimeError, match="the first pass has no part in"):
        gathered(**batch)


def test_frozen_weights_are_left_alone() -> None:
    model = mapped(tiny_model("llama")[0], "identity")
    trained = model.decoder.layers[0].mlp.up_proj
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is trained.weight)
    gather_gradients(model)
    assert [name for name, module in model.decoder.named_modules() if "forward" in vars(module)] == ["layers.0.mlp.up_proj"]


def test_a_layer_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers of experts are subclasses of nn.Linear."""
    monkeypatch.setattr(weight_gradients, "LARGE", 0)
    model = mapped(tiny_model("llama")[0], "identity")
    first, second = (layer.mlp.up_proj for layer in model.decoder.layers)
    first.__class__ = type("Router", (torch.nn.Linear,), {})
    gather_gradients(model)
    assert "forward" not in vars(first)
    assert "forward" in vars(second)


@pytest.mark.parametrize(("setting", "patched"), [({}, True), ({"activation_checkpointing": True}, False)])
def test_training_on_a_cpu_does_so(setting: dict[str, bool], patched: bool) -> None:
    model = mapped(tiny_model("llama")[0], "identity")
    settings = {"bf16": False, "activation_checkpointing": False, "compile": False} | setting
    distributed.wrap(model, Parallelism("coconut", "ddp", "pass", **settings), torch.device("cpu"))
    assert ("forward" in vars(model.decoder.layers[0].mlp.up_proj)) is patched


def test_two_processes_agree_with_one(run_arguments: list[str], model_directory: Path, tmp_path: Path) -> None:
    """With weights that are large enough of themselves."""
    values = json.loads((model_directory / "config.json").read_text())
    (model_directory / "config.json").write_text(json.dumps(values | {"intermediate_size": 8224, "vocab_size": 8224}))
    more = ["method=coconut", "num_epochs=2", "epochs_per_stage=1", "grad_clip=1"]
    start(run_arguments, *more, "name=one", "batch_size_training=4")
    result = launch(2, run_arguments, *more, "name=two", "batch_size_training=1", "gradient_accumulation_steps=2")
    assert result.returncode == 0, result.stderr
    one, two = (read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "epoch") for name in ("one", "two"))
    assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], rel=1e-4)
