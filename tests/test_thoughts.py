"""Thought maps: their settings, training alone and in two processes, checkpoints, and what follows them.

What each computes is compared with a naive reference in test_coconut.py.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import read_evaluation, read_rows
from same_run import differences, weights
from test_fsdp import several
from test_lora import lora_arguments  # noqa: F401
from test_run import losses, start
from tiny_models import tiny_model

import run
import thoughts
from coconut import Coconut
from config import RunConfig
from experiments.noise.settings import SweepConfig
from experiments.noise.subjects import load_subject
from systems import convert, sources
from systems.weights import THOUGHT_MAP, read_map
from thoughts import MapKind, ThoughtMap, check_thought_map, embedding_norm, make_thought_map, thought_health
from utils import UserError, load_config

CPU = torch.device("cpu")
PROJECTION = {"name": "projection", "width": 5}


def test_health_of_thoughts_where_it_is_known() -> None:
    """Two questions with thoughts at right angles, each of length 2; then one thought for all, which is a collapse."""
    health = thought_health([2 * torch.eye(4)[:2], 2 * torch.eye(4)[2:]])
    assert health == pytest.approx(
        {
            "thought_norm": 2,
            "thought_distance": 2 * math.sqrt(2),
            "thought_cosine": 0,
            "thought_change": math.sqrt(2),
            "question_cosine": 0,
            "effective_rank": 3,  # four corners around their mean: three directions, equally wide
        }
    )
    collapsed = thought_health([torch.ones(3, 4), torch.ones(2, 4)])
    assert collapsed["effective_rank"] == pytest.approx(1)
    assert (collapsed["thought_cosine"], collapsed["question_cosine"]) == pytest.approx((1, 1))
    assert (collapsed["thought_distance"], collapsed["thought_change"]) == (0, 0)
    assert set(thought_health([torch.ones(1, 4)])) == {"thought_norm", "effective_rank"}


def key(setting: str | dict[str, Any]) -> str:
    return f"thought_map={yaml.safe_dump(setting, default_flow_style=True, width=999).splitlines()[0]}"


def test_settings() -> None:
    assert check_thought_map("norm") == check_thought_map({"name": "norm"}) == "norm"
    assert check_thought_map({"name": "layer", "layer": 6}) == {"name": "layer", "layer": 6}
    needed = ["name=x", "model_id=m", "train_path=t", "val_path=v", "coconut=true"]
    assert load_config(RunConfig, needed).thought_map == "identity"
    assert load_config(RunConfig, [*needed, "thought_map=projection"]).thought_map == "projection"
    assert load_config(RunConfig, [*needed, "thought_map={name: layer, layer: 6}"]).thought_map == {"name": "layer", "layer": 6}
    for given, problem in {
        "thought_map=pink": "it must name one of identity, layer, norm, projection",
        "thought_map={layer: 6}": "it must name one of identity",
        "thought_map={name: norm, layer: 6}": "norm has no option 'layer'; it has none",
        "thought_map={name: layer, width: 6}": "layer has no option 'width'; it has layer",
        "thought_map={name: layer, layer: -2}": "layer of layer is -2",
        "thought_map={name: projection, width: 0}": "width of projection is 0",
    }.items():
        with pytest.raises(UserError, match=f"thought_map: .*{problem}"):
            load_config(RunConfig, [*needed, given])


def test_weights_come_from_the_seed_alone() -> None:
    base, _ = tiny_model("gpt2")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (make_thought_map("projection", base, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert not make_thought_map("identity", base).state_dict()
    with pytest.raises(ValueError, match="layer is 3; the model has 2 layers: use -1, or 0 to 2"):
        make_thought_map({"name": "layer", "layer": 3}, base)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text"])
def test_the_norm_is_that_of_embeddings_as_the_model_reads_them(family: str) -> None:
    """Gemma multiplies its table by the root of the width, in the embedding itself from transformers 5 on."""
    base, ids = tiny_model(family)
    embedding = base.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))
    expected = scale * embedding.weight.detach().norm(dim=-1).mean().item()
    assert embedding_norm(base).item() == pytest.approx(expected, rel=1e-5)
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos, make_thought_map("norm", base)).eval()
    with torch.no_grad():
        thoughts = model.think(
            torch.tensor([[5, 9, 7, ids.start_latent, ids.latent, ids.latent, ids.end_latent]])
        ).inputs_embeds
    assert thoughts[0, 4].norm().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("setting", [{"name": "layer", "layer": 1}, "norm", PROJECTION], ids=str)
def test_a_run_trains_its_map_goes_on_exactly_and_is_evaluated(
    run_arguments: list[str], tmp_path: Path, setting: str | dict[str, Any]
) -> None:
    more = [key(setting), "num_epochs=2", "reset_optimizer=false", "max_latent_stage=1"]
    start(run_arguments, *more)
    whole, cut = tmp_path / "checkpoints" / "run", tmp_path / "checkpoints" / "cut"
    assert json.loads((whole / "checkpoint_2" / "coconut.json").read_text())["thought_map"] == setting
    first, last = (read_map(whole / name) for name in ("checkpoint_1", "checkpoint_2"))
    assert bool(first) == (setting != {"name": "layer", "layer": 1})
    for name in first:  # at stage 0 nothing reaches the map, but weight decay does
        assert torch.equal(first[name], last[name]) == (setting == "norm"), name
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint_2")
    start(run_arguments, *more, "name=cut")
    assert differences(whole, cut) == []
    evaluate = ["only_eval=true", "from_scratch=false", f"load_model_path={whole}"]
    start(run_arguments, "name=eval", *evaluate)  # whatever the configuration says
    row = read_evaluation(tmp_path / "checkpoints" / "eval")
    assert row["loss"] == read_rows(whole / "metrics.jsonl", "epoch")[-1]["val_loss"]
    with pytest.raises(UserError, match=r"checkpoint_2 was trained with thought_map .*, not identity: choose another name"):
        start(run_arguments, *more, "thought_map=identity")
    subject = load_subject(SweepConfig(name="s", load_model_path=str(whole), benchmark="prosqa", data_path="x"), CPU)
    assert subject.describe()["thought_map"] == setting
    own = subject.model.thought_map.state_dict()
    assert own.keys() == last.keys()
    assert all(torch.equal(own[name], last[name]) for name in last)


@pytest.fixture
def projected(run_arguments: list[str], tmp_path: Path) -> Path:
    start(run_arguments, key(PROJECTION), "num_epochs=1", "examples_per_epoch=8")
    return tmp_path / "checkpoints" / "run" / "checkpoint_1"


def test_weights_that_are_missing_or_left_over_are_one_line(projected: Path, run_arguments: list[str]) -> None:
    evaluate = ["name=eval", "only_eval=true", "from_scratch=false", f"load_model_path={projected}"]
    (projected / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"thought_map identity does not fit .* unexpected keys \[steps.0.bias"):
        start(run_arguments, "name=other", "from_scratch=false", f"load_model_path={projected}")
    saved = (projected / THOUGHT_MAP).read_bytes()
    (projected / THOUGHT_MAP).unlink()
    with pytest.raises(UserError, match=r"thought_map \{.*\} does not fit the model: missing keys \[steps.0.bias"):
        start(run_arguments, *evaluate)
    (projected / THOUGHT_MAP).write_bytes(saved[:-8])
    with pytest.raises(UserError, match=f"{THOUGHT_MAP}: not a state dict"):
        start(run_arguments, *evaluate)
    (projected / THOUGHT_MAP).write_bytes(saved)
    facts = json.loads((projected / "coconut.json").read_text())
    (projected / "coconut.json").write_text(json.dumps({**facts, "thought_map": {"name": "projection", "width": 6}}))
    with pytest.raises(UserError, match=r"wrong shapes \[steps.0.bias"):
        start(run_arguments, *evaluate)


def test_an_experiment_may_take_another_map_that_has_nothing_to_learn(projected: Path, run_arguments: list[str]) -> None:
    needed = {"name": "x", "benchmark": "prosqa", "load_model_path": str(projected), "n_latents": 2}
    for setting in ("identity", "norm"):
        assert load_subject(SweepConfig(**needed, thought_map=setting), CPU).model.thought_map.setting == setting
    assert load_subject(SweepConfig(**needed, hidden_layer_idx=1), CPU).model.thought_map.layers == (1,)
    with pytest.raises(UserError, match=r"wrong shapes \[steps.0.bias"):
        load_subject(SweepConfig(**needed, thought_map={"name": "projection", "width": 6}), CPU)
    start(run_arguments, "num_epochs=1", "name=plain", "examples_per_epoch=8")
    needed["load_model_path"] = str(projected.parents[1] / "plain")
    with pytest.raises(UserError, match=r"missing keys \[steps.0.bias"):
        load_subject(SweepConfig(**needed, thought_map="projection"), CPU)


def test_a_checkpoint_from_before_the_maps_is_one_of_identity(run_arguments: list[str], tmp_path: Path) -> None:
    start(run_arguments, "num_epochs=2", "max_latent_stage=1")
    whole, old = tmp_path / "checkpoints" / "run", tmp_path / "checkpoints" / "old"
    assert not (whole / "checkpoint_2" / THOUGHT_MAP).exists()
    shutil.copytree(whole, old)
    shutil.rmtree(old / "checkpoint_2")
    path = old / "checkpoint_1" / "coconut.json"
    facts = json.loads(path.read_text())
    del facts["thought_map"]
    path.write_text(json.dumps({**facts, "hidden_layer_idx": -1}))
    (old / "checkpoint_1" / "manifest.json").unlink()
    start(run_arguments, "num_epochs=2", "max_latent_stage=1", "name=old")
    assert differences(whole, old) == []


def test_a_map_starts_anew_on_a_model_without_one(run_arguments: list[str], tmp_path: Path) -> None:
    start(run_arguments, "method=cot", "num_epochs=1", "name=cot", "examples_per_epoch=8")
    more = ["num_epochs=1", "examples_per_epoch=8", "from_scratch=false", f"load_model_path={tmp_path / 'checkpoints' / 'cot'}"]
    start(run_arguments, key(PROJECTION), *more)
    assert read_map(tmp_path / "checkpoints" / "run" / "checkpoint_1")


def test_lora_trains_and_keeps_the_map(lora_arguments: list[str], tmp_path: Path) -> None:
    more = [key(PROJECTION), "num_epochs=2", "max_latent_stage=1"]
    start(lora_arguments, *more)
    whole, cut = tmp_path / "checkpoints" / "run", tmp_path / "checkpoints" / "cut"
    first, last = (read_map(whole / name) for name in ("checkpoint_1", "checkpoint_2"))
    assert not any(torch.equal(first[name], last[name]) for name in first)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint_2")
    start(lora_arguments, *more, "name=cut")
    assert differences(whole, cut) == []


def test_two_processes_train_the_map_of_one(run_arguments: list[str], tmp_path: Path) -> None:
    """From stage 0 on, in which no batch has a latent, and with latents in the batch of one process alone."""
    common = [key(PROJECTION), "lr=1e-4", "num_epochs=2", "max_latent_stage=1", "pad_latent_to_max=false", "grad_clip=0.5"]
    common += ["reset_optimizer=false", "uniform_prob=0.5"]
    start(run_arguments, "name=one", *common)
    common.append("batch_size_training=2")
    fsdp = [*common, "parallel=fsdp"]
    variants = {"ddp": common, "pass": fsdp, "step": [*fsdp, "fsdp_gather=step"]}
    several(tmp_path, run_arguments, {**variants, "shards": [*fsdp, "sharded_checkpoints=true"]})
    runs = tmp_path / "checkpoints"
    one = weights(runs / "one" / "checkpoint_2")
    for name in variants:
        assert losses(runs / name) == pytest.approx(losses(runs / "one"), abs=1e-5), name
        other = weights(runs / name / "checkpoint_2")
        for part, values in one["map"].items():
            torch.testing.assert_close(other["map"][part], values, rtol=1e-3, atol=1e-5)
    convert.consolidate(runs / "shards", tmp_path / "whole")
    for directory in (tmp_path / "whole", runs / "shards" / "checkpoint_2"):
        found, expected = read_map(directory), read_map(runs / "pass" / "checkpoint_2")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[part], expected[part]) for part in expected)
    start(run_arguments, "name=eval", "only_eval=true", "from_scratch=false", f"load_model_path={runs / 'shards'}")
    expected_loss = read_rows(runs / "shards" / "metrics.jsonl", "epoch")[-1]["val_loss"]
    assert read_evaluation(runs / "eval")["loss"] == pytest.approx(expected_loss, abs=1e-5)


def test_a_state_dict_of_the_whole_model_is_converted(projected: Path, tmp_path: Path) -> None:
    facts = json.loads((projected / "coconut.json").read_text())
    told = {name: facts[name] for name in ("method", "stage", "c_thought", "max_latent_stage", "pad_latent_to_max", "epoch")}
    subject = sources.evaluation_config(
        RunConfig(name="x", val_path="", only_eval=True, coconut=True, model_id=str(projected), load_model_path=str(projected))
    )[0]
    words = sources.load_run_tokenizer(subject)
    model = run.build_model(subject, words, run.latent_ids(words, "coconut"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    convert.convert(tmp_path / "state.pt", tmp_path / "new", str(projected), {**told, "thought_map": PROJECTION})
    assert all(torch.equal(value, read_map(projected)[name]) for name, value in read_map(tmp_path / "new").items())
    with pytest.raises(UserError, match=r"thought_map identity does not fit .* unexpected keys"):
        convert.convert(tmp_path / "state.pt", tmp_path / "newer", str(projected), told)
    torch.save(model.base_causallm.state_dict(), tmp_path / "base.pt")
    with pytest.raises(UserError, match="missing keys"):
        convert.convert(tmp_path / "base.pt", tmp_path / "newer", str(projected), {**told, "thought_map": PROJECTION})


def test_a_row_from_outside_is_trained_and_evaluated(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixed(ThoughtMap):
        layers = (1, -1)

        def __init__(self, base: Any, share: float = 0.5) -> None:
            super().__init__()
            self.share = torch.nn.Parameter(torch.tensor(share))

        def forward(self, states: Any) -> torch.Tensor:
            return self.share * states[0] + (1 - self.share) * states[1]

    monkeypatch.setitem(thoughts.THOUGHT_MAPS, "mixed", MapKind(Mixed, "a mean of two layers"))
    start(run_arguments, "thought_map={name: mixed, share: 0.25}", "num_epochs=2", "max_latent_stage=1")
    whole = tmp_path / "checkpoints" / "run"
    assert 0.2 < read_map(whole / "checkpoint_2")["share"] < 0.3
    start(run_arguments, "name=eval", "only_eval=true", "from_scratch=false", f"load_model_path={whole}")
