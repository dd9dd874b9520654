"""Thoughts computed together (PCCoT): against a reference that recomputes everything, and against one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from naive import fill_together, full_pass, naive_map
from processes import launch
from test_coconut import IDS, LAYOUTS, PROMPTS, assert_same_gradients, draw, gradients, mapped
from test_run import read_rows, start
from tiny_models import assert_near, near, tiny_model
from torch.nn import functional as F

from coconut import Coconut
from experiments.noise.settings import SweepConfig
from experiments.noise.subjects import load_subject
from generation import missing_passes
from systems.checkpoint import CheckpointError
from utils import UserError, load_config

ENOUGH = 12  # iterations, for every layout


def model_of(family: str, iterations: int | None, setting: str = "projection") -> Coconut:
    model = mapped(tiny_model(family)[0], setting)
    model.jacobi_iterations = iterations
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layout", ["aligned", "ragged"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_losses_and_gradients_are_those_of_the_reference(family: str, layout: str, iterations: int) -> None:
    model, batch = model_of(family, iterations), draw(LAYOUTS[layout])
    base, real = model.base_causallm, batch["attention_mask"].bool()
    weights = dict(model.thought_map.named_parameters())
    embeds = fill_together(base, IDS, batch, iterations, naive_map(base, "projection", weights=weights))
    logits = full_pass(base, embeds, batch["attention_mask"], batch["position_ids"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    outputs = model(**batch)
    assert_near(outputs.loss, loss)
    assert_near(outputs.logits[real], logits[real])
    assert_near(outputs.inputs_embeds[real], embeds[real])
    expected = gradients(base, loss)
    assert_same_gradients(gradients(base, outputs.loss), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_enough_iterations_are_one_after_the_other(family: str) -> None:
    """The loss, its gradients, the tokens, and what noise and branches do."""
    together, apart = model_of(family, ENOUGH), model_of(family, None)
    apart.load_state_dict(together.state_dict())
    batch = draw(LAYOUTS["ragged"])
    losses = [model(**batch).loss for model in (together, apart)]
    assert_near(*losses)
    first, second = (gradients(model, loss) for model, loss in zip((together, apart), losses, strict=True))
    assert_same_gradients(first, second)
    few = model_of(family, 1)
    few.load_state_dict(together.state_dict())
    assert not near(few(**batch).loss, losses[0])
    prompts = {name: values for name, values in draw(PROMPTS).items() if name in ("input_ids", "attention_mask")}
    for more in ({}, {"noise_scale": 2.0, "noise_type": "gaussian_scaled", "apply_noise_to_all_passes": True, "seed": 3}):
        tokens, other = (model.generate(**prompts, max_new_tokens=6, **more) for model in (together, apart))
        assert torch.equal(tokens, other)
    how = {"num_branches": 3, "noise_scale": [0.5, 4.0], "noise_at_step": 2, "temperature": 0.7, "return_details": True}
    one, two = (model.generate_with_branching(**prompts, max_new_tokens=6, **how) for model in (together, apart))
    assert torch.equal(one.tokens, two.tokens)
    assert_near(one.thoughts, two.thoughts)
    for ours, theirs in zip(one.noise, two.noise, strict=True):
        assert [[len(branch) for branch in scale] for scale in ours] == [[len(branch) for branch in scale] for scale in theirs]


def test_no_iterations_are_pauses() -> None:
    """One pass over the tokens as they are, whose latents have a learned embedding."""
    model, batch = model_of("llama", 0), draw(LAYOUTS["ragged"])
    base = model.base_causallm
    embeds = base.get_input_embeddings()(batch["input_ids"])
    real = batch["attention_mask"].bool()
    expected = full_pass(base, embeds, batch["attention_mask"], batch["position_ids"]).logits
    assert_near(model(**batch).logits[real], expected[real])


def test_the_question_is_computed_once() -> None:
    model, lengths = model_of("llama", 2), []
    model.decoder.register_forward_pre_hook(
        lambda _module, _args, given: lengths.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    ids = draw(["qqqqqqsLLLLeaa"])["input_ids"]
    model(ids)
    assert lengths == [7, 4, 4, 7]
    model.max_over_ranks = lambda own: 7  # another process takes so many
    assert missing_passes(model, [(0, 7), *((column, column + 1) for column in range(7, 10)), (10, 14)]) == 7 - len(lengths)


def test_a_run_keeps_its_mode(run_arguments: list[str], tmp_path: Path) -> None:
    """Trained, saved, resumed, loaded from Python and as a subject."""
    more = ["latent_mode=jacobi", "jacobi_iterations=2", "thought_map=norm"]
    start(run_arguments, "num_epochs=3", *more)
    run = tmp_path / "checkpoints" / "run"
    facts = json.loads((run / "checkpoint_3" / "coconut.json").read_text())
    assert (facts["latent_mode"], facts["jacobi_iterations"]) == ("jacobi", 2)
    assert Coconut.from_pretrained(str(run)).jacobi_iterations == 2
    with pytest.raises(CheckpointError, match="was trained with latent_mode jacobi, not sequential"):
        start(run_arguments, "num_epochs=4", "thought_map=norm")
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    config = load_config(SweepConfig, ["name=x", f"load_model_path={run}", f"data_path={data}", "benchmark=prosqa"])
    assert load_subject(config, torch.device("cpu")).model.jacobi_iterations == 2


def test_two_processes_agree_with_one(run_arguments: list[str], tmp_path: Path) -> None:
    """Sharded processes take equally many passes, though one of them may have no latents."""
    more = ["latent_mode=jacobi", "jacobi_iterations=2", "thought_map=projection", "num_epochs=2"]
    start(run_arguments, *more, "name=one", "batch_size_training=4")
    for name, parallel in (("ddp", "ddp"), ("fsdp", "fsdp")):
        result = launch(2, run_arguments, *more, f"name={name}", "batch_size_training=2", f"parallel={parallel}")
        assert result.returncode == 0, result.stderr
    one, *others = (read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "epoch") for name in ("one", "ddp", "fsdp"))
    for rows in others:
        assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in one], rel=1e-4)
        assert [row["val_loss"] for row in rows] == pytest.approx([row["val_loss"] for row in one], rel=1e-3)


def test_a_method_without_latents_has_no_mode(run_arguments: list[str]) -> None:
    with pytest.raises(UserError, match="latent_mode: jacobi has no effect with method cot"):
        start(run_arguments, "latent_mode=jacobi", "method=cot")
