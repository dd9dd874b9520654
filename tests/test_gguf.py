"""GGUF files: the same model as the one they were made of, checkpoints that need them no more, and what cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import chain_records, read_evaluation, read_rows, write_json
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import run
from config import RunConfig
from systems import sources
from systems.checkpoint import CheckpointError
from systems.models import build_model, latent_ids
from utils import UserError

gguf = pytest.importorskip("gguf")

NAME = "tiny.gguf"
HEADS = 2
NORMAL, CONTROL = 1, 3  # token types of the format


def tokens() -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<<"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def as_stored(name: str, weight: torch.Tensor) -> np.ndarray:
    """The format stores the rows of queries and keys in the order of interleaved rotary positions."""
    if "q_proj" in name or "k_proj" in name:
        weight = weight.reshape(HEADS, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight.detach().contiguous().numpy()


def write_gguf(path: Path, base: LlamaForCausalLM) -> None:
    config = base.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens())
    writer.add_token_types([CONTROL if token.startswith("<|") else NORMAL for token in tokens()])
    writer.add_token_merges(["< <"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in base.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, (".weight",)), as_stored(name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    write_gguf(directory / NAME, llama())
    return directory


def configuration(directory: Path, **values: Any) -> RunConfig:
    needed = {"name": "x", "model_id": str(directory), "gguf_file": NAME, "method": "coconut"}
    return RunConfig(**{**needed, "train_path": "t", "val_path": "v", **values})


@pytest.fixture
def gguf_arguments(directory: Path, tmp_path: Path) -> list[str]:
    data = write_json(tmp_path / "data.json", chain_records(4))
    values = {
        "name": "run",
        "save_path": tmp_path / "checkpoints",
        "method": "coconut",
        "max_latent_stage": 1,
        "resume": 1,
        "num_epochs": 2,
        "lr": "1e-3",
        "batch_size_training": 2,
        "model_id": directory,
        "gguf_file": NAME,
        "train_path": data,
        "val_path": data,
        "max_new_tokens": 4,
        "num_workers": 0,
        "wandb": "disabled",
    }
    return [f"{key}={value}" for key, value in values.items()]


def test_the_model_in_the_file_is_the_one_it_was_made_of(directory: Path) -> None:
    config = configuration(directory)
    tokenizer = sources.load_run_tokenizer(sources.resolve_paths(config))
    text = "Tom has <<2+3=5>> apples.\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokens().index("<<") in ids
    assert tokenizer("a<|im_end|>")["input_ids"][-1] == 2
    model = build_model(config, tokenizer, latent_ids(tokenizer, config.method))
    original = llama()
    prompt = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model.base_causallm(prompt).logits[..., : len(tokens())], original(prompt).logits)
    weight = model.base_causallm.get_input_embeddings().weight
    assert model.base_causallm.get_output_embeddings().weight is weight
    assert torch.equal(weight[model.latent_token_id], weight[tokens().index("<<")])
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())


def test_checkpoints_of_a_gguf_model_are_plain_and_need_the_file_no_more(
    gguf_arguments: list[str], tmp_path: Path, capsys: Any
) -> None:
    start = run.main.__wrapped__
    start(gguf_arguments)
    assert "starts at epoch 2 with the weights of" in capsys.readouterr().out
    saved = tmp_path / "checkpoints" / "run" / "checkpoint_2"
    assert AutoModelForCausalLM.from_pretrained(saved).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(saved).eos_token == "<|im_end|>"
    (tmp_path / "moved").mkdir()  # without the file
    elsewhere = [*gguf_arguments, f"model_id={tmp_path / 'moved'}"]
    start([*elsewhere, "num_epochs=3"])
    assert [row["stage"] for row in read_rows(saved.parent / "metrics.jsonl", "epoch")] == [1, 2]
    start([*elsewhere, "only_eval=true", "name=again", f"load_model_path={saved.parent}"])
    row = read_evaluation(tmp_path / "checkpoints" / "again")
    assert row["loss"] == pytest.approx(read_rows(saved.parent / "metrics.jsonl", "epoch")[-1]["val_loss"], rel=1e-5)


def test_a_gguf_model_is_evaluated_as_it_is(gguf_arguments: list[str], directory: Path, tmp_path: Path) -> None:
    run.main.__wrapped__([*gguf_arguments, "only_eval=true", "resume=0", f"load_model_path={directory}"])
    row = read_evaluation(tmp_path / "checkpoints" / "run")
    assert row["stage"] == 0


def test_files_that_cannot_be_read_are_one_line(directory: Path, tmp_path: Path) -> None:
    whole = (directory / NAME).read_bytes()
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "short.gguf").write_bytes(whole[:100])

    def resolve(**values: Any) -> RunConfig:
        return sources.resolve_paths(configuration(tmp_path, **values))

    with pytest.raises(CheckpointError, match="nothing.gguf: no such file; .* holds cut.gguf, other.gguf, short.gguf"):
        resolve(gguf_file="nothing.gguf")
    with pytest.raises(CheckpointError, match="holds GGUF files: set gguf_file to one of cut.gguf"):
        resolve(gguf_file=None)
    with pytest.raises(CheckpointError, match="is a GGUF file: set model_id to its directory and gguf_file: cut.gguf"):
        resolve(gguf_file=None, model_id=str(tmp_path / "cut.gguf"))
    tokenizer = sources.load_run_tokenizer(configuration(directory))
    for name in ("cut.gguf", "short.gguf", "other.gguf"):
        config = resolve(gguf_file=name)
        with pytest.raises(UserError) as caught:
            build_model(config, tokenizer, latent_ids(tokenizer, config.method))
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
