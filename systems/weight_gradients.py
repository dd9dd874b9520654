"""Gradients of weights without the copies that autograd makes of them.

**Linear layers over all latent passes, as one product.**
A pass over one position is a thin product, and its backward pass has to write a gradient as large as the weights, and add it
to those of the other passes: memory traffic, not arithmetic, is what such passes cost. Here passes after the first leave their
inputs and the gradients of their outputs, a few rows each, to the first one, which comes last in the backward pass. It
multiplies them all at once. Gradients are the same but for the order of the sum.

**Embeddings that are also the head.** autograd makes a gradient as large as the embeddings, nearly all zeros, and adds it to
the head's, which is there before. Here the rows of the tokens that were read are added to the head's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from coconut import Coconut

LARGE = 2**18  # entries of a weight; smaller ones stay in the processor's cache, and there is nothing to save


def gather_gradients(model: Coconut) -> None:
    """Let layers with large weights that are trained do so. Without gradients nothing changes.

    Not together with what takes the decoder's passes apart: compilation, recomputed activations, FSDP2.
    """
    passes = _Passes()
    model.decoder.register_forward_pre_hook(passes.begin, with_kwargs=True)
    for module in model.decoder.modules():
        if type(module) not in (nn.Linear, Conv1D):  # a subclass may compute something else
            continue
        weight = cast("Tensor", module.weight)
        if weight.requires_grad and weight.numel() > LARGE:
            module.forward = _Gathered(cast("nn.Linear", module), passes)  # type: ignore[method-assign]
    embedding, head = model.embedding, cast("nn.Linear", model.base_causallm.get_output_embeddings())
    weight = embedding.weight
    if type(embedding) is nn.Embedding and weight is head.weight and weight.requires_grad and weight.numel() > LARGE:
        embedding.forward = _TiedEmbedding(embedding)  # type: ignore[assignment, method-assign]


_Rows = list[tuple[Tensor, Tensor]]  # of one layer and one forward of the model: what later passes have left for the first


class _Passes:
    """Which pass the decoder is in: whether it is the first, and if no other one follows (`rows` is None then)."""

    def __init__(self) -> None:
        self.first = True
        self.rows: dict[nn.Module, _Rows] | None = None
        self.casts: dict[Tensor, Tensor] = {}

    def begin(self, _module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        if cache is None:
            self._start(None)
        elif not cache.get_seq_length():
            self._start({})
        else:
            self.first = False

    def _start(self, rows: dict[nn.Module, _Rows] | None) -> None:
        if any((self.rows or {}).values()):
            raise RuntimeError("a loss that the first pass has no part in: its later passes' gradients are lost")
        self.first, self.rows, self.casts = True, rows, {}

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter as autocast would have it, made once for all passes."""
        if parameter not in self.casts:
            self.casts[parameter] = parameter.to(dtype)
        return self.casts[parameter]


class _Gathered:
    """The forward of one linear layer."""

    def __init__(self, module: nn.Module, passes: _Passes) -> None:
        self.module = module
        self.passes = passes
        self.alone = module.forward
        self.transposed = isinstance(module, Conv1D)  # GPT-2's, whose weights are (in, out)

    def __call__(self, inputs: Tensor) -> Tensor:
        rows = self.passes.rows
        if rows is None or not torch.is_grad_enabled():
            return self.alone(inputs)
        weight, bias = cast("Tensor", self.module.weight), cast("Tensor | None", self.module.bias)
        if torch.is_autocast_enabled(kind := inputs.device.type):
            dtype = torch.get_autocast_dtype(kind)
            inputs, weight = inputs.to(dtype), self.passes.cast(weight, dtype)
            bias = None if bias is None else self.passes.cast(bias, dtype)
        rows_of_layer = rows.setdefault(self.module, [])
        return _Linear.apply(inputs, weight, bias, rows_of_layer, self.passes.first, self.transposed)


class _Linear(torch.autograd.Function):
    """A linear layer; the gradients of its weights, (out, in) or if transposed (in, out), are taken by the first pass."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, first: bool, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.rows, ctx.first, ctx.transposed, ctx.has_bias = rows, first, transposed, bias is not None
        return F.linear(inputs, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        own, given = inputs.flatten(0, -2), gradient.flatten(0, -2)  # (rows, in), (rows, out)
        of_inputs = (given @ (weight.t() if ctx.transposed else weight)).view_as(inputs)
        if not ctx.first:
            ctx.rows.append((own, given))
            return of_inputs, None, None, None, None, None
        of_weight = own.t() @ given if ctx.transposed else given.t() @ own
        of_bias = given.sum(dim=0) if ctx.has_bias else None
        if ctx.rows:
            own, given = (torch.cat(parts) for parts in zip(*ctx.rows, strict=True))
            of_weight.addmm_(*((own.t(), given) if ctx.transposed else (given.t(), own)))
            if of_bias is not None:
                of_bias += given.sum(dim=0)
            ctx.rows.clear()
        return of_inputs, of_weight, of_bias, None, None, None


class _TiedEmbedding:
    """The forward of embeddings that are also the head."""

    def __init__(self, module: nn.Embedding) -> None:
        self.module = module
        self.rows: _Rows = []  # token ids and gradients of their embeddings, until the gradient of the head is there
        module.weight.register_hook(self.add)

    def __call__(self, ids: Tensor) -> Tensor:
        if self.rows:
            raise RuntimeError("a loss that the head has no part in: the embeddings' gradients are lost")
        return _Embed.apply(ids, self.module.weight, self.module.padding_idx, self.rows)

    def add(self, gradient: Tensor | None) -> None:
        """To the head's gradient, in place: nobody else has it yet. None: the head has no part in the loss."""
        if gradient is None:
            return
        for ids, rows in self.rows:
            gradient.index_add_(0, ids, rows.to(gradient.dtype))
        self.rows.clear()


class _Embed(torch.autograd.Function):
    """Embeddings whose gradients go to `rows`; autograd waits for them before it takes the weight's gradient as complete."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, rows: _Rows) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.rows = padding, rows
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:  # as nn.Embedding: this row has no gradient
            gradient = gradient.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        ctx.rows.append((ids.flatten(), gradient.flatten(0, -2)))
        return None, None, None, None
