"""What is sent to processes that hold no values: the same model, empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_coconut import LAYOUTS, draw, mapped, wrap
from tiny_models import FAMILIES, IDS, tiny_model

from coconut import Coconut
from methods.step_supervision import StepDecoder
from systems import distributed, meta_start


def never() -> Coconut:
    raise AssertionError("another process makes it")


def sent(monkeypatch: pytest.MonkeyPatch, model: Coconut) -> Coconut:
    """What the second of two processes gets of a model of the first."""
    descriptions: list[Any] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "run_on_main", lambda action: descriptions.append(action()) or descriptions[0])
    empty, whole = meta_start.build(lambda: model, sharded=True)
    assert whole is model
    monkeypatch.setattr(distributed, "run_on_main", lambda action: descriptions[0])
    other, nothing = meta_start.build(never, sharded=True)
    assert nothing is None
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in empty.named_parameters()]
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_model_without_values(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, buffers and what is trained; given the values, it computes the same, all layers' states among them."""
    model = mapped(tiny_model(family)[0], "projection").eval()
    next(model.parameters()).requires_grad_(False)
    batch = draw(LAYOUTS["ragged"])
    expected, details = model(**batch, return_details=True, all_layers=True)  # and leaves hooks behind
    other = sent(monkeypatch, model)
    assert all(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    ours, theirs = (
        {
            name: (value.shape, value.dtype, value.requires_grad)
            for name, value in [*one.named_parameters(), *one.named_buffers()]
        }
        for one in (model, other)
    )
    assert ours == theirs
    for name, buffer in model.named_buffers():
        parent, _, own = name.rpartition(".")
        setattr(other.get_submodule(parent), own, buffer)
    other.load_state_dict(model.state_dict(), assign=True)
    other.base_causallm.tie_weights()
    outputs, found = other(**batch, return_details=True, all_layers=True)
    assert torch.equal(outputs.logits, expected.logits)
    assert len(found.layers) == len(details.layers)
    assert all(map(torch.equal, found.layers, details.layers))


def test_tied_weights_and_a_second_model_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny_model("llama", tie_word_embeddings=True)[0])
    model.step_decoder = StepDecoder(wrap(tiny_model("llama")[0]))
    other = sent(monkeypatch, model)
    assert other.base_causallm.get_output_embeddings().weight is other.embedding.weight
    assert isinstance(other.step_decoder, StepDecoder)
    assert other.latent_token_id == IDS.latent


def test_without_shards_every_process_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny_model("llama")[0])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert meta_start.build(lambda: model, sharded=False) == (model, None)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    assert meta_start.build(lambda: model, sharded=True) == (model, None)
