"""Keys and values of the positions before, from which a pass goes on."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # positions that come into a cache between two copies of what it holds


class GrowingCache(DynamicCache):
    """A pass writes its own keys and values and leaves those before where they are.

    A `DynamicCache` copies them all in every pass, which for each new token moves more memory than its attention reads; with
    gradients all copies are kept for the backward pass. In compiled graphs, which would need one more for making room, this
    is a `DynamicCache`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer


class GrowingLayer(DynamicLayer):
    """keys and values, (B, heads, T, width of a head), are the first T positions of memory that has room for more."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # of keys and values: the memory, and what was last made of it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        held = getattr(self, name)
        begin, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        room, known = self._rooms.get(name, (held, None))
        if known is not held or end > room.shape[-2]:  # also after somebody set other keys
            room = held.new_empty(*held.shape[:-2], end + ROOM, held.shape[-1])
            room[..., :begin, :] = held.detach()
        whole = _Append.apply(held, new, room)
        self._rooms[name] = room, whole
        return whole

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rooms = {}  # else the memory of all rows would stay until the next pass

    def __copy__(self) -> GrowingLayer:
        """The same keys and values; what either adds goes into memory of its own."""
        copied = GrowingLayer()
        copied.__dict__ |= self.__dict__ | {"_rooms": {}}
        return copied


class _Append(torch.autograd.Function):
    """held (.., T, d) and new (.., n, d), of which the first already stands in `room`, as the first T + n positions of it.

    What earlier passes have kept of `room` for the backward pass is never written again, so autograd is not told of the writing
    (`.data`), which would have it refuse.
    """

    @staticmethod
    def forward(ctx: Any, held: Tensor, new: Tensor, room: Tensor) -> Tensor:
        ctx.begin = held.shape[-2]
        whole = room.data[..., : ctx.begin + new.shape[-2], :]
        whole[..., ctx.begin :, :] = new
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0][..., : ctx.begin, :], grads[0][..., ctx.begin :, :], None


def select_cache(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows (R,) of another one, which stays as it is."""
    selected = fork(cache)
    keep_rows(selected, rows)
    return selected


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from another one, which stays as it is; what they share is not copied."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Drop all other rows of a cache, whose layers may be on several devices."""
    for layer in cast("Any", cache.layers):
        layer.batch_select_indices(rows.to(layer.keys.device))
