"""CODI: its loss and gradients against a reference that recomputes everything, and the token at which it distils."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_rows
from processes import launch
from test_evaluation import evaluator
from test_run import start
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from coconut import Coconut
from dataset import MyCollator, get_cot_latent_dataset
from methods import Totals, before_answer
from methods.distillation import CodiOptions, codi_loss
from systems.checkpoint import CheckpointError
from systems.tokens import _Tokenize
from utils import UserError

CODI = ["method=codi", "c_thought=2", "thought_map={name: projection, width: 5}"]
OPTIONS = CodiOptions(codi_teacher_weight=0.5, codi_distillation_weight=3.0)


def examples(run_arguments: list[str], *more: str) -> tuple[Coconut, Any, list[dict[str, Any]]]:
    """A random model, its collator, and four training examples of different length."""
    judge, model = evaluator(run_arguments, *CODI, *more)
    ids = judge.ids
    rows = get_cot_latent_dataset(9, judge.dataset, judge.curriculum, ids.start, ids.thought, ids.end)
    return model, MyCollator(judge.tokenizer, ids.latent), [rows[number] for number in range(4)]


def naive_states(model: Coconut, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """All layers' states (T, D) of one row; each thought from a pass over everything before it, without a cache."""
    embeds = model.embedding(torch.tensor([ids]))
    for column, token in enumerate(ids):
        if token == model.latent_token_id:
            before = model.base_causallm(inputs_embeds=embeds[:, :column], output_hidden_states=True).hidden_states[-1]
            thought = model.thought_map([before[:, -1:]])
            embeds = torch.cat([embeds[:, :column], thought, embeds[:, column + 1 :]], dim=1)
    return tuple(layer[0] for layer in model.base_causallm(inputs_embeds=embeds, output_hidden_states=True).hidden_states)


def naive_loss(model: Coconut, rows: list[dict[str, Any]]) -> torch.Tensor:
    total = {"": torch.zeros(()), "teacher/": torch.zeros(())}
    at: dict[str, list[tuple[torch.Tensor, ...]]] = {"": [], "teacher/": []}
    count = {"": 0, "teacher/": 0}
    for row in rows:
        for prefix in total:
            layers = naive_states(model, row[prefix + "input_ids"])
            labels = torch.tensor(row[prefix + "labels"])
            logits = model.base_causallm.get_output_embeddings()(layers[-1])
            total[prefix] = total[prefix] + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
            count[prefix] += int((labels != -100).sum())
            at[prefix].append(tuple(layer[row[prefix + "answer_at"] - 1] for layer in layers))
    distances = []
    for student, teacher in zip(zip(*at[""], strict=True), zip(*at["teacher/"], strict=True), strict=True):
        target = torch.stack(teacher).detach()
        distances.append(F.smooth_l1_loss(torch.stack(student), target) / target.std())
    ce, teacher_ce = (total[prefix] / count[prefix] for prefix in total)
    return ce + 0.5 * teacher_ce + 3 * torch.stack(distances).mean()


def test_loss_and_gradients_are_those_of_the_naive_reference(run_arguments: list[str]) -> None:
    model, collator, rows = examples(run_arguments)
    expected = naive_loss(model, rows)
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    labels = {
        name: float(sum(len([one for one in row[key] if one != -100]) for row in rows))
        for name, key in (("main", "labels"), ("teacher", "teacher/labels"))
    }
    loss = codi_loss(model, collator(rows), Totals(labels, len(rows)), OPTIONS)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(
        (loss.parts["student"] + 0.5 * loss.parts["teacher"] + 3 * loss.parts["distillation"]).item(), rel=1e-5
    )
    loss.total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
    assert model.thought_map.state_dict()  # the projection has weights, and they have gradients
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.thought_map.parameters())


def test_as_many_latents_in_every_question(run_arguments: list[str]) -> None:
    """A row with fewer latents has its answer before the last pass, whose states are read."""
    for method in ("codi", "codi_simcot", "codi_kv"):
        with pytest.raises(UserError, match=f"pad_latent_to_max: False: method {method} needs as many latents"):
            start(run_arguments, *CODI, f"method={method}", "pad_latent_to_max=false")
    states, batch = torch.rand(2, 4, 3), {"input_ids": torch.zeros(2, 9), "answer_at": torch.tensor([7, 5])}
    with pytest.raises(RuntimeError, match="out of bounds"):
        before_answer(states, batch)  # of the last four columns
    batch["answer_at"] += 1
    assert torch.equal(before_answer(states, batch), states[[0, 1], [2, 0]])


