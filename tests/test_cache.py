"""The cache that grows in place: the same keys, values and answers as one that is copied, and nobody else's keys change."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers import DynamicCache

import coconut
from coconut import Coconut
from systems.cache import ROOM, GrowingCache, fork, keep_rows, select_cache

NEW = ROOM + 5  # room is made more than once


def step(cache: DynamicCache, seed: int, rows: int = 3, columns: int = 1, grad: bool = False) -> torch.Tensor:
    """Random keys, and values that are their negatives, go into both layers; returns the keys, (rows, 2, columns, 4)."""
    keys = torch.randn(rows, 2, columns, 4, generator=torch.Generator().manual_seed(seed), requires_grad=grad)
    for layer in range(2):
        cache.update(keys + layer, -keys - layer, layer)
    return keys


def content(cache: DynamicCache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def holds(cache: DynamicCache, keys: list[torch.Tensor]) -> bool:
    whole = torch.cat(keys, dim=2)
    wanted = [whole, -whole, whole + 1, -whole - 1]
    return all(map(torch.equal, content(cache), wanted)) and cache.get_seq_length() == whole.shape[2]


@torch.no_grad()
def test_it_holds_what_came_in_and_is_copied_once_for_many_positions() -> None:
    cache, keys, places = GrowingCache(), [], set()
    keys.append(step(cache, 0, columns=6))
    for seed in range(1, NEW + 1):
        keys.append(step(cache, seed))
        assert holds(cache, keys)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 2


@torch.no_grad()
def test_forks_go_on_by_themselves() -> None:
    cache = GrowingCache()
    keys = [step(cache, seed) for seed in range(3)]
    one, other = fork(cache), fork(cache)
    first, second, third = step(one, 10, columns=2), step(other, 11), step(cache, 12)
    again = step(fork(one), 13)
    assert holds(one, [*keys, first])
    assert holds(other, [*keys, second])
    assert holds(cache, [*keys, third])
    assert not torch.equal(first[:, :, :1], again)
    places = set()
    for _ in range(9):  # in turns, and yet neither is copied again
        for each in (one, other):
            step(each, 14)
            places.add(each.layers[0].keys.data_ptr())
    assert len(places) == 2


@torch.no_grad()
def test_chosen_rows_go_on_and_leave_the_others_as_they_are() -> None:
    cache, rows = GrowingCache(), torch.tensor([2, 0, 0, 1])
    keys = [step(cache, seed) for seed in range(3)]
    selected = select_cache(cache, rows)
    new = step(selected, 5, rows=4)
    assert holds(cache, keys)
    assert holds(selected, [*(one[rows] for one in keys), new])
    step(cache, 7)
    before = weakref.ref(cache.layers[0].keys)
    keys.append(step(GrowingCache(), 7))
    keep_rows(cache, torch.tensor([1]))
    assert before() is None
    assert holds(cache, [*(one[1:2] for one in keys), step(cache, 6, rows=1)])


@torch.no_grad()
def test_keys_that_somebody_sets_count() -> None:
    cache = GrowingCache()
    for seed in range(3):
        step(cache, seed)
    other = [torch.randn(3, 2, 3, 4) for _ in range(4)]
    for layer, (keys, values) in zip(cache.layers, (other[:2], other[2:]), strict=True):
        layer.keys, layer.values = keys, values
    before = [tensor.clone() for tensor in other]
    step(cache, 9)
    assert all(map(torch.equal, [tensor[:, :, :3] for tensor in content(cache)], before))
    assert all(map(torch.equal, other, before))


def test_gradients_reach_what_each_pass_read_and_came_in_from_one_memory() -> None:
    cache, places = GrowingCache(), set()
    with torch.no_grad():
        early = [step(cache, seed) for seed in range(2)]
    late, read = [], []
    for seed in range(2, 6):
        late.append(step(cache, seed, grad=True))
        read.append((cache.layers[0].keys ** 2).sum())  # as attention does, before the next pass adds its own
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1
    torch.stack(read).sum().backward()
    for keys, passes in zip(late, (4, 3, 2, 1), strict=True):
        assert torch.allclose(keys.grad, passes * 2 * keys.detach())
    with torch.no_grad():
        after = step(cache, 6)
    assert holds(cache, [*early, *late, after])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_branches_and_thoughts_are_those_of_a_cache_that_is_copied(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ids = tiny_model(family)
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos).eval()
    model.eos_token_id = -1  # no answer ends
    prompt = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    prompt[:, 3:8] = torch.tensor([ids.start_latent, ids.latent, ids.latent, ids.latent, ids.end_latent])
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    found = []
    for kind in (GrowingCache, DynamicCache):
        monkeypatch.setattr(coconut, "GrowingCache", kind)
        monkeypatch.setattr("generation.GrowingCache", kind)
        tokens, details = model.generate(prompt, mask, max_new_tokens=NEW, return_details=True)
        branches = model.generate_with_branching(prompt, mask, NEW, 3, temperature=0.7, seed=1, return_details=True)
        found.append((tokens, details.thoughts, branches.tokens, branches.thoughts))
        assert type(model.think(prompt, mask, keep_cache=True).cache) is kind
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
