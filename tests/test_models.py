"""Loading models and tokenizers: new tokens, published single-file checkpoints, and what cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast

from coconut import Coconut
from dataset import END_LATENT, LATENT, START_LATENT
from models import build_model, initialise_markers, latent_ids, load_tokenizer
from utils import RunConfig, UserError

WORDS = {"<unk>": 0, "<eos>": 1, "<<": 2, "a": 3, "b": 4}


def make_tokenizer(words: dict[str, int]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=32))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny GPT-2 with weights and a tokenizer that knows "<<"."""
    directory = tmp_path / "base"
    gpt2(5).save_pretrained(directory)
    make_tokenizer(WORDS).save_pretrained(directory)
    return directory


def configuration(model_id: Path, **values: Any) -> RunConfig:
    return RunConfig(
        **{"name": "x", "model_id": str(model_id), "method": "coconut", "train_path": "t", "val_path": "v", **values}
    )


def build(config: RunConfig) -> Coconut:
    tokenizer = load_tokenizer(config.model_id)
    return build_model(config, tokenizer, latent_ids(tokenizer, config.method))


def test_new_tokens_start_from_the_embedding_of_the_calculator_sign(saved: Path) -> None:
    model = build(configuration(saved))
    weight = model.base_causallm.get_input_embeddings().weight
    assert weight.shape[0] == 8
    assert (model.start_latent_id, model.end_latent_id, model.latent_token_id) == (5, 6, 7)
    assert all(torch.equal(weight[row], weight[2]) for row in (5, 6, 7))
    assert model.base_causallm.get_output_embeddings().weight is weight  # GPT-2's are tied, and stay tied


def test_new_tokens_start_from_the_mean_where_there_is_no_such_token(tmp_path: Path) -> None:
    words = {"<unk>": 0, "<eos>": 1, "a": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer(words).save_pretrained(tmp_path)
    model = build(configuration(tmp_path))
    for module in (model.base_causallm.get_input_embeddings(), model.base_causallm.get_output_embeddings()):
        torch.testing.assert_close(module.weight[3:6], module.weight[:3].mean(dim=0).expand(3, -1))


def test_a_padded_vocabulary_is_not_shrunk(tmp_path: Path) -> None:
    gpt2(64).save_pretrained(tmp_path)
    make_tokenizer(WORDS).save_pretrained(tmp_path)
    weight = build(configuration(tmp_path)).base_causallm.get_input_embeddings().weight
    assert weight.shape[0] == 64
    assert torch.equal(weight[5], weight[2])


def test_methods_without_markers_leave_the_model_alone(saved: Path) -> None:
    model = build(configuration(saved, method="cot"))
    assert model.base_causallm.get_input_embeddings().weight.shape[0] == 5
    assert model.latent_token_id == 7  # an id that no text contains


def test_trained_markers_are_not_initialised_again(saved: Path, tmp_path: Path) -> None:
    config = configuration(saved)
    tokenizer = load_tokenizer(str(saved))
    ids = latent_ids(tokenizer, "coconut")
    model = build_model(config, tokenizer, ids)
    with torch.no_grad():
        model.base_causallm.get_input_embeddings().weight[5:8] += 1
    trained = model.base_causallm.get_input_embeddings().weight.clone()
    directory = tmp_path / "trained"
    model.base_causallm.save_pretrained(directory)
    again = build(configuration(saved, load_model_path=str(directory)))
    assert torch.equal(again.base_causallm.get_input_embeddings().weight, trained)
    initialise_markers(model.base_causallm, tokenizer, (START_LATENT, END_LATENT, LATENT))
    assert torch.equal(model.base_causallm.get_input_embeddings().weight, trained)


@pytest.mark.parametrize("prefix", ["", "base_causallm.", "module.base_causallm."])
@pytest.mark.parametrize("rows", [5, 8])
def test_published_single_file_checkpoints_load(saved: Path, tmp_path: Path, prefix: str, rows: int) -> None:
    """5 rows: a CoT checkpoint, made before the markers; 8 rows: a Coconut checkpoint, whose markers are trained."""
    other = gpt2(rows)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    state = {prefix + key: value for key, value in other.state_dict().items()}
    state[prefix + "transformer.h.0.attn.bias"] = torch.ones(1)  # a buffer of old GPT-2 checkpoints
    torch.save(state, tmp_path / "checkpoint_33")
    model = build(configuration(saved, load_model_path=str(tmp_path / "checkpoint_33")))
    weight = model.base_causallm.get_input_embeddings().weight
    assert weight.shape[0] == 8
    assert torch.equal(weight[:rows], other.transformer.wte.weight)
    assert torch.equal(model.base_causallm.transformer.h[1].mlp.c_fc.weight, other.transformer.h[1].mlp.c_fc.weight)
    if rows == 5:
        assert torch.equal(weight[7], weight[2])


def test_keys_that_do_not_fit_are_listed(saved: Path, tmp_path: Path) -> None:
    state = gpt2(5).state_dict()
    del state["transformer.h.1.ln_1.weight"]
    state["surprise"] = torch.ones(1)
    state["transformer.ln_f.bias"] = torch.ones(3)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError) as caught:
        build(configuration(saved, load_model_path=str(tmp_path / "bad.pt")))
    assert "missing keys [transformer.h.1.ln_1.weight]" in str(caught.value)
    assert "unexpected keys [surprise]" in str(caught.value)
    assert "wrong shapes [transformer.ln_f.bias]" in str(caught.value)


def test_a_file_that_is_no_state_dict_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="text.pt: not a state dict"):
        build(configuration(saved, load_model_path=str(tmp_path / "text.pt")))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected a mapping from parameter names"):
        build(configuration(saved, load_model_path=str(tmp_path / "list.pt")))


def test_pickled_code_is_not_run(saved: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a state dict"):
        build(configuration(saved, load_model_path=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=5, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="another model: hidden_size is 32, .* has 16"):
        build(configuration(saved, load_model_path=str(tmp_path / "wide")))


def test_what_cannot_be_loaded_is_one_line(saved: Path, tmp_path: Path, model_directory: Path) -> None:
    with pytest.raises(UserError, match="a configuration without weights; set from_scratch: True"):
        build(configuration(model_directory))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    make_tokenizer(WORDS).save_pretrained(tmp_path / "no_eos")
    tokenizer_config = tmp_path / "no_eos" / "tokenizer_config.json"
    tokenizer_config.write_text(tokenizer_config.read_text().replace('"eos_token": "<eos>"', '"eos_token": null'))
    with pytest.raises(UserError, match="has no eos_token"):
        load_tokenizer(str(tmp_path / "no_eos"))


def test_from_scratch_is_seeded_and_has_rows_for_the_markers(model_directory: Path) -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        return build(configuration(model_directory, from_scratch=True)).base_causallm.get_input_embeddings().weight

    first = weights()
    assert torch.equal(first, weights())
    assert first.shape[0] == 100
    assert len({tuple(row.tolist()) for row in first}) == 100  # the markers are random too, not copies


def test_pure_bfloat16_casts_the_weights(saved: Path) -> None:
    assert build(configuration(saved, bf16="pure")).base_causallm.transformer.wte.weight.dtype == torch.bfloat16
    assert build(configuration(saved, bf16=True)).base_causallm.transformer.wte.weight.dtype == torch.float32
