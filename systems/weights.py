"""Weights beside those that transformers reads: published state dicts, thought maps, the second model of SIM-CoT."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut import Coconut
from config import RunConfig
from methods import StepDecoder
from systems.files import first_line, read_facts
from thoughts import ThoughtMap, make_thought_map
from utils import UserError

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "base_causallm.")  # DDP, torch.compile, Coconut
OLD_BUFFERS = (".attn.bias", ".masked_bias", ".attention.bias", ".inv_freq")  # masks and angles that old checkpoints hold
THOUGHT_MAP, MAP_PREFIX = "thought_map.safetensors", "thought_map."
STEP_DECODER = "step_decoder.safetensors"


def embedding_weight(base: PreTrainedModel) -> Tensor:
    """The input embeddings, (rows of the vocabulary, width)."""
    return cast("nn.Embedding", base.get_input_embeddings()).weight


def check_weights(place: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    """Raise UserError that lists what does not fit the model; transformers would fill it with random numbers and go on."""
    unexpected = [name for name in unexpected if not name.endswith(OLD_BUFFERS)]
    if missing or unexpected or shapes:
        raise UserError(
            f"{place} does not fit the model: missing keys {_listed(missing)}; unexpected keys {_listed(unexpected)}; "
            f"wrong shapes {_listed(shapes)}"
        )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A single-file state dict (torch or safetensors) with the prefixes of wrappers removed from its keys."""
    try:
        is_safe = path.suffix == ".safetensors"
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a state dict of tensors: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state):
        raise UserError(f"{path}: not a state dict of tensors: expected a mapping from parameter names to tensors")
    return {_strip_prefixes(key): value for key, value in state.items()}


def _strip_prefixes(key: str) -> str:
    while prefix := next((prefix for prefix in WRAPPER_PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def load_state_dict_file(base: PreTrainedModel, path: Path) -> None:
    """Load a single-file checkpoint, resizing the embeddings to its vocabulary.

    Raises UserError that lists missing, unexpected and wrongly shaped keys. Tied heads and the attention-mask buffers of
    old GPT-2 checkpoints may be there or not.
    """
    state = {key: value for key, value in read_state_dict(path).items() if not key.startswith(MAP_PREFIX)}
    own = base.state_dict()
    embedding = next(name for name, value in base.named_parameters() if value is embedding_weight(base))
    if "embedding.weight" in state and "embedding.weight" not in own:  # a wrapper that names the embeddings a second time
        state.setdefault(embedding, state["embedding.weight"])
        del state["embedding.weight"]
    rows, *width = state[embedding].shape if embedding in state and state[embedding].ndim else (0,)
    if rows not in (0, own[embedding].shape[0]) and width == [*own[embedding].shape[1:]]:
        base.resize_token_embeddings(rows, mean_resizing=False)
        own = base.state_dict()
    optional = (getattr(base, "_tied_weights_keys", None) or []) if base.config.tie_word_embeddings else []
    _check_fit(f"load_model_path: {path}", own, state, optional)
    base.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    base.tie_weights()


def thought_map_of(config: RunConfig, base: PreTrainedModel) -> ThoughtMap:
    """The map that the configuration names, with the weights that the source of the model has for it.

    Where training goes on from a model without any, they start anew. Raises UserError if some are missing or left over.
    """
    source = config.load_model_path or config.model_id
    try:
        thought_map = make_thought_map(config.thought_map, base, config.seed)
    except ValueError as error:
        raise UserError(f"thought_map: {source}: {error}") from None
    found, facts = read_map(Path(source)), None if config.from_scratch else read_facts(Path(source))
    same, weights = facts is not None and facts.thought_map == config.thought_map, [*thought_map.parameters()]
    if config.only_eval and facts is not None and not same and not weights:
        return thought_map.to(embedding_weight(base))  # another map than the trained one, which has nothing to learn
    if found or same or (config.only_eval and weights):
        copy_weights(thought_map.state_dict(), found, f"{source}: thought_map {config.thought_map}")
    return thought_map.to(embedding_weight(base))


@torch.no_grad()
def copy_weights(own: dict[str, Tensor], weights: dict[str, Tensor], place: str) -> None:
    """Copy saved weights into those of a module. Raises UserError, which begins with `place`, if they are not those it has."""
    _check_fit(place, own, weights)
    for key, value in weights.items():
        own[key].copy_(value)


def _check_fit(place: str, own: dict[str, Tensor], found: dict[str, Tensor], optional: Iterable[str] = ()) -> None:
    shapes = [key for key in own.keys() & found.keys() if own[key].shape != found[key].shape]
    check_weights(place, [*(own.keys() - found.keys() - set(optional))], [*(found.keys() - own.keys())], shapes)


def read_map(source: Path) -> dict[str, Tensor]:
    """The weights of a thought map in a checkpoint directory or in a state dict; empty where there are none."""
    path = source / THOUGHT_MAP if source.is_dir() else source
    if not path.is_file():
        return {}
    state = read_state_dict(path)
    if source.is_dir():
        return state
    return {key.removeprefix(MAP_PREFIX): value for key, value in state.items() if key.startswith(MAP_PREFIX)}


def add_step_decoder(model: Coconut) -> None:
    """The second model of SIM-CoT, which begins as a copy of the base model."""
    ids = (model.latent_token_id, model.start_latent_id, model.end_latent_id, model.eos_token_id)
    model.step_decoder = StepDecoder(Coconut(copy.deepcopy(model.base_causallm), *ids))


def fill_step_decoder(model: Coconut, directory: Path) -> None:
    """Load the second model of SIM-CoT where a checkpoint has one. Raises UserError if it is not the one that is trained."""
    path = directory / STEP_DECODER
    if model.step_decoder is None or not path.is_file():
        return
    copy_weights(dict(model.step_decoder.named_parameters()), read_state_dict(path), str(path))


def weights_beside(model: Coconut) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU of what transformers does not save: a file's name, and its tensors; called by all processes."""
    parts = {THOUGHT_MAP: model.thought_map.state_dict()}
    if model.step_decoder is not None:
        parts[STEP_DECODER] = dict(model.step_decoder.named_parameters())
    return {name: {key: _whole(value) for key, value in state.items()} for name, state in parts.items()}


def _whole(value: Tensor) -> Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().to("cpu", copy=True).contiguous()


def _listed(keys: list[str], most: int = 8) -> str:
    keys = sorted(keys)
    return f"[{', '.join(keys[:most])}{f', ... {len(keys) - most} more' if len(keys) > most else ''}]"
