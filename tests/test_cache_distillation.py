"""KaVa: its loss and gradients against a reference that goes row by row, layer by layer, head by head; and in a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_rows
from processes import launch
from test_distillation import examples
from test_run import start
from transformers import GPT2Config

from coconut import Coconut
from generation import transformer_blocks
from methods import Totals
from methods.cache_distillation import CodiKvOptions, best_entries, codi_kv_loss, entry_scores, teacher_memory
from methods.distillation import CodiOptions, codi_loss
from systems.activation_checkpointing import recompute_activations
from utils import UserError

THOUGHTS = "thought_map={name: projection, width: 5}"
CODI_KV = ["method=codi_kv", "c_thought=2", "max_latent_stage=2", THOUGHTS, "attn_implementation=eager"]
PARTS = {"codi_teacher_weight": 0.5, "codi_distillation_weight": 3.0}


def options(importance: float = 0.3, power: int = 1) -> CodiKvOptions:
    return CodiKvOptions(**PARTS, codi_kv_weight=0.7, codi_kv_importance=importance, codi_kv_power=power)


def totals(rows: list[dict[str, Any]]) -> Totals:
    labels = {"main": "labels", "teacher": "teacher/labels"}
    return Totals(
        {name: float(sum(label >= 0 for row in rows for label in row[key])) for name, key in labels.items()}, len(rows)
    )


def student_cache(model: Coconut, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer the keys and values (H, M, W) at the latents; each thought from a pass over everything before it."""
    embeds = model.embedding(torch.tensor([ids]))
    latents = [column for column, token in enumerate(ids) if token == model.latent_token_id]
    for column in latents:
        before = model.base_causallm(inputs_embeds=embeds[:, :column], output_hidden_states=True).hidden_states[-1]
        embeds = torch.cat([embeds[:, :column], model.thought_map([before[:, -1:]]), embeds[:, column + 1 :]], dim=1)
    cache = model.base_causallm(inputs_embeds=embeds, use_cache=True).past_key_values
    return [(layer.keys[0][:, latents], layer.values[0][:, latents]) for layer in cache.layers]


def naive_cache_loss(model: Coconut, rows: list[dict[str, Any]], importance: float, power: int) -> torch.Tensor:
    total = torch.zeros(())
    for row in rows:
        student = student_cache(model, row["input_ids"])
        size = student[0][0].shape[1]
        length, answer = len(row["teacher/input_ids"]), sum(label >= 0 for label in row["labels"])
        steps = [c for c in range(length - answer) if row["teacher/labels"][c] >= 0]
        with torch.no_grad():
            ids = torch.tensor([row["teacher/input_ids"]])
            teacher = model.base_causallm(input_ids=ids, use_cache=True, output_attentions=True)
        layers = zip(student, teacher.past_key_values.layers, teacher.attentions, strict=True)
        for (own_keys, own_values), layer, attention in layers:
            keys, values, heads = layer.keys[0], layer.values[0], len(layer.keys[0])
            group = attention.shape[1] // heads
            for head in range(heads):
                scores = []
                for entry in steps:
                    paid = [
                        sum(
                            (attention[0, query, at, entry] / attention[0, query, at, steps].sum()).item()
                            for at in range(length - answer, length)
                        )
                        / answer
                        for query in range(head * group, (head + 1) * group)
                    ]
                    alike = [
                        torch.cosine_similarity(keys[head, entry], keys[head, c], dim=0).item() for c in steps if c != entry
                    ]
                    mean = sum(alike) / max(1, len(alike))
                    scores.append((max(paid), math.exp(-mean)))
                norm = sum(one for _, one in scores)
                worth = [importance * paid + (1 - importance) * distinct / norm for paid, distinct in scores]
                best = sorted(sorted(range(len(steps)), key=lambda number, worth=worth: -worth[number])[:size])
                for thought, chosen in enumerate(best):
                    for own, given in ((own_keys, keys), (own_values, values)):
                        distance = (given[head, steps[chosen]] - own[head, thought]).abs() ** power
                        total = total + distance.sum() / (2 * size) / heads / len(student)
    return total / len(rows)


