"""Loading models and tokenizers: new tokens, published single-file checkpoints, and what cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from conftest import write_json
from naive import naive_generate
from same_run import equal
from tiny_models import assert_near, tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation

from coconut import Coconut
from config import RunConfig
from dataset import MyCollator, get_cot_latent_dataset
from methods import END_LATENT, LATENT, START_LATENT
from systems import checkpoint, models, sources
from systems.checkpoint import Facts, TrainingState
from systems.models import LatentIds, build_model, initialise_markers, latent_ids, load_tokenizer
from systems.tokens import get_dataset
from utils import UserError

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


def test_markers_start_from_the_token_that_is_asked_for(tmp_path: Path) -> None:
    gpt2(5).save_pretrained(tmp_path)
    make_tokenizer(WORDS).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    word = tokenizer.decode([3]).strip()
    weight = build(configuration(tmp_path, marker_init=word)).base_causallm.get_input_embeddings().weight
    assert torch.equal(weight[5:8], weight[3].expand(3, -1))
    with pytest.raises(UserError, match="marker_init: 'no word' is 2 tokens of this tokenizer, or an unknown one"):
        build(configuration(tmp_path, marker_init="no word"))


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


def test_ids_that_no_text_contains_where_the_vocabulary_has_holes() -> None:
    ids = latent_ids(make_tokenizer({"a": 0, "b": 1, "<eos>": 2, "<unk>": 3, "c": 9}), "cot")
    assert sorted(ids[:3]) == [10, 11, 12]


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


def test_a_file_with_all_weights_needs_no_others(saved: Path, tmp_path: Path) -> None:
    """The model's directory is a configuration and a tokenizer alone, as those in configs/."""
    for path in saved.glob("*.safetensors"):
        path.unlink()
    torch.save(gpt2(8).state_dict(), tmp_path / "weights.pt")
    model = build(configuration(saved, load_model_path=str(tmp_path / "weights.pt"), only_eval=True))
    assert torch.equal(model.base_causallm.transformer.wte.weight, gpt2(8).transformer.wte.weight)
    with pytest.raises(UserError, match="a configuration without weights; with from_scratch: True run.py starts"):
        build(configuration(saved))


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (7, torch.ones(1)),
        (("transformer", 1), torch.ones(1)),
        ("transformer.wte.weight", torch.tensor(1.0)),
        ("transformer.wte.weight", torch.ones(0, 16)),
    ],
)
def test_a_state_dict_of_odd_keys_or_tensors_is_one_line(saved: Path, tmp_path: Path, key: Any, value: torch.Tensor) -> None:
    path = tmp_path / "odd.pt"
    torch.save({**gpt2(5).state_dict(), key: value}, path)
    with pytest.raises(UserError, match="odd.pt") as caught:
        build(configuration(saved, load_model_path=str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["cot", "coconut"])
def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(saved: Path, method: str) -> None:
    config = configuration(saved, method=method)
    tokenizer = load_tokenizer(config.model_id)
    tokenizer.add_tokens(["surplus"])
    ids = latent_ids(tokenizer, method)
    with pytest.raises(UserError, match="does not belong to the model: it has 'surplus' as token 5, but .* end at 4"):
        build_model(config, tokenizer, ids)


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
    with pytest.raises(UserError, match="a configuration without weights; with from_scratch: True"):
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
    assert len({tuple(row.tolist()) for row in first}) == 98  # the three markers start alike, as in a pretrained model


def test_pure_bfloat16_casts_the_weights(saved: Path) -> None:
    assert build(configuration(saved, bf16="pure")).base_causallm.transformer.wte.weight.dtype == torch.bfloat16
    assert build(configuration(saved, bf16=True)).base_causallm.transformer.wte.weight.dtype == torch.float32


# --- families ---

RECORDS = [
    {"question": "Tom has 2 apples and buys 3. How many?", "steps": ["<<2+3=5>>"], "answer": "5"},
    {"question": "Half of 8, and 1 more?", "steps": ["<<8/2=4>>", "<<4+1=5>>"], "answer": "5"},
    {"question": "3 times 3?", "steps": ["<<3*3=9>>"], "answer": "9"},
]
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Family(NamedTuple):
    """A tiny model with the traits of a family: its tokenizer's special tokens, "<<" as one token or not, tied or not."""

    model: str
    overrides: dict[str, Any]
    bos: bool = False
    pad: bool = False
    calculator_sign: bool = True
    template: bool = False


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPE = {"rope_scaling" if transformers.__version__.startswith("4.") else "rope_parameters": LLAMA3_ROPE}
CASES = {
    "GPT-2": Family("gpt2", {}),
    "Llama 2": Family("llama", {"tie_word_embeddings": False}, bos=True, calculator_sign=False),
    "Llama 3.2": Family("llama", {"tie_word_embeddings": True, **ROPE}, bos=True),
    "Qwen2": Family("qwen2", {"tie_word_embeddings": True}, pad=True, template=True),
    "Qwen3": Family("qwen3", {"tie_word_embeddings": False}, pad=True, template=True),
    "DeepSeek-R1-Distill-Qwen": Family("qwen2", {"tie_word_embeddings": False}, bos=True, pad=True, template=True),
    "Mistral": Family("mistral", {"tie_word_embeddings": False}, bos=True, calculator_sign=False),
    "Gemma": Family("gemma", {}, bos=True, pad=True),
    "Gemma 2": Family("gemma2", {}, bos=True, pad=True, calculator_sign=False),
    "Gemma 3": Family("gemma3_text", {}, bos=True, pad=True),
    "Phi": Family("phi", {}),
    "Phi 3": Family("phi3", {}, bos=True, pad=True),
    "gpt-oss": Family("gpt_oss", {}, pad=True, template=True),
}


def byte_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose one merge is "<<"."""
    words = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("<", "<")] if family.calculator_sign else []
    words |= {"".join(merge): len(words) for merge in merges}
    inner = Tokenizer(BPE(words, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>"} | ({"bos_token": "<bos>"} if family.bos else {})
    special |= {"pad_token": "<pad>"} if family.pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if family.bos:
        bos = ("<bos>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    tokenizer.chat_template = TEMPLATE if family.template else None
    return tokenizer


def saved_family(name: str, directory: Path) -> RunConfig:
    family = CASES[name]
    tokenizer = byte_tokenizer(family)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "n_positions" if name == "GPT-2" else "max_position_embeddings": 128}
    base, _ = tiny_model(family.model, dtype=torch.float32, **{**sizes, **ids, **family.overrides})
    base.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return configuration(directory, max_latent_stage=2, c_thought=2)


def stage_batch(config: RunConfig, tokenizer: PreTrainedTokenizerFast, ids: LatentIds, path: Path) -> dict[str, torch.Tensor]:
    """The three records at stage 1, as training sees them."""
    examples = get_cot_latent_dataset(1, get_dataset(path, tokenizer), config, ids.start, ids.latent, ids.end)
    batch = MyCollator(tokenizer, ids.latent)(examples.__getitems__([0, 1, 2]))
    del batch["idx"]
    return batch


def assert_new_rows_start_as_designed(model: Coconut, ids: LatentIds, tokenizer: Any, family: Family) -> None:
    like = tokenizer.encode("<<", add_special_tokens=False)
    assert (len(like) == 1) == family.calculator_sign
    base = model.base_causallm
    for weight in (base.get_input_embeddings().weight, base.get_output_embeddings().weight):
        expected = weight[like[0]] if family.calculator_sign else weight[: ids.start].mean(dim=0)
        for row in (ids.start, ids.end, ids.latent):
            torch.testing.assert_close(weight[row], expected)


def trained_losses(model: Coconut, batch: dict[str, torch.Tensor], ids: LatentIds, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labelled_only=True).loss
        optimizer.zero_grad()
        loss.backward()
        gradient = model.base_causallm.get_input_embeddings().weight.grad
        assert gradient[ids.start].any()
        assert gradient[ids.end].any()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", CASES)
def test_a_family_trains_generates_and_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    """New tokens, steps of training, greedy tokens of the naive reference, and the logits of a saved and loaded model."""
    config, family = saved_family(name, tmp_path / "base"), CASES[name]
    tokenizer = load_tokenizer(config.model_id)
    ids = latent_ids(tokenizer, config.method)
    model = build_model(config, tokenizer, ids)
    assert tokenizer.convert_ids_to_tokens([ids.start, ids.end, ids.latent]) == [START_LATENT, END_LATENT, LATENT]
    assert (tokenizer.bos_token_id is not None, tokenizer.pad_token_id is not None) == (family.bos, family.pad)
    assert_new_rows_start_as_designed(model, ids, tokenizer, family)
    batch = stage_batch(config, tokenizer, ids, write_json(tmp_path / "data.json", RECORDS))
    if family.bos:  # once, before the question; not again before steps and answer
        assert (batch["input_ids"] == tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1, 1]
    losses = trained_losses(model, batch, ids)
    assert losses[-1] < losses[0]

    model.eval()
    prompt = torch.tensor([[*tokenizer("1 and 2?\n")["input_ids"], ids.start, ids.latent, ids.latent, ids.end]])
    generated = model.generate(prompt, max_new_tokens=4)
    assert torch.equal(generated, naive_generate(model.base_causallm, ids, prompt, 4))

    facts = Facts("coconut", 1, 2, 2, True, 1, None, ids.start, ids.end, ids.latent, ids.eos)
    checkpoint.save(tmp_path / "saved", model, torch.optim.AdamW(model.parameters()), tokenizer, facts, TrainingState())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert_near(again(generated).logits, model.base_causallm(generated).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == len(tokenizer)
    loaded = build(configuration(tmp_path / "base", load_model_path=str(tmp_path / "saved")))
    assert equal(dict(loaded.state_dict()), dict(model.state_dict()))  # the markers' rows are not made anew
    assert_near(loaded(prompt).logits, model(prompt).logits)


def test_a_chat_template_wraps_the_question_once(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CASES["DeepSeek-R1-Distill-Qwen"])
    path = write_json(tmp_path / "data.json", RECORDS)
    row, plain = get_dataset(path, tokenizer, chat_template=True)[0], get_dataset(path, tokenizer)[0]
    assert tokenizer.decode(row["question_tokenized"]) == f"<|user|>{RECORDS[0]['question']}<|end|><|assistant|>"
    assert tokenizer.decode(plain["question_tokenized"]) == f"<bos>{RECORDS[0]['question']}\n"
    assert (row["steps_tokenized"], row["answer_tokenized"]) == (plain["steps_tokenized"], plain["answer_tokenized"])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; set chat_template: False"):
        get_dataset(path, tokenizer, chat_template=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('system turn needed') }}", "system turn needed"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_chat_template_that_fails_is_one_line_at_the_start(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = byte_tokenizer(CASES["DeepSeek-R1-Distill-Qwen"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"chat template of .*: cannot be used for a question: {message}"):
        get_dataset(write_json(tmp_path / "data.json", RECORDS), tokenizer, chat_template=True)


# --- what is no causal language model ---


def test_encoders_vision_models_and_others_are_one_line(tmp_path: Path) -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = transformers.BertConfig(vocab_size=5, max_position_embeddings=16, **tiny)
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    vit = transformers.ViTConfig(image_size=8, patch_size=4, **tiny)
    transformers.ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    transformers.T5Config(vocab_size=5, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        make_tokenizer(WORDS).save_pretrained(tmp_path / name)
    for name, message in {
        "bert": "family 'bert' reads in both directions .an encoder.; a causal language model is needed",
        "vit": "a model of family 'vit' is not a causal language model, which is needed",
        "t5": "a model of family 't5' is not a causal language model, which is needed",
    }.items():
        with pytest.raises(UserError, match=message):
            build(configuration(tmp_path / name))


def test_directories_that_lack_a_part_or_bring_code_are_one_line(saved: Path, tmp_path: Path) -> None:
    make_tokenizer(WORDS).save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match="words holds neither a model .config.json. nor a whole checkpoint_<epoch>"):
        sources.resolve_paths(configuration(tmp_path / "words"))
    gpt2(5).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "model"))
    config = json.loads((saved / "config.json").read_text())
    write_json(saved / "config.json", {**config, "model_type": "foo"})
    with pytest.raises(UserError, match="base: .*foo"):
        build(configuration(saved))
    code = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    write_json(saved / "config.json", {**config, "model_type": "foo", "auto_map": code})
    with pytest.raises(UserError, match="it brings its own code, which is not run: set trust_remote_code: True"):
        build(configuration(saved))


PER_LAYER = {"vocab_size_per_layer_input": 5, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
GEMMA_3N = {"altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0]}


@pytest.mark.parametrize(("family", "more"), [("gemma3n_text", PER_LAYER | GEMMA_3N), ("gemma4_text", PER_LAYER)])
def test_a_family_that_reads_more_than_embeddings_is_refused(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Embeddings of each layer are looked up by the token, and a thought is none."""
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such family")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "layer_types": ["full_attention"],
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.AutoConfig.for_model(family, vocab_size=5, **sizes, **heads, **more)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path)
    make_tokenizer(WORDS).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads more of a token than its embedding|cannot be used for latent thoughts"):
        build(configuration(tmp_path, method="cot"))


def test_a_family_without_a_key_value_cache_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    config = transformers.AutoConfig.for_model("mamba", vocab_size=5, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer(WORDS).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="keeps no key-value cache|cannot be used for latent thoughts"):
        build(configuration(tmp_path))


def test_gguf_files_are_refused_where_transformers_reads_their_special_tokens_wrongly(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.transformers, "__version__", "4.56.0")
    with pytest.raises(UserError, match="gguf_file needs transformers 5"):
        load_tokenizer(str(saved), "tiny.gguf")


def test_gpt2s_activation_is_one_kernel_and_the_same_but_for_rounding(saved: Path) -> None:
    model = build(configuration(saved))
    plain = GPT2LMHeadModel.from_pretrained(saved)
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert any(isinstance(module, NewGELUActivation) for module in plain.modules())
    tokens = torch.tensor([[3, 4, 2, 3]])
    torch.testing.assert_close(model.eval()(tokens).logits[..., :5], plain.eval()(tokens).logits, rtol=1e-5, atol=1e-6)
