"""Process group, device, DDP and FSDP2 around the model, and the few reductions the training loop needs.

Everything works in a plain `python` process too, where there is no process group and a reduction is the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from coconut import Coconut
from generation import transformer_blocks
from methods import METHODS, Objective
from systems.activation_checkpointing import recompute_activations
from systems.last_layer import skip_unread_states
from systems.weight_gradients import gather_gradients
from utils import UserError, get_logger

ParallelName = Literal["ddp", "fsdp"]
GatherName = Literal["pass", "step"]
GRAPHS = 16  # that the compiler may make of the decoder
# Seconds for gloo's threads to let go of the last tensors. Where DDP keeps the group alive they outlive it, and one that
# wants Python's lock while Python ends aborts the process: https://github.com/pytorch/pytorch/pull/179291
THREADS_END = 0.2


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def process_group(hang_timeout: float | None = None) -> Iterator[torch.device]:
    """Join the process group that torchrun describes in the environment, if any; yields this process's device.

    The device index is the local rank: on several nodes the global rank would name GPUs that do not exist.
    hang_timeout: seconds; collective operations wait longer than this, so that the watchdog reports first.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"{processes} processes on a node with {gpus} GPUs: set --nproc-per-node to {gpus}")
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        # https://github.com/pytorch/pytorch/issues/135712
        get_logger().info("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or a restart may fail to connect")
    timeout = None if hang_timeout is None else datetime.timedelta(seconds=max(1800, 2 * hang_timeout))
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()
        time.sleep(THREADS_END)


def all_reduce(values: list[float], device: torch.device) -> list[float]:
    """Sums over all processes, in float64."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: int) -> int:
    if world_size() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(value: Any) -> list[Any]:
    """One object per process, in the order of ranks, on every process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_on_each_node() -> Iterator[None]:
    """One process of each node runs the block, then the others of the node: they find in files what it has made.

    An error in the first one lets the others go on; bad input is met by each of them.
    """
    first = local_rank() == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def run_on_main(action: Callable[[], Any]) -> Any:
    """The result of `action`, run by rank 0 alone. Its UserError is raised by every process, so that none waits for it."""
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [error]
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


@dataclass(frozen=True)
class Parallelism:
    """The part of a configuration that says how a model is spread and computed; `RunConfig` explains the keys."""

    method: str
    parallel: ParallelName
    fsdp_gather: GatherName
    bf16: bool | Literal["pure"]
    activation_checkpointing: bool
    compile: bool


def wrap(
    model: Coconut, config: Parallelism, device: torch.device, loss_options: Any = None, whole: Coconut | None = None
) -> nn.Module:
    """The method's objective around the model, ready for training on all processes: with DDP, FSDP2, or alone.

    bf16: True computes in bfloat16 from float32 weights; under FSDP2 that is its own mixed precision, else see `autocast`.
    compile: torch.compile on the decoder, for any number of positions. Not on each block: a block knows its place in the cache,
    so each would be another graph. loss_options: what the method's loss needs beside the batch. whole: see `meta_start.build`.
    """
    empty = model.embedding.weight.is_meta
    if not empty:
        model.to(device)
    if config.compile:
        _compile(model, config.activation_checkpointing)
    elif config.activation_checkpointing:
        recompute_activations(named_blocks(model))
    elif config.parallel == "ddp":
        skip_unread_states(model)
        if device.type == "cpu":
            gather_gradients(model)
    method = METHODS[config.method]
    loss = method.loss if loss_options is None else functools.partial(method.loss, options=loss_options)
    objective = Objective(model, loss)
    if config.parallel == "fsdp":
        shard(model, config, device)
        if empty:
            _fill(model, whole, device)
    if config.parallel == "fsdp" or world_size() == 1:
        return objective
    ids = [device.index] if device.type == "cuda" else None
    # No buffer changes in training. The option has another name from torch 2.13 on.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True, **buffers)