def shared_heads(directory: Path) -> None:
    """Two queries' heads for each key's, and three layers."""
    values = json.loads((directory / "config.json").read_text())
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    (directory / "config.json").write_text(json.dumps(values | sizes))


def gpt2(directory: Path) -> None:
    GPT2Config(vocab_size=100, n_embd=32, n_head=2, n_layer=2, n_positions=128, eos_token_id=1).save_pretrained(directory)


@pytest.mark.parametrize("change", [shared_heads, gpt2])
@pytest.mark.parametrize(("importance", "power"), [(0.3, 1), (1.0, 2), (0.0, 1)])
def test_loss_and_gradients_are_those_of_the_naive_reference(
    run_arguments: list[str], model_directory: Path, change: Any, importance: float, power: int
) -> None:
    change(model_directory)
    model, collator, rows = examples(run_arguments, *CODI_KV)
    codi = codi_loss(model, collator(rows), totals(rows), CodiOptions(**PARTS)).total
    expected = codi + 0.7 * naive_cache_loss(model, rows, importance, power)
    expected.backward()
    wanted = gradients(model)
    for recomputed in (False, True):
        if recomputed:
            recompute_activations(transformer_blocks(model))
        loss = codi_kv_loss(model, collator(rows), totals(rows), options(importance, power))
        assert loss.parts["cache"] > 0
        assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.total.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_teacher_s_memory_is_without_dropout(run_arguments: list[str], model_directory: Path) -> None:
    gpt2(model_directory)  # dropout 0.1
    model, collator, rows = examples(run_arguments, *CODI_KV)
    batch = collator(rows)
    expected, _ = teacher_memory(model.eval(), batch, 4, 0.3)
    found, _ = teacher_memory(model.train(), batch, 4, 0.3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(module.training for module in model.modules())


def gradients(model: Coconut) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_the_best_entries_keep_their_order_and_spare_thoughts_have_none() -> None:
    scores = torch.tensor([[[0.0, 0.1, 0.5, 0.2, 0.4, 0.0]], [[0.0, 0.0, 0.0, 0.9, 0.0, 0.0]]])
    is_step = torch.tensor([[False, True, True, True, True, False], [False, False, False, True, False, False]])
    assert best_entries(scores, is_step, 3)[0, 0].tolist() == [2, 3, 4]
    assert best_entries(scores, is_step, 3)[1, 0, 0] == 3
    assert best_entries(scores, is_step, 8)[0, 0, :4].tolist() == [1, 2, 3, 4]


def test_an_entry_is_worth_the_attention_it_gets_and_its_distance_from_the_others() -> None:
    keys = torch.tensor([[[[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]]])
    attention = torch.zeros(1, 1, 5, 5)
    attention[0, 0, 4] = torch.tensor([0.6, 0.1, 0.3, 0.0, 0.0])
    is_step, is_answer = torch.tensor([[0, 1, 1, 1, 0]]).bool(), torch.tensor([[0, 0, 0, 0, 1]]).bool()
    assert entry_scores(keys, attention, is_step, is_answer, 1.0)[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 0, 0])
    distinct = torch.tensor([-0.5, -0.5, 0.0]).softmax(dim=0).tolist()
    assert entry_scores(keys, attention, is_step, is_answer, 0.0)[0, 0].tolist() == pytest.approx([0, *distinct, 0])


def test_a_run_tells_the_part_and_two_processes_agree_with_one(run_arguments: list[str], tmp_path: Path) -> None:
    more = [*CODI_KV, "num_epochs=1", "latent_mode=jacobi", "jacobi_iterations=1"]
    start(run_arguments, *more, "name=one", "batch_size_training=4")
    result = launch(
        2, run_arguments, *more, "name=two", "batch_size_training=2", "parallel=fsdp", "activation_checkpointing=true"
    )
    assert result.returncode == 0, result.stderr
    one, two = (read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "step") for name in ("one", "two"))
    assert [row["loss_cache"] for row in two] == pytest.approx([row["loss_cache"] for row in one], rel=1e-3)


def test_attention_must_be_told(run_arguments: list[str]) -> None:
    with pytest.raises(UserError, match="attn_implementation: codi_kv needs eager"):
        start(run_arguments, *CODI_KV, "attn_implementation=sdpa")
