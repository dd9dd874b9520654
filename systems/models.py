"""Base models and tokenizers: from the hub or a local directory, from a state dict, or from random weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from coconut import Coconut
from config import RunConfig
from methods import END_LATENT, LATENT, METHODS, PAUSE, START_LATENT
from systems.files import first_line
from systems.lora import Lora, add_adapters
from systems.shards import SHARDS, read_shards
from systems.weights import (
    add_step_decoder,
    check_weights,
    embedding_weight,
    fill_step_decoder,
    load_state_dict_file,
    thought_map_of,
)
from utils import UserError, get_logger

transformers.utils.logging.disable_progress_bar()  # one bar per loaded or saved shard says nothing

_OWN_CODE = "{}: it brings its own code, which is not run: set trust_remote_code: True if you have read it and trust it"
IDENTITY_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")


class LatentIds(NamedTuple):
    """Token ids of the markers, of the end of a sequence, and of what stands in a thought's place in the data."""

    start: int
    end: int
    latent: int
    eos: int
    thought: int


def load_tokenizer(source: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id, a local directory, or a GGUF file there. trust_remote_code: run code that comes with it.

    Raises UserError if there is none, none with an EOS token, one that knows no text, or one that is not to be trusted.
    """
    if gguf_file is not None and transformers.__version__.startswith("4."):
        raise UserError("gguf_file needs transformers 5: version 4 takes the wrong token of such files for the end of a text")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_options(gguf_file, trust_remote_code))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError, ... for what it cannot read
        if (Path(source) / "config.json").is_file():
            _config_of(source, None, trust_remote_code)  # a vision model has no tokenizer either, and that says more
        raise _unloadable("tokenizer", source, gguf_file, trust_remote_code, error) from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{source}: no tokenizer could be loaded: the one there knows no text; are its files missing?")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no eos_token, which must end every answer")
    return tokenizer


def gguf_of(config: RunConfig, source: str | None) -> str | None:
    """The GGUF file to read from `source`: `gguf_file` belongs to `model_id`; checkpoints are plain directories."""
    return config.gguf_file if source == config.model_id else None


def _place(source: str, gguf_file: str | None) -> str:
    return source if gguf_file is None else f"{source}/{gguf_file} (is the file whole?)"


def _options(gguf_file: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of every from_pretrained. Without trust_remote_code transformers would ask on standard input."""
    return {"trust_remote_code": trust_remote_code, **({"gguf_file": gguf_file} if gguf_file is not None else {})}


def _unloadable(what: str, source: str, gguf_file: str | None, trust_remote_code: bool, error: Exception) -> UserError:
    """What is said where transformers cannot load something, or not without running code that comes with it."""
    if not trust_remote_code and "trust_remote_code" in str(error):
        return UserError(_OWN_CODE.format(source))
    return UserError(f"{_place(source, gguf_file)}: no {what} could be loaded: {first_line(error)}")


def latent_ids(tokenizer: PreTrainedTokenizerBase, method: str | None) -> LatentIds:
    """Ids of the markers; those that the method uses are added to the tokenizer.

    Others get the next free ids, which no text contains, so that tokenizer and model stay as they are.
    """
    used = METHODS[method].markers if method is not None else ()
    tokenizer.add_tokens(list(used), special_tokens=True)
    free = itertools.count(max(tokenizer.get_vocab().values()) + 1)
    names = (START_LATENT, END_LATENT, LATENT, PAUSE)
    ids = {name: cast("int", tokenizer.convert_tokens_to_ids(name)) if name in used else next(free) for name in names}
    thought = ids[PAUSE] if PAUSE in used else ids[LATENT]
    return LatentIds(ids[START_LATENT], ids[END_LATENT], ids[LATENT], tokenizer.eos_token_id, thought)


def build_model(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids: LatentIds,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
) -> Coconut:
    """The base model that the configuration names, with rows for the markers, inside a Coconut.

    It is on the CPU; with a device_map ("auto") where accelerate puts its layers. Raises UserError if it cannot be used.
    """
    if config.attn_implementation == "flex_attention" and not config.only_eval and not torch.cuda.is_available():
        raise UserError("attn_implementation: flex_attention: PyTorch cannot train with it on a CPU; use sdpa or eager")
    markers = METHODS[str(config.method)].markers
    source = config.load_model_path or config.model_id
    base = _base_model(config, tokenizer, markers, dtype, device_map)
    _check_finite(base, source)
    _warn_of_scaled_thoughts(base)
    fuse_activations(base)
    initialise_markers(base, tokenizer, markers, config.marker_init)
    iterations = config.jacobi_iterations if config.latent_mode == "jacobi" else None
    model = Coconut(
        base, ids.latent, ids.start, ids.end, ids.eos, thought_map_of(config, base), iterations, config.attend_padding
    )
    if METHODS[str(config.method)].step_vectors is not None and not config.only_eval:
        add_step_decoder(model)
        fill_step_decoder(model, Path(source))  # where training goes on from a checkpoint that has one
    if config.lora_r is not None:
        add_adapters(base, config.part(Lora), [cast("int", tokenizer.convert_tokens_to_ids(marker)) for marker in markers])
    _check_usable(model, source)
    if config.bf16 == "pure":
        model.to(torch.bfloat16)
    return model


def fuse_activations(base: PreTrainedModel) -> None:
    """Compute GPT-2's approximation of GELU in one kernel instead of eight; the values differ by rounding alone."""
    for parent in list(base.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def _base_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str], dtype: torch.dtype, device_map: str | None
) -> PreTrainedModel:
    path = config.load_model_path
    if config.from_scratch:
        return _random_model(config, len(tokenizer))
    if path is None:
        if config.resume:
            get_logger().info(f"starts at epoch {config.resume + 1} with the weights of {config.model_id} itself")
        return _pretrained(config, config.model_id, dtype, device_map)
    if Path(path).is_file():
        bare = _without_weights(Path(config.model_id))  # the file has all of them
        base = _random_model(config, 0, dtype) if bare else _pretrained(config, config.model_id, dtype)
        load_state_dict_file(base, Path(path))
        # The published code sizes the embeddings to the tokenizer once it adds the markers, and only then. More rows than
        # that may be padding: what is evaluated was trained with its markers, what is trained further perhaps without.
        rows = embedding_weight(base).shape[0]
        if config.only_eval and rows < len(tokenizer):
            raise UserError(
                f"{path}: {rows} rows of embeddings, the tokenizer with the markers of method {config.method} has "
                f"{len(tokenizer)}: it was trained with another method, or with another tokenizer"
            )
        trained = rows == len(tokenizer) or (config.only_eval and rows > len(tokenizer))
        base.config.coconut_markers = list(markers) if trained else []
        return base
    check_same_family(config, path)
    if (Path(path) / SHARDS).is_dir():
        return from_shards(Path(path), config.attn_implementation, config.trust_remote_code, dtype)
    return _pretrained(config, path, dtype, device_map)


