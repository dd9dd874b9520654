"""Records, tokens, stages and batches; the published code's recorded sequences and training losses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from conftest import PUBLISHED, ROOT, chain_records, write_json
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import Coconut
from dataset import (
    MyCollator,
    check_lengths,
    get_cot_latent_dataset,
    get_question_latent_dataset,
    load_records,
)
from methods import stage_shape
from systems.batches import batch_loader, collated, cut, epoch_groups, epoch_order, example_lengths, group_by_length
from systems.signals import STOP_SIGNALS
from systems.tokens import get_dataset
from utils import UserError

GOLDEN = ROOT / "tests" / "golden"
STAGES = json.loads((GOLDEN / "stages.json").read_text())
MODELS = json.loads((GOLDEN / "models.json").read_text())
IDS = STAGES["token_ids"]
MARKERS = (IDS["start_latent"], IDS["latent"], IDS["end_latent"])
RECORD = {"question": "Is Tom a lempus?", "steps": ["Tom is a lempus."], "answer": "Tom is a lempus."}


def curriculum(**values: Any) -> SimpleNamespace:
    defaults = {"method": "coconut", "c_thought": 1, "max_latent_stage": 3, "pad_latent_to_max": True}
    return SimpleNamespace(**{**defaults, "uniform_prob": 0.0, "earlier_stage_prob": 0.0, "seed": 0, **values})


def fake_tokenizer() -> SimpleNamespace:
    return SimpleNamespace(pad_token_id=IDS["eos"], eos_token_id=IDS["eos"])


# --- golden ---


def case_name(case: dict[str, Any]) -> str:
    return "-".join(
        str(case[key]) for key in ("method", "c_thought", "max_latent_stage", "pad_latent_to_max", "scheduled_stage")
    )


@pytest.mark.parametrize("case", STAGES["cases"], ids=case_name)
def test_stage_examples_match_the_published_ones(case: dict[str, Any]) -> None:
    base = Dataset.from_list(STAGES["samples"])
    configuration = curriculum(**{key: case[key] for key in ("method", "c_thought", "max_latent_stage", "pad_latent_to_max")})
    stage = case["scheduled_stage"]
    training = get_cot_latent_dataset(stage, base, configuration, *MARKERS)
    prompts = get_question_latent_dataset(stage, base, configuration, *MARKERS)
    for index, sample in enumerate(STAGES["samples"]):
        for key, value in case["generate"][index].items():
            assert prompts[index][key] == value
        # Without padding the published code trains a question of few steps with more latents than it evaluates it with.
        if case["pad_latent_to_max"] or len(sample["steps_tokenized"]) >= min(stage, case["max_latent_stage"]):
            for key, value in case["train"][index].items():
                assert training[index][key] == value


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_losses_match_the_published_ones(family: str) -> None:
    golden = MODELS[family]
    plan = golden["training"]
    config = {key: value for key, value in golden["config"].items() if not key.startswith(("_attn", "transformers"))}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tensors = load_file(GOLDEN / f"{family}.safetensors")
    base.load_state_dict({key[7:]: value for key, value in tensors.items() if key.startswith("weight.")}, strict=False)
    base.tie_weights()
    model = Coconut(base, IDS["latent"], IDS["start_latent"], IDS["end_latent"], IDS["eos"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    # The recorded run began with the gradients of the batch "ragged" still in place (found by trial: without them the
    # second loss already differs by 0.02, with them all 24 agree to 1e-6), so this one does too.
    for name, parameter in base.named_parameters():
        parameter.grad = tensors[f"ragged.grad.{name}"].clone()
    collator = MyCollator(fake_tokenizer(), IDS["latent"])
    configuration = curriculum(c_thought=plan["c_thought"], max_latent_stage=plan["max_latent_stage"])
    samples = Dataset.from_list(plan["samples"])
    losses = []
    for stage in plan["stages"]:
        examples = get_cot_latent_dataset(stage, samples, configuration, *MARKERS)
        for _ in range(plan["epochs_per_stage"]):
            for start in range(0, len(samples), plan["batch_size"]):
                batch = collator(examples.__getitems__(list(range(start, start + plan["batch_size"]))))
                batch.pop("idx")
                loss = model(**batch, labelled_only=True).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert losses == pytest.approx(plan["losses"], abs=1e-3)


# --- records ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"question": "q"}', "expected a list of records, found an object"),
        ("[]", "the data set is empty"),
        ("[1]", "record 0: expected an object with question, answer and steps, found a number"),
        (
            json.dumps([RECORD, {**RECORD, "steps": "a b"}]),
            "record 1: field 'steps': expected a list of strings, found a string",
        ),
        (json.dumps([{"question": "q", "answer": "a"}]), "record 0: field 'steps' is missing"),
        (json.dumps([{**RECORD, "steps": ["a", 3]}]), "field 'steps[1]': expected a string, found a number"),
        (json.dumps([{**RECORD, "answer": 72}]), "field 'answer': expected a string, found a number"),
        (json.dumps([{**RECORD, "question": None}]), "field 'question': expected a string, found null"),
        (json.dumps([{**RECORD, "question": " "}]), "field 'question' is blank"),
    ],
)
def test_malformed_data_is_one_line_with_file_index_field_and_reason(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_records(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing.json: no such file"):
        load_records(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.json: line 1: cannot be read"):
        load_records(tmp_path / "binary.json")
    with pytest.raises(ValueError, match="not a regular file"):
        load_records(tmp_path)


def test_blank_steps_are_no_steps_and_further_fields_are_kept(tokenizer: Any, tmp_path: Path) -> None:
    record = {**RECORD, "steps": ["", "Tom is a lempus.", "  "], "edges": [[0, 1]], "root": 3}
    row = get_dataset(write_json(tmp_path / "data.json", [record]), tokenizer)[0]
    assert row["steps"] == ["Tom is a lempus."]
    assert len(row["steps_tokenized"]) == 1
    assert json.loads(row["extra"]) == {"edges": [[0, 1]], "root": 3}


# --- tokens kept on disk ---


def test_a_record_longer_than_the_model_is_named(tokenizer: Any, tmp_path: Path) -> None:
    dataset = get_dataset(write_json(tmp_path / "data.json", chain_records(3)), tokenizer)
    check_lengths([dataset], curriculum(), 8, 200)
    with pytest.raises(UserError, match=r"record 2 needs up to \d+ positions .*; the model has 45"):
        check_lengths([dataset], curriculum(), 8, 45)
    few = get_dataset(write_json(tmp_path / "one.json", [RECORD]), tokenizer)  # one step
    own = curriculum(pad_latent_to_max=False, c_thought=20)
    needed = len(few[0]["question_tokenized"]) + 2 + 20 + 30  # markers, thoughts of one step, answer
    check_lengths([few], own, 30, needed)
    for latents, thoughts in (("max", 60), (21, 21)):
        check_lengths([few], own, 30, needed - 20 + thoughts, latents)
        with pytest.raises(UserError, match="record 0 needs"):
            check_lengths([few], own, 30, needed - 20 + thoughts - 1, latents)


# --- stages ---


@given(stage=st.integers(0, 9), steps=st.integers(0, 9), most=st.integers(0, 6), thought=st.integers(1, 3), pad=st.booleans())
def test_latents_never_exceed_what_the_stage_or_the_question_allows(
    stage: int, steps: int, most: int, thought: int, pad: bool
) -> None:
    latents, removed, _ = stage_shape(curriculum(c_thought=thought, max_latent_stage=most, pad_latent_to_max=pad), stage, steps)
    assert latents == thought * (min(stage, most) if pad else min(stage, most, steps))
    assert removed == (stage if stage <= most else steps)


@pytest.mark.parametrize("pad", [True, False])
def test_eval_latents_are_those_of_the_steps_of_the_stage_or_a_number(pad: bool) -> None:
    two = curriculum(c_thought=2, max_latent_stage=3, pad_latent_to_max=pad)
    assert stage_shape(two, 4, 2) == stage_shape(two, 4, 2, "gold") == (6 if pad else 4, 2, 0)
    assert stage_shape(two, 4, 2, "max") == (6, 2, 0)
    assert stage_shape(two, 2, 3, "max") == (4, 2, 0)
    assert stage_shape(two, 4, 2, 5) == (5, 2, 0)  # latent tokens, not multiplied by c_thought
    assert stage_shape(curriculum(method="cot"), 0, 2, "max").thoughts == 0


def test_uniform_prob_repeats_and_depends_on_seed_and_epoch(tokenizer: Any, tmp_path: Path) -> None:
    base = get_dataset(write_json(tmp_path / "data.json", chain_records(60)), tokenizer)

    def latents(seed: int, epoch: int, order: range) -> list[int]:
        configuration = curriculum(uniform_prob=0.5, seed=seed)
        examples = get_cot_latent_dataset(3, base, configuration, 500, 501, 502, epoch)
        return [examples[index]["input_ids"].count(501) for index in order]

    first = latents(0, 0, range(60))
    assert first == latents(0, 0, range(60))
    assert first == latents(0, 0, range(59, -1, -1))[::-1]
    assert first != latents(0, 1, range(60))
    assert first != latents(1, 0, range(60))
    assert 10 < sum(count != 3 for count in first) < 45  # about half of them, less the draws of 3 itself
    prompts = get_question_latent_dataset(3, base, curriculum(uniform_prob=1.0), 500, 501, 502)
    assert {prompts[index]["input_ids"].count(501) for index in range(60)} == {3}  # evaluation is never mixed


# --- batches ---


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=6))
def test_collator_aligns_the_first_latents(shapes: list[tuple[int, int, int]]) -> None:
    latent, pad = 99, 0
    examples = []
    for row, (before, latents, after) in enumerate(shapes):
        ids = [1] * before + [latent] * latents + [2] * after
        positions = list(range(len(ids)))
        examples.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": positions, "labels": ids, "idx": row}
        )
    batch = MyCollator(SimpleNamespace(pad_token_id=pad, eos_token_id=5), latent)(examples)
    first = {(row == latent).nonzero()[0].item() for row in batch["input_ids"] if (row == latent).any()}
    assert len(first) <= 1
    for row, example in enumerate(examples):
        real = batch["attention_mask"][row].bool()
        for key in ("input_ids", "position_ids", "labels"):
            assert batch[key][row][real].tolist() == example[key]
        assert (batch["labels"][row][~real] == -100).all()
        assert (batch["position_ids"][row][~real] == 0).all()
    ends = MyCollator(SimpleNamespace(pad_token_id=None, eos_token_id=5), latent, align_end=True)(examples)
    assert ends["attention_mask"][:, -1].all()


@given(
    size=st.integers(1, 70),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_sample_is_taken_once_whatever_the_processes(
    size: int, batch: int, accumulation: int, world: int, epoch: int
) -> None:
    order = epoch_order(size, 7, epoch)
    ranks = [epoch_groups(order, batch, accumulation, rank, world) for rank in range(world)]
    seen = [index for groups in ranks for group in groups for indices, filler in group if not filler for index in indices]
    assert sorted(seen) == list(range(size))
    assert len({tuple(len(group) for group in groups) for groups in ranks}) == 1  # all processes take the same passes
    alone = epoch_groups(order, batch * world, accumulation, 0, 1)
    assert len(alone) == len(ranks[0])
    for step, group in enumerate(alone):
        together = {i for groups in ranks for indices, filler in groups[step] if not filler for i in indices}
        assert together == {index for indices, _ in group for index in indices}


@given(size=st.integers(1, 40), examples=st.integers(1, 90), epochs=st.integers(1, 6))
def test_short_epochs_take_turns_through_the_whole_set(size: int, examples: int, epochs: int) -> None:
    stream = np.concatenate([epoch_order(size, 3, epoch, examples) for epoch in range(epochs)]).tolist()
    assert len(stream) == examples * epochs
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == list(range(size))


@given(size=st.integers(1, 400), per_step=st.integers(1, 9), epoch=st.integers(0, 3))
def test_steps_by_length_take_every_sample_once_and_pad_little(size: int, per_step: int, epoch: int) -> None:
    order = epoch_order(size, 7, epoch)
    lengths = np.random.default_rng(0).integers(10, 100, size)
    grouped = group_by_length(order, lengths, per_step, (7, epoch))
    assert sorted(grouped) == sorted(order)
    assert grouped.tolist() == group_by_length(order, lengths, per_step, (7, epoch)).tolist()
    whole = size // per_step * per_step
    assert grouped[whole:].tolist() == order[whole:].tolist()
    if whole > 20 * per_step > 20:
        spread = [np.ptp(lengths[taken[:whole].reshape(-1, per_step)], axis=1).mean() for taken in (order, grouped)]
        assert spread[1] < spread[0] / 3
        starts = lengths[grouped[:whole:per_step]]
        assert (np.diff(starts) < 0).any()  # steps do not come in the order of their lengths


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 9), st.none() | st.integers(1, 100))
def test_batches_hold_as_many_as_fit(widths: list[int], rows: int, room: int | None) -> None:
    order = [*reversed(range(len(widths)))]
    batches = cut(order, widths, rows, room)
    assert [item for batch in batches for item in batch] == order
    for number, batch in enumerate(batches):
        following = batches[number + 1][:1] if number + 1 < len(batches) else []
        for members, fits in ((batch, True), (batch + following, not following)):
            size = len(members) * max(widths[item] for item in members)
            assert fits == (len(members) <= rows and (room is None or size <= room)) or len(batch) == 1 == len(members)


def test_lengths_are_those_of_all_tokens(tokenizer: Any, tmp_path: Path) -> None:
    base = get_dataset(write_json(tmp_path / "data.json", chain_records(9)), tokenizer)
    examples = get_cot_latent_dataset(0, base, curriculum(), 500, 501, 502)
    markers = 2  # stage 0 of coconut has its markers, side by side
    assert example_lengths(base).tolist() == [len(examples[place]["input_ids"]) - markers for place in range(9)]


def test_earlier_stages_are_mixed_in_but_never_later_ones(tokenizer: Any, tmp_path: Path) -> None:
    base = get_dataset(write_json(tmp_path / "data.json", chain_records(60)), tokenizer)
    examples = get_cot_latent_dataset(2, base, curriculum(earlier_stage_prob=0.8), 500, 501, 502)
    counts = [examples[index]["input_ids"].count(501) for index in range(60)]
    assert set(counts) == {0, 1, 2}
    assert counts == [examples[index]["input_ids"].count(501) for index in range(60)]


def test_a_filler_carries_no_label(tokenizer: Any, tmp_path: Path) -> None:
    base = get_dataset(write_json(tmp_path / "data.json", chain_records(3)), tokenizer)
    examples = get_cot_latent_dataset(1, base, curriculum(), 500, 501, 502)
    real, filler = (collated(examples, MyCollator(tokenizer, 501), one) for one in (([0, 1], False), ([2], True)))
    assert (real["labels"] != -100).any()
    assert (filler["labels"] == -100).all()


def test_loaders_live_through_stop_signals(tokenizer: Any, tmp_path: Path) -> None:
    """SLURM and torchrun signal them too; the step in progress still needs its batches."""
    base = get_dataset(write_json(tmp_path / "data.json", chain_records(12)), tokenizer)
    examples = get_cot_latent_dataset(1, base, curriculum(), 500, 501, 502)
    loader = batch_loader(examples, [([index], False) for index in range(12)], MyCollator(tokenizer, 501), num_workers=1)
    seen = [next(loader)["idx"].item()]
    for number in STOP_SIGNALS:
        os.kill(loader._workers[0].pid, number)  # type: ignore[attr-defined]
    assert seen + [batch["idx"].item() for batch in loader] == list(range(12))


@pytest.mark.published_data("prosqa_official_valid.json")
def test_the_published_validation_set_loads(tokenizer: Any) -> None:
    dataset = get_dataset(PUBLISHED / "prosqa_official_valid.json", tokenizer)
    assert len(dataset) == 300
    assert not any(tokenizer.unk_token_id in ids for ids in dataset["question_tokenized"])


def test_pytest_says_how_many_tests_on_published_data_were_left_out() -> None:
    lines: list[str] = []
    skipped = [SimpleNamespace(keywords=keywords) for keywords in ({"published_data": 1}, {"published_data": 1}, {})]
    conftest.pytest_terminal_summary(SimpleNamespace(stats={"skipped": skipped}, write_line=lines.append))
    [line] = lines
    assert line.startswith(
        f"left out: 2 tests on published data, whose files are not in {conftest.PUBLISHED}; COCONUT_DATA=DIR"
    )
