"""Weights that are loaded: complete, finite, of the right shape and type, and in memory of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import WORDS, build, configuration, gpt2, make_tokenizer

from coconut import Coconut
from utils import UserError

WEIGHTS = "model.safetensors"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors in a model directory, each in memory of its own."""
    return {key: value.clone() for key, value in load_file(directory / WEIGHTS).items()}


def write(directory: Path, state: dict[str, torch.Tensor], **metadata: str) -> None:
    save_file(state, directory / WEIGHTS, {"format": "pt", **metadata})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny GPT-2 with weights and a tokenizer."""
    gpt2(5).save_pretrained(tmp_path / "base")
    make_tokenizer(WORDS).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- memory of their own ---


def tensors(model: Coconut) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("values", [{}, {"lora_r": 2}, {"attn_implementation": "eager"}])
def test_a_loaded_model_does_not_change_with_its_file(base: Path, values: dict[str, Any]) -> None:
    """LoRA's frozen base neither. A file that is cut while it is mapped ends the process, so that is tried last."""
    model = build(configuration(base, **values))
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    path = base / WEIGHTS
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place: replacing the file would leave the old one to whoever has mapped it
        file.write(bytes(size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    if Path("/proc/self/maps").exists():  # on Linux
        assert str(path) not in Path("/proc/self/maps").read_text()
    os.truncate(path, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


def test_where_weights_lie_in_the_file_decides_no_rounding(base: Path) -> None:
    """The rounding of a matrix-vector product (a batch of one row) depends on the alignment of its matrix."""
    for padding in (0, 8, 24, 40):
        write(base, weights(base), padding="." * padding)
        assert {tensor.data_ptr() % 64 for tensor in tensors(build(configuration(base))).values()} == {0}


# --- complete ---


def test_weights_that_are_missing_left_over_or_of_another_shape_are_refused(base: Path) -> None:
    original = weights(base)
    for change, message in {
        lambda state: {
            f"wrapped.{key}": value for key, value in state.items()
        }: r"missing keys \[.*unexpected keys \[.*wrapped",
        lambda state: state.pop("transformer.h.1.mlp.c_fc.weight"): r"missing keys \[transformer.h.1.mlp.c_fc.weight\]",
        lambda state: state.update(surprise=torch.ones(2)): r"missing keys \[\]; unexpected keys \[surprise\]",
        lambda state: state.update({"transformer.ln_f.bias": torch.ones(3)}): r"wrong shapes \[transformer.ln_f.bias\]",
    }.items():
        state = dict(original)
        changed = change(state)
        write(base, changed if isinstance(changed, dict) else state)
        with pytest.raises(UserError, match=f"base does not fit the model: .*{message}"):
            build(configuration(base))
    write(base, {**original, "transformer.h.0.attn.bias": torch.ones(1)})
    build(configuration(base))  # a mask that old checkpoints hold; the tied head is not in the file either


def test_weights_that_are_not_finite_are_named(base: Path, tmp_path: Path) -> None:
    state = gpt2(5).state_dict()
    state["transformer.h.1.ln_1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "diverged.pt")
    with pytest.raises(UserError, match="diverged.pt: transformer.h.1.ln_1.weight holds NaN or infinite weights"):
        build(configuration(base, load_model_path=str(tmp_path / "diverged.pt")))
    write(base, {**weights(base), "transformer.wpe.weight": torch.full((32, 16), torch.inf)})
    with pytest.raises(UserError, match="base: transformer.wpe.weight holds NaN or infinite weights"):
        build(configuration(base))


def test_a_single_file_with_too_few_embeddings_is_not_filled_up(base: Path, tmp_path: Path) -> None:
    """Training gives the markers rows (a published CoT model has none); an evaluation and `convert` must find them there."""
    torch.save(gpt2(5).state_dict(), tmp_path / "cot.pt")
    build(configuration(base, load_model_path=str(tmp_path / "cot.pt")))
    with pytest.raises(UserError, match="cot.pt: 5 rows of embeddings, the tokenizer with the markers of method coconut has 8"):
        build(configuration(base, load_model_path=str(tmp_path / "cot.pt"), only_eval=True))
    build(configuration(base, load_model_path=str(tmp_path / "cot.pt"), only_eval=True, method="cot"))
