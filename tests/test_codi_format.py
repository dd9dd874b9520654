"""CODI's published form of weights: files of that shape are made here, and the checkpoint computes what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import make_tokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from coconut import Coconut
from systems.convert import convert
from utils import UserError

ALPHA, RANK, WORDS = 6.0, 2, {word: number for number, word in enumerate(["<unk>", "<eos>", *(f"w{n}" for n in range(38))])}
ENDS = {"bos_token_id": 1, "eos_token_id": 1}
FACTS: dict[str, Any] = {
    "method": "codi",
    "stage": 4,
    "c_thought": 2,
    "max_latent_stage": 3,
    "pad_latent_to_max": True,
    "epoch": 0,
    "thought_map": {"name": "projection", "width": 6},
}


def base_of(family: str, rows: int) -> PreTrainedModel:
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_layer=2, n_embd=8, n_head=2, n_positions=32, **ENDS)).eval()
    size = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=rows, num_hidden_layers=2, max_position_embeddings=32, **size, **ENDS)
    ).eval()


def published(base: PreTrainedModel) -> tuple[dict[str, Tensor], PreTrainedModel, nn.Module]:
    """A state dict of that shape; the model with LoRA merged, its new rows as they are; and the projection."""
    torch.manual_seed(1)
    state = {f"codi.base_model.model.{name}": value.clone() for name, value in base.state_dict().items()}
    for name, module in list(base.named_modules()):
        if name.rpartition(".")[2] not in ("c_attn", "c_proj", "c_fc", "q_proj", "down_proj"):
            continue
        weight: Any = module.weight  # as GPT-2 has it (in, out), as Llama has it (out, in)
        rows, columns = weight.shape[::-1] if name.rpartition(".")[2].startswith("c_") else weight.shape
        a, b = torch.randn(RANK, columns), torch.randn(rows, RANK)
        change = ALPHA / RANK * b @ a
        path = f"codi.base_model.model.{name}"
        state[f"{path}.base_layer.weight"] = state.pop(f"{path}.weight")
        if f"{path}.bias" in state:
            state[f"{path}.base_layer.bias"] = state.pop(f"{path}.bias")
        state[f"{path}.lora_A.default.weight"], state[f"{path}.lora_B.default.weight"] = a, b
        with torch.no_grad():
            weight += change if weight.shape == change.shape and not name.rpartition(".")[2].startswith("c_") else change.T
    projection = nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
    projection.add_module("ln", nn.LayerNorm(8))
    return state | {f"prj.{name}": value for name, value in projection.state_dict().items()}, base, projection


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Configuration and tokenizer of the base model, as the hub has them."""
    tokenizer = make_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_converted_thinks_as_the_published_weights_say(family: str, directory: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(WORDS)
    base_of(family, len(tokenizer)).save_pretrained(directory)
    state, merged, projection = published(base_of(family, len(tokenizer) + 3))
    torch.save(state, tmp_path / "published.bin")
    convert(tmp_path / "published.bin", tmp_path / "out", str(directory), FACTS, ALPHA)
    model = Coconut.from_pretrained(tmp_path / "out")
    vocabulary = len(tokenizer)
    begin, end = vocabulary + 1, vocabulary + 2  # the published order: padding, beginning, end of thoughts
    embed: Any = merged.get_input_embeddings()
    question = torch.tensor([[5, 6, 7]])
    embeds = embed(torch.cat([question, torch.tensor([[begin]])], dim=1))
    with torch.no_grad():
        for _ in range(6):
            states = merged(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
            embeds = torch.cat([embeds, projection(states[:, -1:])], dim=1)
        logits = merged(inputs_embeds=torch.cat([embeds, embed(torch.tensor([[end, 8]]))], dim=1)).logits[0, :, :vocabulary]
        own = torch.tensor([[5, 6, 7, model.start_latent_id, *[model.latent_token_id] * 6, model.end_latent_id, 8]])
        found = model(own).logits[0, :, :vocabulary]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    facts = json.loads((tmp_path / "out" / "coconut.json").read_text())
    assert (facts["method"], facts["thought_map"]) == ("codi", {"name": "projection", "width": 6})


@pytest.mark.parametrize(
    ("change", "alpha", "said"),
    [
        (lambda state: state, None, "it holds LoRA weights: set --lora-alpha"),
        (lambda state: drop(state, "lora_B"), ALPHA, "without the rest of it"),
        (lambda state: drop(state, "prj.3"), ALPHA, "its projection is not two linear layers and a norm"),
        (lambda state: {k: v[:-1] if "wte" in k or "lm_head" in k else v for k, v in state.items()}, ALPHA, "no embeddings of"),
    ],
)
def test_what_does_not_fit_is_said(change: Any, alpha: float | None, said: str, directory: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(WORDS)
    base_of("gpt2", len(tokenizer)).save_pretrained(directory)
    state, *_ = published(base_of("gpt2", len(tokenizer) + 3))
    torch.save(change(state), tmp_path / "published.bin")
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "published.bin", tmp_path / "out", str(directory), FACTS, alpha)
    assert not (tmp_path / "out").exists()


def drop(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Without one module of the file."""
    gone = next(key.rpartition(".")[0] for key in state if part in key)
    return {key: value for key, value in state.items() if not key.startswith(gone)}
