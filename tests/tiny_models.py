"""Tiny random language models, one builder for every family the tests cover, and how close their results must be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


class TokenIds(NamedTuple):
    """The token ids Coconut needs."""

    eos: int
    start_latent: int
    end_latent: int
    latent: int


VOCABULARY = 64
POSITIONS = 96
WINDOW = 5  # positions a sliding-window layer sees; the test sequences are longer
IDS = TokenIds(eos=0, start_latent=61, end_latent=62, latent=63)

COMMON = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,  # the usual 0.02 gives almost equal logits, which would hide wrong thoughts
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,  # a padding id would freeze its embedding
}
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "attention_dropout": 0.0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES = {
    "gpt2": GPT2 | NO_DROPOUT,
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 8},
    "mistral": LLAMA_LIKE | {"sliding_window": WINDOW},
    # A mixture of experts with attention sinks; layers with and without a sliding window.
    "gpt_oss": LLAMA_LIKE
    | {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",  # the grouped one takes no float64
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": POSITIONS // 2},
    },
    # Soft-capped logits, scaled embeddings, a sliding window in every other layer.
    "gemma2": LLAMA_LIKE | {"head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 5.0},
    # Scaled embeddings.
    "gemma": LLAMA_LIKE | {"head_dim": 8},
    # Scaled embeddings, norms of queries and keys, other rotary positions in layers with a sliding window.
    "gemma3_text": LLAMA_LIKE
    | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    # Queries, keys and values of one projection.
    "phi3": LLAMA_LIKE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    # A bias in the language-model head, rotary positions on part of each head.
    "phi": LLAMA_LIKE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    # Logits multiplied by a constant.
    "cohere": LLAMA_LIKE | {"logit_scale": 0.25},
    # Logits divided by a constant, embeddings multiplied by one.
    "granite": LLAMA_LIKE | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype | None = None, **overrides) -> tuple[PreTrainedModel, TokenIds]:
    """A random model of a family (a key of `FAMILIES`) in evaluation mode, without dropout, and its token ids.

    It is float64, so that the order in which a processor adds up does not decide a comparison. Gemma 2 is float32: the
    smallest float64, its mask, is minus infinity to its softmax, which gives NaN where all is padding. `overrides` are
    further entries of the model's configuration.
    """
    dtype = dtype or (torch.float32 if family == "gemma2" else torch.float64)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | overrides)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval(), IDS


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> bool:
    """Whether no entry is further off than `tolerance` times the largest entry of `expected` (any shape, the same of both).

    Two ways to one number, as batches of other shapes or a cache, round differently on each processor: in proportion to
    what is added up, however small the sum. The default is 1e-5 for models in float64, whose norms and softmax compute in
    float32 (the largest difference seen is 1e-6), and 1e-4 for float32 (2e-5). Where both are almost zero, only an error
    above 1e-3 times `tolerance` counts.
    """
    if tolerance is None:
        tolerance = 1e-5 if expected.dtype == torch.float64 else 1e-4
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if not actual.numel():
        return True
    return bool((actual - expected).abs().max() <= tolerance * max(1e-3, expected.abs().max().item()))  # False for NaN


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None, what: str = "") -> None:
    """Raises AssertionError unless `near`."""
    if not near(actual, expected, tolerance):
        error, size = (actual.detach().double() - expected.detach().double()).abs().max(), expected.detach().abs().max()
        raise AssertionError(f"{what}: largest error {error:.3g}, largest entry {size:.3g}")
