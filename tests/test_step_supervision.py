"""SIM-CoT: its loss and gradients against a reference that recomputes everything, what thoughts have to write, the second model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_rows
from processes import launch
from safetensors.torch import load_file
from same_run import differences
from test_distillation import naive_loss as naive_codi
from test_distillation import naive_states
from test_evaluation import evaluator
from test_run import start
from torch.nn import functional as F

from coconut import Coconut
from dataset import MyCollator, get_cot_latent_dataset
from experiments.probes.base import Probed
from experiments.probes.spelled import spelled
from methods import METHODS, Parts, StageShape, Totals
from methods.step_supervision import CodiSimcotOptions, SimcotOptions, StepDecoder, steps_of_thoughts

SIMCOT = ["method=simcot", "c_thought=2", "max_latent_stage=2", "epochs_per_stage=1"]
CODI = ["method=codi_simcot", "c_thought=1", "max_latent_stage=2", "thought_map={name: projection, width: 5}"]
EOS = 99


def examples(run_arguments: list[str], *more: str, stage: int = 9) -> tuple[Coconut, Any, list[dict[str, Any]]]:
    """A random model, its collator, and four training examples of different length."""
    judge, model = evaluator(run_arguments, *more)
    ids = judge.ids
    rows = get_cot_latent_dataset(stage, judge.dataset, judge.curriculum, ids.start, ids.thought, ids.end)
    return model.train(), MyCollator(judge.tokenizer, ids.latent), [rows[number] for number in range(4)]


def totals(rows: list[dict[str, Any]]) -> Totals:
    names = {key.rpartition("/")[0] or "main": key for key in rows[0] if key.endswith("labels")}
    return Totals({name: float(sum(one >= 0 for row in rows for one in row[key])) for name, key in names.items()}, len(rows))


def fed_back(model: Coconut, ids: list[int]) -> list[torch.Tensor]:
    """The thoughts (1, 1, D) of one row, and what would be fed back after the last one."""
    return [
        model.thought_map([naive_states(model, ids[:column])[-1][None, -1:]])
        for column in range(1, len(ids) + 1)
        if (column < len(ids) and ids[column] == model.latent_token_id) or ids[column - 1] == model.latent_token_id
    ]


def naive_steps(model: Coconut, row: dict[str, Any], vectors: int) -> list[torch.Tensor]:
    """The cross entropies of one row's thoughts, by token: each thought alone in the second model."""
    thoughts, losses = fed_back(model, row["input_ids"]), []
    for number in range(1, 9):
        ids = row.get(f"step{number}/input_ids", [])
        if not ids:
            continue
        assert ids[:vectors] == [model.latent_token_id] * vectors
        written = torch.tensor([ids[vectors:]])
        own = thoughts[(number - 1) * vectors : number * vectors]
        embeds = torch.cat([*own, model.embedding(written)], dim=1)
        positions = torch.arange(1, embeds.shape[1] + 1)[None]
        copied: Any = model.step_decoder
        logits = copied.model.base_causallm(inputs_embeds=embeds, position_ids=positions).logits[0]
        losses.append(F.cross_entropy(logits[vectors - 1 : -1], written[0], reduction="none"))
    return losses


def agree(model: Coconut, found: Any, expected: torch.Tensor) -> None:
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = []
    for loss in (expected, found):
        model.zero_grad()
        loss.backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-6)
    assert any(name.startswith("step_decoder.") and grad.abs().sum() > 0 for name, grad in gradients[1].items())


@pytest.mark.parametrize("stage", [1, 9])
def test_simcot_is_that_of_the_naive_reference(run_arguments: list[str], stage: int) -> None:
    model, collator, rows = examples(run_arguments, *SIMCOT, stage=stage)
    plain, labels = torch.zeros(()), 0
    steps = torch.zeros(())
    for row in rows:
        layers = naive_states(model, row["input_ids"])
        logits = model.base_causallm.get_output_embeddings()(layers[-1])
        targets = torch.tensor(row["labels"])
        plain = plain + F.cross_entropy(logits[:-1], targets[1:], reduction="sum", ignore_index=-100)
        labels += int((targets != -100).sum())
        each = naive_steps(model, row, 2)
        assert len(each) == min(stage, 2)
        steps = steps + sum(one.sum() for one in each) / len(each)
    options = SimcotOptions(simcot_weight=0.5, c_thought=2)
    loss = METHODS["simcot"].loss(model, collator(rows), totals(rows), options)
    agree(model, loss.total, plain / labels + 0.5 * steps / len(rows))
    assert loss.parts["steps"].item() == pytest.approx(steps.item() / len(rows), rel=1e-5)


