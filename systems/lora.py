"""LoRA (arXiv 2106.09685) through peft: small matrices beside the frozen weights, and the rows of the new tokens.

The adapters are put into the model in place, so that its class, and whatever wraps it, stays as it is. A checkpoint holds
the merged weights, which load like those of any model, and beside them the adapters themselves: merging rounds, so only
these continue a run exactly. peft is imported only where LoRA is used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils import UserError, get_logger

ADAPTER = "default"
ADAPTER_PART = re.compile(r"\.(lora_|token_adapter\.trainable_tokens_)")
WRAPPER_PART = re.compile(r"\.(base_layer|token_adapter)(?=\.)")


@dataclass(frozen=True)
class Lora:
    """The part of a configuration about LoRA; `RunConfig` explains the keys."""

    lora_r: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    lora_target_modules: str | list[str] | None


def add_adapters(base: PreTrainedModel, config: Lora, new_tokens: Sequence[int]) -> None:
    """Freeze the model and give it LoRA matrices; the rows of `new_tokens` are trained as they are, all others stay.

    Raises UserError if the rank is larger than the model's width, no module fits lora_target_modules, the head's new rows
    cannot be trained, or embeddings or head shall have matrices beside new rows.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    rank = cast("int", config.lora_r)
    width = base.config.get_text_config().hidden_size
    if rank > width:
        raise UserError(f"lora_r: {rank} is more than the model's width, {width}, and so no low rank")
    fingerprint = _fingerprint(base)
    settings = LoraConfig(
        r=rank,
        lora_alpha=cast("int", config.lora_alpha or 2 * rank),
        lora_dropout=config.lora_dropout or 0.0,
        target_modules=config.lora_target_modules or "all-linear",
        trainable_token_indices=cast("Any", _token_rows(base, new_tokens)),
    )
    linear = [name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    base.requires_grad_(False)
    beside = UserError(
        f"lora_target_modules: {config.lora_target_modules} adapts the embeddings or the head, whose rows for "
        "the markers are trained already: leave them out"
    )
    try:
        inject_adapter_in_model(settings, base, ADAPTER)
    except TypeError:  # peft trains rows of plain modules alone
        raise beside from None
    except (ValueError, re.error) as error:
        raise UserError(
            f"lora_target_modules: {config.lora_target_modules} fits no module of the model; its linear modules are "
            f"{', '.join(sorted(set(linear)))} ({str(error).split('. ')[0]})"
        ) from None
    if new_tokens and any(isinstance(one, LoraLayer) for one in (base.get_input_embeddings(), base.get_output_embeddings())):
        raise beside  # tied ones, of which the merged weights would be those of the rows alone
    base.adapted_from = fingerprint  # type: ignore[assignment]
    trained = sum(parameter.numel() for parameter in adapter_weights(base).values())
    total = sum(parameter.numel() for parameter in base.parameters())
    get_logger().info(f"LoRA of rank {rank}: {trained:,} trainable parameters of {total:,} ({trained / total:.2%})")


def _token_rows(base: PreTrainedModel, new_tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Module names of the embeddings, and of the head where it has weights of its own, with the rows to train."""
    if not new_tokens:
        return None
    embedding, head = cast("nn.Embedding", base.get_input_embeddings()), cast("nn.Linear", base.get_output_embeddings())
    if head.bias is not None:
        family = base.config.model_type
        raise UserError(
            f"lora_r: the language-model head of family {family!r} has a bias, with which peft cannot train the rows of new "
            "tokens; use a method without markers (cot, no_cot, no_thoughts, icot), or train without LoRA"
        )
    modules = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in base.named_modules()}
    return {names[id(module)]: list(new_tokens) for module in modules}


def is_adapted(base: PreTrainedModel) -> bool:
    return hasattr(base, "adapted_from")


def adapter_weights(base: PreTrainedModel) -> dict[str, Tensor]:
    """The trained parameters: LoRA matrices and rows of new tokens."""
    return {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}


def adapter_state(base: PreTrainedModel) -> dict[str, Any] | None:
    """What exact resuming needs: the adapters, and which frozen weights they belong to; None without LoRA."""
    if not is_adapted(base):
        return None
    weights = {name: weight.detach().cpu().clone() for name, weight in adapter_weights(base).items()}
    return {"weights": weights, "adapted_from": base.adapted_from}


@torch.no_grad()
def load_adapter_state(base: PreTrainedModel, state: dict[str, Any] | None) -> None:
    """Put saved adapters into the model. Raises UserError if it has others, or is another model than they were trained on."""
    if (state is None) == is_adapted(base):
        found, wanted = ("without", "with") if state is None else ("with", "without")
        raise UserError(f"lora_r: the checkpoint was trained {found} LoRA and cannot go on {wanted} it: choose another name")
    if state is None:
        return
    own = adapter_weights(base)
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in state["weights"].items()}:
        raise UserError("lora_r, lora_target_modules: the checkpoint was trained with others: choose another name")
    if state["adapted_from"] != base.adapted_from:
        raise UserError(
            "model_id or load_model_path no longer holds the weights that the LoRA weights of the checkpoint were trained on"
        )
    for key, value in state["weights"].items():
        own[key].copy_(value)


@torch.no_grad()
def merged_weights(base: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the plain model with the adapters merged, on the CPU; the model itself stays as it is."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    state = {_plain(name): value.cpu() for name, value in base.state_dict().items() if not ADAPTER_PART.search(name)}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            weight = cast("Tensor", module.get_base_layer().weight)
            state[f"{name}.weight"] = (weight + cast("Any", module).get_delta_weight(ADAPTER)).cpu()
        elif isinstance(module, TrainableTokensLayer):
            state[_plain(f"{name}.weight")] = module.get_merged_weights([ADAPTER]).cpu()
    return state


def _plain(name: str) -> str:
    return WRAPPER_PART.sub("", name)


def _fingerprint(base: PreTrainedModel) -> str:
    """A hash of all weights (float32)."""
    digest = hashlib.sha256()
    for name, weight in sorted(base.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().numpy().data)
    return digest.hexdigest()
