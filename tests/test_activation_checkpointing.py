"""Activation checkpointing: the same losses and gradients bit for bit, from much less memory, for every family."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, IDS, tiny_model
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from coconut import Coconut
from generation import transformer_blocks
from systems.activation_checkpointing import _Parts, recompute_activations
from systems.cache import GrowingLayer
from utils import UserError


def coconut(family: str, recomputed: bool, **overrides: Any) -> Coconut:
    base, ids = tiny_model(family, **overrides)
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos).train()
    if recomputed:
        recompute_activations(transformer_blocks(model))
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Three rows with 3, 3 and 2 latents, padding in the last; loss on what follows."""
    ids = torch.randint(1, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 8], ids[:, 9:12], ids[:, 12] = IDS.start_latent, IDS.latent, IDS.end_latent
    ids[2, 11] = IDS.end_latent
    return ids, torch.where(torch.arange(20) < 13, -100, ids)


def step(model: Coconut) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and how many numbers were kept between forward and backward."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    ids, labels = batch()
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    torch.manual_seed(1)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, mask, labels, labelled_only=True).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_stay_and_memory_falls(family: str) -> None:
    loss, gradients, kept = step(coconut(family, recomputed=False))
    again, recomputed, less = step(coconut(family, recomputed=True))
    assert torch.equal(again, loss)
    assert recomputed.keys() == gradients.keys()
    assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)
    assert less < kept / 8


def test_thoughts_that_are_computed_together_stay_as_well() -> None:
    results = []
    for recomputed in (False, True):
        model = coconut("llama", recomputed)
        model.jacobi_iterations = 2
        results.append(step(model))
    (loss, gradients, _), (again, recomputed_gradients, _) = results
    assert torch.equal(again, loss)
    assert all(torch.equal(recomputed_gradients[name], gradients[name]) for name in gradients)


def test_dropout_is_drawn_once() -> None:
    dropout = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    loss, gradients, _ = step(coconut("gpt2", recomputed=False, **dropout))
    again, recomputed, _ = step(coconut("gpt2", recomputed=True, **dropout))
    assert torch.equal(again, loss)
    assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)
    assert not torch.equal(loss, step(coconut("gpt2", recomputed=False))[0])


def test_generation_is_what_it_was() -> None:
    ids, _ = batch()
    expected = coconut("llama", recomputed=False).eval().generate(ids, max_new_tokens=5)
    assert torch.equal(coconut("llama", recomputed=True).eval().generate(ids, max_new_tokens=5), expected)


def test_nothing_outlives_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that the graph holds and that holds the graph would stay until the machine is full."""
    added: list[weakref.ref[Tensor]] = []
    update = _Parts.update

    def remember(self: _Parts, keys: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        added.append(weakref.ref(keys))
        return update(self, keys, *arguments, **options)

    monkeypatch.setattr(_Parts, "update", remember)
    model = coconut("llama", recomputed=True)
    ids, labels = batch()
    gc.disable()
    try:
        loss = model(ids, labels=labels, labelled_only=True).loss
        first = len(added)
        assert any(keys() is not None for keys in added)
        loss.backward(retain_graph=True)
        assert len(added) > first
        assert not [keys for keys in added[first:] if keys() is not None]  # of the second run
        del loss
        assert not [keys for keys in added if keys() is not None]
    finally:
        gc.enable()


def test_without_gradients_nothing_changes() -> None:
    with torch.no_grad():
        cache = coconut("llama", recomputed=True).think(batch()[0], keep_cache=True).cache
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}  # type: ignore[union-attr]


def test_a_cache_that_is_not_known_is_refused() -> None:
    class Window(DynamicLayer):
        pass

    with pytest.raises(UserError, match="a cache layer of Window is not known here"):
        _Parts.of(Window())


def test_blocks_without_a_place_in_the_cache_are_refused() -> None:
    with pytest.raises(UserError, match="do not say which layer of the cache is theirs"):
        recompute_activations([torch.nn.Linear(2, 2)])
