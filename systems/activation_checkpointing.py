"""Less memory for more arithmetic: blocks, and many logits, are computed again in the backward pass.

transformers' own gradient checkpointing turns the key-value cache off, and a block that is simply run a second time would add
its keys and values a second time. Here each run of a block gets the cache as it was before the block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from systems.cache import GrowingLayer
from utils import UserError

MOST_LOGITS = 2**28  # of a loss at once: 1 GiB in float32, and two or three times that with their gradients
_CACHE = object()  # stands for the cache among a block's arguments


def recompute_activations(blocks: Sequence[nn.Module]) -> None:
    """Let each block keep, for the backward pass, only its inputs and the keys and values; the rest is computed again there.

    Gradients stay what they are, dropout included. Memory falls from all activations of all passes to those of one block at
    a time; the price is about one more forward pass (arXiv 1604.06174). Nothing changes where no gradients are needed.
    Raises UserError if a block does not say which layer of the cache is its own.
    """
    for block in blocks:
        block.forward = _Recomputed(block.forward, _layer_index(block))  # type: ignore[method-assign]


def _layer_index(block: nn.Module) -> int:
    """The block's place in a cache, as its attention module knows it."""
    indices = {index for module in block.modules() if isinstance(index := getattr(module, "layer_idx", None), int)}
    if len(indices) != 1:
        raise UserError(
            "activation_checkpointing: this model's blocks do not say which layer of the cache is theirs; leave it out"
        )
    return indices.pop()


class _Recomputed:
    """A block's forward whose activations are computed again in the backward pass."""

    def __init__(self, forward: Callable[..., Any], layer: int) -> None:
        self.forward = forward
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None:
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        return self._with_cache(cache, args, kwargs)

    def _with_cache(self, cache: Cache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self.layer
        before = _before(cache, index)
        args = tuple(_CACHE if value is cache else value for value in args)
        kwargs = {key: _CACHE if value is cache else value for key, value in kwargs.items()}
        after: list[Any] = []
        ran = False

        # It is held by the graph, so it must not hold what holds the graph: neither the cache nor, later, `after`.
        def run() -> Any:
            nonlocal after
            own = _before(before, index)
            output = self.forward(
                *(own if value is _CACHE else value for value in args),
                **{key: own if value is _CACHE else value for key, value in kwargs.items()},
            )
            if not ran:
                after = own.layers
            return output

        output = checkpoint(run, use_reentrant=False)
        ran = True
        cache.layers, after = after, []
        return output


def _before(cache: Cache, layer: int) -> Cache:
    """A cache with the same content, whose list of layers, and this one layer in it, can change without changing the other."""
    copied = copy.copy(cache)
    copied.layers = [*cache.layers, *(_Parts() for _ in range(len(cache.layers), layer + 1))]
    copied.layers[layer] = copy.copy(_Parts.of(copied.layers[layer]))
    return copied


class _Parts(DynamicLayer):
    """A cache layer that keeps what each pass has added; only the passes themselves have it in one piece."""

    def __init__(self, parts: tuple[tuple[Tensor, Tensor], ...] = ()) -> None:
        super().__init__()
        self.parts = parts

    @classmethod
    def of(cls, layer: Any) -> _Parts:
        """The same content; of layers that forget what is far away there is no other form."""
        if isinstance(layer, cls):
            return layer
        if type(layer) not in (DynamicLayer, GrowingLayer):
            raise UserError(f"activation_checkpointing: a cache layer of {type(layer).__name__} is not known here")
        return cls(((layer.keys, layer.values),)) if layer.get_seq_length() else cls()  # type: ignore[arg-type]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.parts = (*self.parts, (key_states, value_states))
        keys, values = zip(*self.parts, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self, *args: Any) -> int:
        return sum(keys.shape[-2] for keys, _ in self.parts)


def summed_cross_entropy(project: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """The cross entropy of `project(states)`, summed over the positions: a float32 scalar.

    project: the language-model head, (N, D) to (N, vocabulary) logits. states: (N, D). targets: (N,) int64.
    More than MOST_LOGITS logits are taken in pieces, each computed again in the backward pass: once more through the head.
    """

    def summed(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(project(states).float(), targets, reduction="sum")

    rows = max(1, MOST_LOGITS // vocabulary)
    if len(targets) <= rows:
        return summed(states, targets)
    pieces = zip(states.split(rows), targets.split(rows), strict=True)
    return torch.stack([checkpoint(summed, *piece, use_reentrant=False) for piece in pieces]).sum()
