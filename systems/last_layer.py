"""The last layer of the decoder, computed only where somebody reads what it gives.

Of a prompt all positions need their keys and values, but few are asked for their last hidden state: the last one of each pass,
from which the next thought or token comes, and those that predict a label. For the others the last layer leaves out queries,
attention and feed-forward. That is up to 0.37 of the arithmetic of GPT-2's kind with two layers, and 0.06 of it with twelve.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from generation import transformer_blocks

if TYPE_CHECKING:
    from coconut import Coconut

# What a layer is given for each position, and in which dimension. Of other tensors nothing is known.
POSITIONS = {
    "hidden_states": -2,
    "attention_mask": -2,
    "position_ids": -1,
    "cache_position": -1,
    "position_embeddings": -2,
    "position_embeddings_global": -2,  # Gemma 3 in transformers 4
    "position_embeddings_local": -2,
}


def skip_unread_states(model: Coconut) -> None:
    """Let `forward` with `labelled_only` and generation leave out what they do not read; elsewhere nothing changes.

    Nothing changes either in models whose layers are not known here, and for thoughts that are computed together. Not
    together with what takes a layer apart: compilation, recomputed activations, FSDP2, layers on several devices.
    """
    blocks = transformer_blocks(model)
    config = model.base_causallm.config
    if model.last_layer is not None or model.jacobi_iterations is not None:
        return
    kind = config._attn_implementation
    if len(blocks) != config.get_text_config().num_hidden_layers or kind not in ("eager", "sdpa"):
        return
    if kind == "eager" and any(buffer.dtype == torch.bool for buffer in blocks[-1].buffers()):
        return  # a causal mask of its own, which takes the queries for the last positions (GPT-2 and others in transformers 4)
    names = list(inspect.signature(blocks[-1].forward).parameters)
    cache = next((name for name in ("past_key_values", "layer_past") if name in names), None)
    if cache is not None:
        model.last_layer = LastLayer(blocks[-1], names, cache, len(blocks) - 1)


class LastLayer:
    """The forward of the last layer. What it leaves out is 0 in its output."""

    def __init__(self, block: nn.Module, names: list[str], cache: str, index: int) -> None:
        """names: of its arguments. cache: of the one with keys and values, where it is layer `index`."""
        self.whole = block.forward
        self.names, self.cache, self.index = names, cache, index
        self.read: Tensor | None = None
        self.active = False
        block.forward = self  # type: ignore[assignment, method-assign]

    @contextlib.contextmanager
    def reading(self, read: Tensor | None) -> Iterator[None]:
        """In it states are read where `read`, (B, T - 1) bool, says so, and the last one of each pass; None: that one alone."""
        self.read = None if read is None else F.pad(read, (0, 1)).cpu()  # once, as each pass asks for it
        self.active = True
        try:
            yield
        finally:
            self.read, self.active = None, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.whole(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        states = given["hidden_states"]  # (B, n, D)
        if states.shape[1] == 1:
            return self.whole(*args, **kwargs)
        cache = DynamicCache() if given.get(self.cache) is None else given[self.cache]
        places = self._places(states, cache.get_seq_length(self.index))
        known = all(itertools.starmap(is_known, given.items()))
        if not known or 2 * places.shape[1] > states.shape[1]:  # more would save less than the second run costs
            return self.whole(*args, **kwargs)
        given[self.cache] = keys = _Keys(cache)
        with contextlib.suppress(_Known):
            return self.whole(**given)  # a layer without keys and values
        given = {name: _at(places, name, value) for name, value in given.items()}
        if given.get("attention_mask") is None:
            given["attention_mask"] = keys.seen_from(places, states.shape[1])
        output = self.whole(**given)
        if isinstance(output, tuple):
            return (_spread(output[0], places, states), *output[1:])
        return _spread(output, places, states)

    def _places(self, states: Tensor, before: int) -> Tensor:
        """(B, m) which of the states (B, n, D) are read, after so many columns; m is the most of any row, others fill up."""
        rows, length = states.shape[:2]
        read = (torch.arange(length) == length - 1).expand(rows, -1)
        if self.read is not None:
            read = read | self.read[:, before : before + length]
        most = int(read.sum(dim=1).max())
        return read.int().argsort(dim=1, descending=True, stable=True)[:, :most].to(states.device)


def is_known(name: str, value: Any) -> bool:
    """Whether what belongs to each position can be told, in an argument of a layer."""
    if name == "attention_mask" and isinstance(value, Tensor):
        return value.dim() == 4  # (B, 1, T, keys)
    return name in POSITIONS or not isinstance(value, Tensor | tuple)


class _Known(Exception):
    """The keys and values of a pass are there."""


class _Keys:
    """In place of a layer's cache: ends its first run where keys and values are there, and gives them to the second one."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._known: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, heads, T, width of a head) each, of all positions so far."""
        if self._known is None:
            self._known = self._cache.update(keys, values, *args, **kwargs)
            raise _Known
        return self._known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def seen_from(self, places: Tensor, length: int) -> Tensor:
        """(B, 1, m, T) bool: which keys each of the places (B, m) among the last `length` columns may attend to."""
        keys, _ = cast("tuple[Tensor, Tensor]", self._known)
        columns = torch.arange(keys.shape[-2], device=keys.device)
        return (columns <= (keys.shape[-2] - length + places)[..., None])[:, None]


def _at(places: Tensor, name: str, value: Any) -> Any:
    """Of an argument what belongs to the places (B, m)."""
    if isinstance(value, tuple):
        return tuple(_at(places, name, part) for part in value)
    if not isinstance(value, Tensor):
        return value
    dim = POSITIONS[name]
    if value.dim() == 1:  # the same columns for all rows
        return value
    rows = value.expand(len(places), *value.shape[1:])
    index = places.view(len(places), *[1] * (rows.dim() + dim - 1), -1, *[1] * (-1 - dim))
    return rows.gather(dim, index.expand(*rows.shape[:dim], -1, *rows.shape[rows.dim() + dim + 1 :]))


def _spread(found: Tensor, places: Tensor, states: Tensor) -> Tensor:
    """(B, m, D) at their places among zeros like the states (B, n, D)."""
    return torch.zeros_like(states, dtype=found.dtype).scatter(1, places[..., None].expand_as(found), found)
