"""A last layer that leaves out what nobody reads: losses, gradients and tokens stay those of the whole one."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from test_coconut import LAYOUTS, PROMPTS, assert_same_gradients, draw, gradients, mapped
from tiny_models import FAMILIES, assert_near, tiny_model
from transformers import BloomConfig, BloomForCausalLM

from coconut import Coconut
from generation import branch_point, generate_from, transformer_blocks
from states import Branch
from systems import distributed, weight_gradients
from systems.distributed import Parallelism
from systems.last_layer import is_known, skip_unread_states
from thoughts import Intervention, Noise

CPU = torch.device("cpu")
# Without padding and without a cache a pass has no mask, and SDPA is told that it is causal.
HERE = LAYOUTS | {"no mask": ["qqqqqqqqqqqaaaa", "qqqqqqqqqqqqaaa"]}


def pair(family: str, setting: Any = "identity", **overrides: Any) -> tuple[Coconut, Coconut]:
    """The same model twice: as it is, and with a last layer that leaves out."""
    whole = mapped(tiny_model(family, **overrides)[0], setting)
    less = copy.deepcopy(whole)
    skip_unread_states(less)
    return whole, less


def positions_computed(model: Coconut) -> list[int]:
    """How many positions the last feed-forward block is given, each time from now on."""
    counts: list[int] = []
    mlp = cast("Any", transformer_blocks(model)[-1]).mlp
    mlp.register_forward_pre_hook(lambda _module, args: counts.append(args[0].shape[-2]))
    return counts


@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager", "dtype": torch.float32}], ids=["default", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", HERE)
def test_losses_and_gradients(family: str, layout: str, attention: dict[str, Any]) -> None:
    whole, less = pair(family, **attention)
    batch = draw(HERE[layout])
    first, second = (model(**batch, labelled_only=True).loss for model in (whole, less))
    assert_near(second, first)
    expected = gradients(whole, first)
    assert_same_gradients(gradients(less, second), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(family: str) -> None:
    whole, less = pair(family)
    batch = draw(PROMPTS)
    prompt = batch["input_ids"], batch["attention_mask"]
    counts = positions_computed(less)
    assert torch.equal(less.generate(*prompt, max_new_tokens=5), whole.generate(*prompt, max_new_tokens=5))
    assert set(counts) == {1}
    first, second = (model.generate_with_branching(*prompt, max_new_tokens=4, num_branches=2) for model in (whole, less))
    assert torch.equal(first, second)
    assert set(counts) == {1}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("single row", [1, 1, 1, 8]),  # in the last pass only one of eight predicts no label
        ("aligned", [1, 1, 1, 1, 1, 1, 6]),
        ("last column", [6, 1, 1]),  # of 15 in the first pass, five predict labels in a row, and the last one is read
        ("no latents", [17]),  # eight of 17 and the last one: more than half
        ("no mask", [5]),  # of 15 four in one row and three in the other, not all in the same columns, and the last one
    ],
)
def test_only_what_is_read_is_computed(layout: str, expected: list[int]) -> None:
    _, less = pair("gpt2")
    counts = positions_computed(less)
    less(**draw(HERE[layout]), labelled_only=True)
    assert counts == expected


@pytest.mark.parametrize("setting", ["projection", "norm", {"name": "layer", "layer": 1}])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_with_other_thoughts_and_gathered_gradients(family: str, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "LARGE", 0)
    whole, less = pair(family, setting)
    weight_gradients.gather_gradients(less)
    batch = draw(LAYOUTS["ragged"])
    first, second = (model(**batch, labelled_only=True).loss for model in (whole, less))
    expected = gradients(whole, first)
    assert_same_gradients(gradients(less, second), expected)


def test_noise_and_dropout_in_the_passes() -> None:
    whole, less = pair("llama")
    prompt = draw(PROMPTS)["input_ids"], draw(PROMPTS)["attention_mask"]
    branches = [
        Branch(row, row, intervention=Intervention(Noise(0.5, schedule="constant"), dropout=0.3)) for row in range(len(PROMPTS))
    ]
    first, second = (generate_from(model, branch_point(model, *prompt), branches, 5) for model in (whole, less))
    assert torch.equal(second.tokens, first.tokens)
    assert_near(second.thoughts, first.thoughts)


def test_what_is_asked_for_is_whole() -> None:
    """Logits of all positions, details of a loss and of generation, and passes by themselves."""
    whole, less = pair("llama")
    batch = draw(LAYOUTS["aligned"])
    prompt = draw(PROMPTS)["input_ids"], draw(PROMPTS)["attention_mask"]
    less(**batch, labelled_only=True)
    less.generate(*prompt, max_new_tokens=2)
    first, second = (
        [
            model(**batch).logits,
            model(**batch, labelled_only=True, return_details=True)[1].hidden,
            model.generate(*prompt, max_new_tokens=2, return_details=True)[1].hidden,
            model.think(*prompt).hidden,
        ]
        for model in (whole, less)
    )
    assert [torch.equal(one, other) for one, other in zip(first, second, strict=True)] == [True] * 4


@pytest.mark.parametrize("changes", [{"compile": True}, {"activation_checkpointing": True}, {}])
def test_not_together_with_what_takes_a_layer_apart(changes: dict[str, bool]) -> None:
    model = mapped(tiny_model("gpt2")[0], "identity")
    usual = {"method": "coconut", "parallel": "ddp", "fsdp_gather": "pass", "bf16": False}
    distributed.wrap(model, Parallelism(**usual | {"compile": False, "activation_checkpointing": False} | changes), CPU)
    assert (model.last_layer is None) == bool(changes)


def test_not_where_all_positions_are_read_or_the_layer_is_not_known() -> None:
    together = mapped(tiny_model("gpt2")[0], "identity")
    together.jacobi_iterations = 2
    flexible = mapped(tiny_model("llama", attn_implementation="flex_attention")[0], "identity")
    for model in (together, flexible):
        skip_unread_states(model)
        assert model.last_layer is None


def test_a_layer_that_is_given_something_unknown_is_whole() -> None:
    """Bloom's positions come with each layer's keys."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    model = mapped(BloomForCausalLM(config).eval(), "identity")
    skip_unread_states(model)
    counts = positions_computed(model)
    model(**draw(LAYOUTS["single row"]), labelled_only=True)
    assert counts == [7, 1, 1, 8]
    assert is_known("attention_mask", torch.ones(2, 1, 5, 5))
    assert not is_known("attention_mask", torch.ones(2, 5))  # rows would be taken for positions