def _random_model(config: RunConfig, vocabulary: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model_config = _config_of(config.model_id, config.gguf_file, config.trust_remote_code)
    model_config.vocab_size = max(model_config.vocab_size, vocabulary)
    get_logger().info(f"random weights from the configuration of {config.model_id}")
    try:
        return _from_config(model_config, config.attn_implementation, config.trust_remote_code, dtype)
    except Exception as error:  # as in load_tokenizer
        place = _place(config.model_id, config.gguf_file)
        raise UserError(f"{place}: no model can be made from its configuration: {first_line(error)}") from None


def _from_config(
    model_config: Any, attention: str | None, trust_remote_code: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        model_config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
    )


def from_shards(
    source: Path, attention: str | None = None, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a sharded checkpoint, whole. Raises UserError if it is damaged."""
    base = _from_config(_config_of(str(source), None, trust_remote_code), attention, trust_remote_code, dtype)
    read_shards(source / SHARDS, {"model": base.state_dict()}, together=False)
    base.tie_weights()
    return base.eval()


def _pretrained(config: RunConfig, source: str, dtype: torch.dtype, device_map: str | None = None) -> PreTrainedModel:
    """The model of a hub id, a directory or a GGUF file: every pretrained model comes through here.

    Raises UserError if there is none, or its weights are not exactly those that the model has.
    """
    path, gguf_file = Path(source), gguf_of(config, source)
    if gguf_file is None:
        _config_of(source, None, config.trust_remote_code)  # says more about what is no causal language model than loading it
        if _without_weights(path):
            raise UserError(
                f"{source}: a configuration without weights; with from_scratch: True run.py starts from random ones"
            )
    options = {**_options(gguf_file, config.trust_remote_code), "dtype": dtype}
    # From 5.2x on transformers would leave the weights quantised where it has kernels for that; those cannot be trained.
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if gguf_file is None:
        options |= {"attn_implementation": config.attn_implementation, "device_map": device_map}
    try:
        checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        base, info = cast("Any", AutoModelForCausalLM).from_pretrained(source, **checked, **options)
        if gguf_file is not None:
            base = _plain_model(base, config, dtype)
    except Exception as error:  # as in load_tokenizer
        raise _unloadable("causal language model", source, gguf_file, config.trust_remote_code, error) from None
    shapes = [one if isinstance(one, str) else one[0] for one in info["mismatched_keys"]]  # from version 5 on with the shapes
    check_weights(_place(source, gguf_file), [*info["missing_keys"]], [*info["unexpected_keys"]], shapes)
    _own_weights(base)
    return base


def _without_weights(path: Path) -> bool:
    return (path / "config.json").is_file() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin"))


def _plain_model(loaded: PreTrainedModel, config: RunConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The weights of a GGUF file in a model of the usual classes; the one that is loaded cannot be saved."""
    model_config = loaded.config
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    base = _from_config(model_config, config.attn_implementation, config.trust_remote_code, dtype)
    base.load_state_dict(loaded.state_dict(), assign=True)
    base.tie_weights()
    base.generation_config = loaded.generation_config
    return base.eval()


@torch.no_grad()
def _own_weights(base: PreTrainedModel) -> None:
    """Copy the weights into memory that torch has allocated.

    Loaded weights are the file itself, mapped: they would change with it, and a process whose file is cut dies. They also
    lie wherever they lie in the file, and the rounding of a matrix-vector product depends on that.
    """
    for tensor in itertools.chain(base.parameters(), base.buffers()):
        tensor.data = tensor.data.clone()


def _check_finite(base: PreTrainedModel, source: str) -> None:
    """Raise UserError if a weight is NaN or infinite."""
    for name, weight in base.named_parameters():
        if not weight.is_meta and not weight.isfinite().all():  # accelerate may leave weights on the disk
            raise UserError(f"{source}: {name} holds NaN or infinite weights: the model is damaged, or its training diverged")


def _config_of(source: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """Configuration of a causal language model. Raises UserError if there is none, or it is of another kind of model."""
    try:
        found = AutoConfig.from_pretrained(source, **_options(gguf_file, trust_remote_code))
    except Exception as error:  # as in load_tokenizer
        raise _unloadable("model configuration", source, gguf_file, trust_remote_code, error) from None
    if type(found) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return found
    if "AutoModelForCausalLM" not in (getattr(found, "auto_map", None) or {}):
        raise UserError(f"{source}: a model of family {found.model_type!r} is not a causal language model, which is needed")
    if not trust_remote_code:
        raise UserError(_OWN_CODE.format(source))
    return found


@torch.no_grad()
def verify_projection(model: Coconut) -> None:
    """Raise ValueError if decoder and `project` make other logits of embeddings than the base model of their tokens.

    The model must be in evaluation mode: dropout would look like a difference.
    """
    token = torch.tensor([[model.eos_token_id]], device=model.embedding.weight.device)
    expected = model.base_causallm(input_ids=token, attention_mask=torch.ones_like(token)).logits
    embeds = model.embedding(token)
    actual = model.project(model.decoder(inputs_embeds=embeds, attention_mask=torch.ones_like(token)).last_hidden_state)
    if not torch.allclose(actual.float(), expected.float(), rtol=1e-2, atol=1e-3):
        family = model.base_causallm.config.model_type
        raise ValueError(
            f"model family {family!r} changes its logits after the language-model head in a way not known here, or reads more "
            "of a token than its embedding"
        )


def _check_usable(model: Coconut, source: str) -> None:
    """Raise UserError if the model is not causal, or computes logits or keeps its cache in a way that Coconut does not know."""
    family = model.base_causallm.config.model_type
    was_training = model.training
    model.eval()  # without dropout
    try:
        if not _is_causal(model):
            raise ValueError(f"family {family!r} reads in both directions (an encoder); a causal language model is needed")
        verify_projection(model)
        model.decoder(inputs_embeds=torch.ones_like(model.embedding.weight[None, :2]))  # of no token, as thoughts are
        model.generate(torch.tensor([[model.eos_token_id]], device=model.embedding.weight.device), max_new_tokens=2)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # families with other inputs or caches raise TypeError, AttributeError, RuntimeError, ...
        raise UserError(f"{source}: model family {family!r} cannot be used for latent thoughts: {first_line(error)}") from None
    model.train(was_training)


def _warn_of_scaled_thoughts(base: PreTrainedModel) -> None:
    """Gemma 1 and 2 multiply embeddings by the root of their width: in the embedding from transformers 5 on, before that
    after it, where a thought, which stands in an embedding's place, is multiplied too."""
    if base.config.model_type in ("gemma", "gemma2") and not hasattr(base.get_input_embeddings(), "embed_scale"):
        get_logger().warning(
            f"this version of transformers multiplies the thoughts of {base.config.model_type} by the root of the width; "
            "from version 5 on it does not: train and evaluate with the same"
        )


@torch.no_grad()
def _is_causal(model: Coconut) -> bool:
    """Whether the state of a token stays as it is when the next token is another one."""
    tokens = torch.full((2, 2), model.eos_token_id, device=model.embedding.weight.device)
    tokens[1, 1] = 0 if model.eos_token_id else 1
    first = model.think(tokens).hidden[:, 0]
    rounding = 4 * torch.finfo(first.dtype).eps
    return torch.allclose(first[0], first[1], rtol=max(1e-3, rounding), atol=max(1e-5, rounding))


def check_same_family(config: RunConfig, checkpoint: str) -> None:
    """Raise UserError if a checkpoint directory holds a model of another shape than `model_id`."""
    if checkpoint == config.model_id:
        return
    model_id = config.model_id
    if config.gguf_file is not None and Path(model_id).is_dir() and not (Path(model_id) / config.gguf_file).is_file():
        get_logger().info(f"{model_id}: {config.gguf_file} is no longer there; {checkpoint} needs it no more")
        return
    both = ((model_id, config.gguf_file), (checkpoint, None))
    expected, found = (_config_of(*one, config.trust_remote_code).get_text_config() for one in both)
    for key in IDENTITY_KEYS:
        if getattr(expected, key, None) != getattr(found, key, None):
            raise UserError(
                f"load_model_path: {checkpoint} is a checkpoint of another model: {key} is {getattr(found, key, None)}, "
                f"model_id {model_id} has {getattr(expected, key, None)}"
            )


@torch.no_grad()
def initialise_markers(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str], like: str | None = None
) -> None:
    """Make room for the markers and start their rows from the embedding of the token `like`.

    like: None is "<<", or the mean embedding where that is no token. Rows of markers that a checkpoint already has stay as
    they are. Embeddings that are padded beyond the tokenizer are never shrunk.
    Raises UserError if the tokenizer has other tokens for text, or no token `like`.
    """
    there = getattr(base.config, "coconut_markers", None) or []
    there = [START_LATENT, END_LATENT, LATENT] if there is True else there  # as checkpoints of version 0.1 say it
    new = [cast("int", tokenizer.convert_tokens_to_ids(marker)) for marker in markers if marker not in there]
    rows = embedding_weight(base).shape[0]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}  # markers, padding, ...
    texts = [(number, token) for token, number in tokenizer.get_vocab().items() if number not in special]
    last, token = max(texts, default=(0, ""))
    if last >= rows:
        raise UserError(
            f"the tokenizer does not belong to the model: it has {token!r} as token {last}, but the model's embeddings end at "
            f"{rows - 1}; use the tokenizer that came with the model"
        )
    if len(tokenizer) > rows:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if not new:
        return
    tokens = tokenizer.encode(like or "<<", add_special_tokens=False)
    one_token = len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id
    if like is not None and not one_token:
        raise UserError(f"marker_init: {like!r} is {len(tokens)} tokens of this tokenizer, or an unknown one; name one token")
    for weight in (embedding_weight(base), cast("nn.Linear", base.get_output_embeddings()).weight):
        known = weight[: min(rows, min(new))]
        weight[new] = (known[tokens[0]] if one_token else known.mean(dim=0)).clone()
    base.config.coconut_markers = [*there, *(marker for marker in markers if marker not in there)]
    source = f"the embedding of {like or '<<'!r}" if one_token else "the mean embedding"
    get_logger().info(f"embeddings of the new tokens start from {source}")
