"""The last layer of the decoder, computed only where somebody reads what it gives.

Of a prompt all positions need their keys and values, but few are asked for their last hidden state: the last one of each pass,
from which the next thought or token comes, and those that predict a label. For the others the last layer leaves out queries,
attention and feed-forward. That is up to 0.37 of the arithmetic of GPT-2's kind with two layers, and 0.06 of it with twelve.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
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
    if len(blocks) != config.get_text_config().num_hidden_layers or config._attn_implementation not in ("eager", "sdpa"):
        return
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
        self.column = 0  # the first one that is read
        block.forward = self  # type: ignore[assignment, method-assign]

    @contextlib.contextmanager
    def reading(self, read: Tensor | None) -> Iterator[None]:
        """In it nobody reads states of other columns than these, (B, T) bool, but the last one of each pass."""
        columns = [] if read is None else read.any(dim=0).nonzero().flatten().tolist()
        self.column = columns[0] if columns else sys.maxsize
        try:
            yield
        finally:
            self.column = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache, length = given.get(self.cache), given["hidden_states"].shape[-2]
        cache = DynamicCache() if cache is None else cache
        read = max(1, cache.get_seq_length(self.index) + length - self.column)
        known = all(itertools.starmap(is_known, given.items()))
        if self.column == 0 or not known or 2 * read > length:  # more would save less than the second run costs
            return self.whole(*args, **kwargs)
        given[self.cache] = keys = _Keys(cache)
        with contextlib.suppress(_Known):
            return self.whole(**given)  # a layer without keys and values
        given = {name: _last(name, value, read) for name, value in given.items()}
        if given.get("attention_mask") is None and read > 1:  # SDPA by itself would let the first one read see the first key
            given["attention_mask"] = keys.seen_by(read)
        output = self.whole(**given)
        if isinstance(output, tuple):
            return (_filled(output[0], length), *output[1:])
        return _filled(output, length)


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

    def seen_by(self, count: int) -> Tensor:
        """(1, 1, count, T) bool: which keys each of the last positions may attend to."""
        keys, _ = cast("tuple[Tensor, Tensor]", self._known)
        length = keys.shape[-2]
        return torch.ones(count, length, dtype=torch.bool, device=keys.device).tril(length - count)[None, None]


def _last(name: str, value: Any, count: int) -> Any:
    """Of an argument what belongs to the last positions."""
    if isinstance(value, tuple):
        return tuple(_last(name, part, count) for part in value)
    if not isinstance(value, Tensor):
        return value
    dim = POSITIONS[name]
    return value.narrow(dim, value.shape[dim] - count, count)


def _filled(states: Tensor, length: int) -> Tensor:
    """(B, count, D) -> (B, length, D) with zeros before."""
    return F.pad(states, (0, 0, length - states.shape[-2], 0))