def test_codi_with_simcot_is_that_of_the_naive_reference(run_arguments: list[str]) -> None:
    """Three slots for two latents: what comes after the last one writes a step, too."""
    model, collator, rows = examples(run_arguments, *CODI)
    steps = torch.zeros(())
    slots = [naive_steps(model, row, 1) for row in rows]
    assert max(map(len, slots)) == 3
    for each in slots:
        steps = steps + sum(one.mean() for one in each) / len(each)
    options = CodiSimcotOptions(codi_teacher_weight=0.5, codi_distillation_weight=3.0, simcot_weight=2.0)
    loss = METHODS["codi_simcot"].loss(model, collator(rows), totals(rows), options)
    agree(model, loss.total, naive_codi(model, rows) + 2 * steps / len(rows))


def test_without_thoughts_it_is_the_plain_loss_and_every_parameter_has_a_gradient(run_arguments: list[str]) -> None:
    model, collator, rows = examples(run_arguments, *SIMCOT, stage=0)
    batch = collator(rows)
    loss = METHODS["simcot"].loss(model, batch, totals(rows), SimcotOptions(1.0, 2))
    assert loss.parts["steps"].item() == 0
    assert loss.total.item() == pytest.approx(METHODS["coconut"].loss(model, batch, totals(rows)).total.item())
    loss.total.backward()
    assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []


@pytest.mark.parametrize(
    ("steps", "thoughts", "expected"),
    [
        ([[1], [2], [3]], 3, [[1], [2], [3]]),
        ([[1], [2], [3]], 2, [[1], [2, 3]]),
        ([[1], [2], [3]], 1, [[1, 2, 3]]),
        ([[1], [2]], 4, [[1], [2]]),
        ([[1]], 0, []),
        ([], 2, []),
    ],
)
def test_the_last_thought_has_the_steps_that_are_left_over(
    steps: list[list[int]], thoughts: int, expected: list[list[int]]
) -> None:
    assert steps_of_thoughts(steps, thoughts) == expected


def parts(removed: int, latents: int, steps: int = 3) -> Parts:
    each = [[10 + number] for number in range(steps)]
    curriculum: Any = SimpleNamespace(c_thought=2, max_latent_stage=3)
    return Parts([1], [1], each, [7, EOS], StageShape(latents, removed), curriculum)


def written(method: str, given: Parts) -> list[list[int]]:
    sequences = METHODS[method].sequences(given)  # type: ignore[misc]
    return [one.target for name, one in sequences.items() if name.startswith("step")]


def test_thoughts_left_over_write_the_answer_with_coconut_and_nothing_with_codi() -> None:
    assert written("simcot", parts(removed=1, latents=2)) == [[10, EOS], [], []]
    assert written("simcot", parts(removed=3, latents=6)) == [[10, EOS], [11, EOS], [12, EOS]]
    assert written("simcot", parts(removed=3, latents=4)) == [[10, EOS], [11, 12, EOS], []]
    assert written("simcot", parts(removed=1, latents=6, steps=1)) == [[10, EOS], [7, EOS], [7, EOS]]
    assert written("codi_simcot", parts(removed=3, latents=6)) == [[10, EOS], [11, EOS], [12, EOS], [], [], [], []]
    assert written("codi_simcot", parts(removed=3, latents=1)) == [[10, EOS], [11, 12, EOS], *[[]] * 5]


SMALL = ["batch_size_training=4", "num_epochs=2", "max_new_tokens=2"]


def test_a_resumed_run_is_the_same_and_the_second_model_stays_out_of_what_is_exported(
    run_arguments: list[str], tmp_path: Path
) -> None:
    start(run_arguments, *SIMCOT, *SMALL, "name=whole")
    start(run_arguments, *SIMCOT, *SMALL, "name=parts", "num_epochs=1")
    start(run_arguments, *SIMCOT, *SMALL, "name=parts", "num_epochs=2")
    whole, resumed = (tmp_path / "checkpoints" / name for name in ("whole", "parts"))
    assert differences(whole, resumed) == []
    kept = [load_file(one / "checkpoint_2" / "step_decoder.safetensors") for one in (whole, resumed)]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
    begun = load_file(whole / "checkpoint_1" / "step_decoder.safetensors")
    assert any(not torch.equal(kept[0][key], begun[key]) for key in begun)  # it is trained
    model = Coconut.from_pretrained(whole)
    assert model.step_decoder is None
    model.save_pretrained(tmp_path / "exported")
    assert not (tmp_path / "exported" / "step_decoder.safetensors").exists()


