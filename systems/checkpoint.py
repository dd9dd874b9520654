"""Checkpoints: written whole or not at all, found again, and resumed from exactly.

save_path/name/checkpoint_<epoch>/ holds the base model in Hugging Face form (model.safetensors, config.json, tokenizer),
coconut.json (what evaluation must know), training_state.pt (what training must know) and manifest.json (sizes and hashes).
checkpoint_<epoch>_step<n> is the same in the middle of an epoch. With sharded_checkpoints the weights and the optimizer's state
are in shards/, a part from each process. `python -m systems.checkpoint` makes such directories of other forms.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut import Coconut
from systems import distributed
from systems.distributed import unwrap
from systems.files import FACTS, STATE, Facts, TrainingState
from systems.lora import adapter_state, is_adapted, load_adapter_state, merged_weights
from systems.models import LatentIds
from systems.shards import SHARDS, read_shards, wait_for, write_shards
from systems.storage import CheckpointError, Writer, begin_directory, remove_old, write_directory
from systems.weights import THOUGHT_MAP, copy_weights, fill_step_decoder, read_map, weights_beside
from utils import get_logger

BASE = "base_causallm."
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Saving:
    """The part of a configuration that says where and when checkpoints are written; `RunConfig` explains the keys."""

    save_dir: Path
    debug: bool
    async_save: bool
    save_only_improve: bool
    save_every_steps: int | None
    keep_last: int | None
    sharded_checkpoints: bool


def save(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    state: TrainingState,
    writer: Writer | None = None,
    keep_last: int | None = None,
    in_shards: bool = False,
) -> None:
    """Write one checkpoint, then remove old ones; called by all processes, written by rank 0.

    in_shards: each process writes its part of the weights and of the optimizer's state, and none gathers them.
    Raises CheckpointError and keeps what was there; if `writer` works in the background, by its next `wait`.
    """
    writer, inner = writer or Writer(), unwrap(model)
    base, best = inner.base_causallm, state.best_checkpoint
    options = StateDictOptions() if in_shards else _WHOLE
    # An optimizer that has not stepped yet has no state; asking for it would make one up by a step with zero gradients.
    optimizer_state = get_optimizer_state_dict(inner, optimizer, options=options) if optimizer.state else None
    training = {
        "state": asdict(state),
        "rng": distributed.gather_objects(_rng_state()),
        "optimizer": optimizer_state,
        "adapter": adapter_state(base),
    }
    weights: dict[str, Any] | None = _base_weights(inner, options)
    beside = weights_beside(inner)
    begun, shards = None, None
    if in_shards:
        tensors: dict[str, Any] = {"model": weights}
        weights = None
        if optimizer_state is not None:
            tensors["optimizer"] = optimizer_state.pop("state")
        begun = distributed.run_on_main(lambda: begin_directory(directory))
        shards = write_shards(begun / SHARDS, tensors, writer.group)
    elif writer.background and distributed.rank() == 0:
        weights, training = copy.deepcopy((weights, training))  # the next step changes them

    def fill(partial: Path) -> None:
        if shards is not None:
            wait_for(shards)
        _fill_model(partial, base, weights, beside, tokenizer, facts, training)

    def write() -> None:
        write_directory(directory, fill, begun)
        remove_old(directory, keep_last, best)

    writer.start(write, shards)


def _fill_model(
    partial: Path,
    base: PreTrainedModel,
    weights: dict[str, Any] | None,
    beside: dict[str, dict[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    training: dict[str, Any] | None,
) -> None:
    """Write the files of a checkpoint. `weights` None: they are in shards. beside: as `weights_beside` gives it."""
    if weights is None:
        base.config.save_pretrained(partial)
    else:
        base.save_pretrained(partial, state_dict=weights)
    for name, tensors in beside.items():
        if tensors:  # most thought maps have none
            save_file(tensors, partial / name)
    tokenizer.save_pretrained(partial)
    _portable_tokenizer(partial / "tokenizer_config.json")
    (partial / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
    if training is not None:
        torch.save(training, partial / STATE)


def _base_weights(model: Coconut, options: StateDictOptions) -> dict[str, Any]:
    """The state dict of the base model by its own names, LoRA merged."""
    if is_adapted(model.base_causallm):
        return merged_weights(model.base_causallm)
    state = get_model_state_dict(model, options=options)
    return {key.removeprefix(BASE): value for key, value in state.items() if key.startswith(BASE)}


def _portable_tokenizer(path: Path) -> None:
    """transformers 5 names its fast tokenizer by a class that transformers 4 does not have; both know the older name."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        path.write_text(json.dumps({**values, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), encoding="utf-8")


def restore(directory: Path, loaded: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """LoRA weights, optimizer and random number generators as they were; `loaded` is what `read_training_state` gave.

    With another number of processes generators start anew. Raises UserError if the LoRA weights or the optimizer do not fit.
    """
    inner = unwrap(model)
    load_adapter_state(inner.base_causallm, loaded["adapter"])
    if is_adapted(inner.base_causallm):  # which was loaded from where the run began; elsewhere all of it came with the weights
        copy_weights(inner.thought_map.state_dict(), read_map(directory), str(directory / THOUGHT_MAP))
        fill_step_decoder(inner, directory)
    if loaded["optimizer"] is None:
        pass  # it had not stepped yet
    elif (directory / SHARDS).is_dir():
        own = get_optimizer_state_dict(inner, optimizer)
        read_shards(directory / SHARDS, {"optimizer": own["state"]})
        set_optimizer_state_dict(inner, optimizer, {**loaded["optimizer"], "state": own["state"]})
    else:
        _check_shapes(directory, loaded["optimizer"]["state"], inner)
        set_optimizer_state_dict(inner, optimizer, loaded["optimizer"], options=_WHOLE)
    if len(loaded["rng"]) == distributed.world_size():
        _set_rng_state(loaded["rng"][distributed.rank()])
    else:
        get_logger().info(
            f"resuming with {distributed.world_size()} processes, saved with {len(loaded['rng'])}: same data order, "
            "but dropout draws other numbers"
        )


def _check_shapes(directory: Path, state: dict[str, dict[str, torch.Tensor]], model: nn.Module) -> None:
    """Raise UserError if AdamW's averages have other shapes than the parameters: a fused step would write past their end."""
    parameters = cast("dict[str, torch.Tensor]", get_model_state_dict(model))
    for name, moments in state.items():
        for quantity, value in moments.items():
            wanted = None if name not in parameters else torch.Size() if quantity == "step" else parameters[name].shape
            if value.shape != wanted:
                needed = "the model has no such parameter" if wanted is None else f"{list(wanted)} is needed"
                found = f"the optimizer's {quantity} of {name} has shape {list(value.shape)}; {needed}"
                raise CheckpointError(f"{directory / STATE}: damaged or of another model: {found}")


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_model(
    target: Path,
    base: PreTrainedModel,
    beside: dict[str, dict[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    training: dict[str, Any] | None = None,
) -> None:
    """A checkpoint directory of a whole model. Raises CheckpointError if `target` is there already."""
    check_absent(target)
    weights = base.state_dict()
    write_directory(target, lambda partial: _fill_model(partial, base, weights, beside, tokenizer, facts, training))


def check_absent(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} is there already: choose another directory, or remove it")


def id_facts(ids: LatentIds) -> dict[str, Any]:
    """The entries of `Facts` for token ids."""
    return {"start_latent_id": ids.start, "end_latent_id": ids.end, "latent_token_id": ids.latent, "eos_token_id": ids.eos}


if __name__ == "__main__":
    from systems.convert import main

    main()
