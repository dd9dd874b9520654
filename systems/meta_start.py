"""The start under FSDP: one process builds the model, the others hold their shards alone.

The first process sends the others the model without its values (on the meta device), all shard that, and then the values go
round one parameter at a time, of which each keeps its part.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut import Coconut
from systems import distributed


def build(make: Callable[[], Coconut], sharded: bool) -> tuple[Coconut, Coconut | None]:
    """A model for `distributed.wrap`, and where its values are.

    sharded: in several processes the first of the two has no values; in the first process the second has them, elsewhere it is
    None. Otherwise every process makes the whole model. Raises UserError in all processes if `make` does in the first.
    """
    if not sharded or distributed.world_size() == 1:
        return make(), None
    whole: list[Coconut] = []

    def described() -> bytes:
        whole.append(make())
        content = io.BytesIO()
        _Describer(content).dump(whole[0])
        return content.getvalue()

    description = distributed.run_on_main(described)
    return pickle.loads(description), whole[0] if whole else None


# transformers hooks what returns hidden states when they are first asked for; such hooks cannot be sent, and are made anew.
CAPTURES = "_output_capturing_hooks_installed"


class _Describer(pickle.Pickler):
    """Tensors by their shapes alone; one that stands in two places stays one."""

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, nn.Parameter):
            return _parameter, (tuple(found.shape), found.dtype, found.requires_grad)
        if isinstance(found, Tensor):
            return _tensor, (tuple(found.shape), found.dtype)
        if isinstance(found, nn.Module):
            state = {**found.__dict__, "_forward_hooks": OrderedDict(), CAPTURES: False}
            if isinstance(found, PreTrainedModel):
                return _pretrained, (type(found), found.config), state
            return copyreg.__newobj__, (type(found),), state  # type: ignore[attr-defined]
        return NotImplemented


def _pretrained(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Only a model that is made from its configuration is known to transformers; its parts are those of the description."""
    with torch.device("meta"):
        return kind(config)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(_tensor(shape, dtype), requires_grad)