@pytest.mark.parametrize("method", [SIMCOT, CODI], ids=["simcot", "codi_simcot"])
def test_two_processes_agree_with_one(run_arguments: list[str], tmp_path: Path, method: list[str]) -> None:
    """Stage 1 of both, one method a way of sharing; with mixed stages one process has no thought where the other has some."""
    mixed, way = (["uniform_prob=0.5"], "fsdp") if method is SIMCOT else ([], "ddp")
    common = [*method, *mixed, "num_epochs=2", "max_new_tokens=2", "log_every=1"]
    start(run_arguments, *common, "name=one", "batch_size_training=4")
    result = launch(2, run_arguments, *common, "name=two", "batch_size_training=2", f"parallel={way}")
    assert result.returncode == 0, result.stderr
    one, two = (read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "step") for name in ("one", "two"))
    for row, expected in zip(two, one, strict=True):
        assert row["loss_steps"] == pytest.approx(expected["loss_steps"], rel=2e-3, abs=1e-5)
    for epochs in (1, 2) if method is SIMCOT else ():  # sharded, and in two parts
        more = [f"num_epochs={epochs}", "name=resumed", "batch_size_training=2", "parallel=fsdp"]
        assert launch(2, run_arguments, *common, *more).returncode == 0
        kept = tmp_path / "checkpoints"
        assert epochs == 1 or differences(kept / "two", kept / "resumed") == []


def test_it_writes_greedily_from_the_thought_alone(run_arguments: list[str]) -> None:
    _, model = evaluator(run_arguments, *SIMCOT)
    decoder: Any = model.step_decoder
    thoughts = torch.randn(3, 2, model.embedding.embedding_dim)
    for row, written in enumerate(decoder.eval().write(thoughts, model.embedding, 4).tolist()):
        embeds = thoughts[row : row + 1]
        for token in written:
            positions = torch.arange(1, embeds.shape[1] + 1)[None]
            logits = decoder.model.base_causallm(inputs_embeds=embeds, position_ids=positions).logits[0, -1]
            assert logits.argmax().item() == token
            embeds = torch.cat([embeds, model.embedding(torch.tensor([[token]]))], dim=1)


def test_the_probe_finds_the_step_that_is_written(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: from every thought the second step of one question is written, and its end."""
    start(run_arguments, *SIMCOT, *SMALL, "num_epochs=3")
    data = next(Path(one.split("=", 1)[1]) for one in run_arguments if one.startswith("val_path="))
    checkpoint = str(tmp_path / "checkpoints" / "run")
    probed = Probed.load(checkpoint, data, 5, {"batch_size_eval": 2}, torch.device("cpu"))
    steps = probed.dataset["steps_tokenized"]
    chosen = next(own[1] for own in steps if len(own) > 1)
    planted = [*chosen, probed.model.eos_token_id]

    def write(self: StepDecoder, vectors: torch.Tensor, embedding: Any, most: int) -> torch.Tensor:
        assert vectors.shape[1] == 2  # c_thought
        return torch.tensor([[*planted, *[0] * most][:most]] * len(vectors))

    assert probed.model.step_decoder is None
    monkeypatch.setattr(StepDecoder, "write", write)
    found = spelled(probed)
    assert probed.model.step_decoder is None
    assert {key.split(" writes")[0] for key in found} == {"thought 1", "thought 2"}
    for key, values in found.items():
        step = int(key.split()[-1])
        expected = [100.0 * (own[step - 1] == chosen) if len(own) >= step else float("nan") for own in steps]
        assert np.array_equal(values, expected, equal_nan=True), key
    start(run_arguments, "name=plain", *SMALL)
    assert spelled(Probed.load(str(tmp_path / "checkpoints" / "plain"), data, 5, {}, torch.device("cpu"))) == {}


def test_what_does_not_go_together_is_refused(run_arguments: list[str]) -> None:
    result = launch(1, run_arguments, *SIMCOT, "parallel=fsdp", "fsdp_gather=step")
    assert result.returncode != 0
    assert "fsdp_gather: step: not with method simcot, which trains a second model: leave it out" in result.stderr


def test_lora_trains_the_second_model_whole(run_arguments: list[str], tmp_path: Path) -> None:
    lora = ["lora_r=2", "from_scratch=false", f"model_id={tmp_path / 'base'}"]
    start(run_arguments, "name=base", "num_epochs=1", "max_new_tokens=2")
    source = tmp_path / "checkpoints" / "base" / "checkpoint_1"
    lora[-1] = f"load_model_path={source}"
    start(run_arguments, *SIMCOT, *SMALL, *lora, "name=whole")
    start(run_arguments, *SIMCOT, *SMALL, *lora, "name=parts", "num_epochs=1")
    start(run_arguments, *SIMCOT, *SMALL, *lora, "name=parts")
    assert differences(*(tmp_path / "checkpoints" / name for name in ("whole", "parts"))) == []