def _compile(model: Coconut, recompute: bool) -> None:
    """recompute: the graphs keep their inputs alone for the backward pass (a memory budget of 0), and compute the rest again.

    Of itself the compiler stops at eight graphs of a function. These are eight, and sizes that are equal make one more.
    """
    config: Any = torch._dynamo.config
    config.cache_size_limit = max(GRAPHS, config.cache_size_limit)  # of recompile_limit the older name, which all versions know
    functorch = cast("Any", importlib.import_module("torch._functorch.config"))
    functorch.activation_memory_budget = 0.0 if recompute else 1.0
    model.decoder.compile(dynamic=True)


def shard(model: Coconut, config: Parallelism, device: torch.device) -> None:
    """FSDP2: each transformer block is a shard group; embeddings, final norm and head belong to the root.

    fsdp_gather: "pass" gathers a block's parameters for each latent pass, forward and backward, and reduces its gradients
    after each; all processes must take equally many passes. "step" gathers all parameters once and reduces all gradients
    once per optimizer step, and gathers once per evaluation: each process then holds the whole model and, until they are
    reduced, its gradients, but only its shard of the optimizer's state.
    """
    if not dist.is_initialized():
        raise UserError("parallel: fsdp needs a process group; start with torchrun, or use parallel: ddp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    mixed = config.bf16 is True
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    each_pass = config.fsdp_gather == "pass"
    for block in named_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=each_pass)
    if model.step_decoder is not None:
        fully_shard(model.step_decoder, mesh=mesh, mp_policy=policy)
    # The root too: parameters left gathered after an evaluation are other tensors than those an optimizer must hold.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=each_pass)
    for method in ("generate", "gathered"):
        register_fsdp_forward_method(model, method)
    if each_pass:
        model.max_over_ranks = max_over_ranks


def _fill(model: Coconut, whole: Coconut | None, device: torch.device) -> None:
    """Give a sharded model without values those of `whole`, which is None but in the first process; called by all."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (first, name), *others in places.values():  # which have parted
        for module, other in others:
            setattr(module, other, getattr(first, name))
    values = {} if whole is None else whole.state_dict()
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    own = {} if whole is None else dict(whole.named_buffers())
    for name, buffer in model.named_buffers():  # those that no state dict has, too
        if name in own:
            buffer.copy_(own[name])
        dist.broadcast(buffer, src=0)


def named_blocks(model: Coconut) -> list[nn.Module]:
    """`transformer_blocks`. Raises UserError if there are none."""
    blocks = transformer_blocks(model)
    if not blocks:
        family = model.base_causallm.config.model_type
        raise UserError(
            f"model family {family!r} does not name its transformer blocks, which parallel: fsdp and "
            "activation_checkpointing need: leave them out"
        )
    return blocks


def unwrap(model: nn.Module) -> Coconut:
    """The Coconut inside what `wrap` returns."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return inner.model if isinstance(inner, Objective) else cast("Coconut", inner)


def gradient_sync(model: nn.Module, last: bool, gather: GatherName = "pass") -> AbstractContextManager[Any]:
    """Around a micro-batch: gradients are reduced over processes only in the `last` one of an optimizer step.

    gather: as in `shard`; "step" reduces, and lets go of the parameters, when the last micro-batch reaches its first pass.
    """
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    if sharded(root := unwrap(model)):
        each_pass = gather == "pass"
        _reduce_in_backward(root, last and each_pass, reshard=each_pass)
        once = functools.partial(_reduce_in_backward, root, True, reshard=True)
        root.before_last_backward = once if last and not each_pass else None
    return contextlib.nullcontext()


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has split the model over processes."""
    return hasattr(model, "set_requires_gradient_sync")


def _reduce_in_backward(model: Any, reduce: bool, reshard: bool) -> None:
    model.set_requires_gradient_sync(reduce)
    model.set_reshard_after_backward(reshard)


def reshard(model: nn.Module) -> None:
    """Let go of what an evaluation has gathered: an optimizer must see the shards."""
    for module in model.modules() if sharded(unwrap(model)) else ():
        if sharded(module):
            cast("Any", module).reshard()


def autocast(bf16: bool | str, parallel: ParallelName, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 compute with float32 weights, where FSDP2 does not already see to it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 is True and parallel == "ddp")


def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """The norm of all gradients together, before they are clipped to `max_norm`; None clips nothing."""
    if max_norm is None:
        norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    else:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