def test_the_teacher_writes_all_steps_but_the_last(run_arguments: list[str]) -> None:
    judge, _ = evaluator(run_arguments, *CODI)
    ids = judge.ids
    row = get_cot_latent_dataset(9, judge.dataset, judge.curriculum, ids.start, ids.thought, ids.end)[2]
    record = judge.dataset[2]
    written = [token for step in record["steps_tokenized"][:-1] for token in step]
    assert len(record["steps"]) == 3
    assert row["teacher/input_ids"] == record["question_tokenized"] + written + record["answer_tokenized"]


def tokenizer_of(vocabulary: list[str], pattern: str) -> PreTrainedTokenizerFast:
    """One token for each match of a pattern; blanks are Ġ as in byte-level tokenizers where the vocabulary says so."""
    from tokenizers import Regex

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*vocabulary, "<unk>"])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<unk>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("pattern", "tokens", "before"),
    [
        (r"###| ?\d+", ["###", " 72"], 1),  # GPT-2: the blank belongs to the number
        (r"###| |\d+", ["###", " ", "72"], 2),  # Llama 3: the blank stands alone
        (r"###| |\d", ["###", " ", "7", "2"], 2),  # Qwen, SmolLM2: each digit too
        (r"### ?|\d+", ["### ", "72"], 1),  # the blank belongs to what opens the answer
        (r"#| |\d+", ["#", "#", "#", " ", "72"], 4),
    ],
)
def test_the_answers_first_own_token_is_found(pattern: str, tokens: list[str], before: int) -> None:
    tokenizer = tokenizer_of(sorted(set(tokens)), pattern)
    assert tokenizer.convert_ids_to_tokens(tokenizer("### 72")["input_ids"]) == tokens
    rows = _Tokenize(tokenizer, chat_template=False)({"question": ["72"], "steps": [[]], "answer": ["72"]})
    assert rows["before_answer"] == [before]


def test_training_tells_the_three_parts_and_two_processes_agree_with_one(run_arguments: list[str], tmp_path: Path) -> None:
    """The cross entropies agree; the distance is scaled by the spread within a micro-batch, whose questions are others here."""
    start(run_arguments, *CODI, "name=one", "batch_size_training=4", "num_epochs=1")
    for name, more in {"ddp": [], "fsdp": ["parallel=fsdp"]}.items():
        result = launch(2, run_arguments, *CODI, f"name={name}", "batch_size_training=2", "num_epochs=1", *more)
        assert result.returncode == 0, result.stderr
    one, *others = (read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "step") for name in ("one", "ddp", "fsdp"))
    for rows in others:
        for row, expected in zip(rows, one, strict=True):
            assert row["loss_student"] == pytest.approx(expected["loss_student"], rel=1e-3)
            assert row["loss_teacher"] == pytest.approx(expected["loss_teacher"], rel=1e-3)
            assert row["loss_distillation"] == pytest.approx(expected["loss_distillation"], rel=0.2)


def test_the_published_padding_is_an_option(run_arguments: list[str], tmp_path: Path) -> None:
    """attend_padding: against passes by hand whose mask is all ones after the first; kept by a run."""
    model, collator, rows = examples(run_arguments, "attend_padding=true", "attn_implementation=eager")
    assert model.attend_padding
    batch = collator(sorted(rows, key=lambda row: len(row["input_ids"])))
    ids, mask, positions = (batch[key] for key in ("input_ids", "attention_mask", "position_ids"))
    padded = (mask[:, 0] == 0).nonzero().flatten().tolist()
    whole = [row for row in range(len(ids)) if row not in padded]
    assert padded
    assert whole
    latents = (ids == model.latent_token_id).any(dim=0).nonzero().flatten().tolist()
    embeds, states, cache, begin = model.embedding(ids), [], None, 0
    for end in [*latents, ids.shape[1]]:
        part = embeds[:, begin:end]
        if states:
            part = torch.cat([model.thought_map([states[-1][:, -1:]]), part[:, 1:]], dim=1)
        outputs = model.decoder(
            inputs_embeds=part,
            attention_mask=mask[:, :end] if begin == 0 else torch.ones_like(mask[:, :end]),
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        states.append(outputs.last_hidden_state)
        cache, begin = outputs.past_key_values, end
    hidden = torch.cat(states, dim=1)
    real = (batch["labels"] >= 0)[..., None]
    torch.testing.assert_close(model.think(ids, mask, positions).hidden * real, hidden * real)
    model.attend_padding = False
    honest = model.think(ids, mask, positions).hidden
    torch.testing.assert_close((honest * real)[whole], (hidden * real)[whole])
    assert all((honest[row, latents] - hidden[row, latents]).abs().max() > 1e-3 for row in padded)
    settings = [*CODI, "attend_padding=true", "num_epochs=1"]
    start(run_arguments, *settings)
    assert Coconut.from_pretrained(str(tmp_path / "checkpoints" / "run")).attend_padding
    with pytest.raises(CheckpointError, match="was trained with attend_padding True, not False"):
        start(run_arguments, *CODI, "num_epochs=2")
