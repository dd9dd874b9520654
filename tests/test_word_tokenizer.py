"""The word tokenizer is lossless on ProsQA text, and the model directories load."""

import itertools
import json
from pathlib import Path

import pytest
from conftest import PUBLISHED
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from preprocessing import prosqa, prosqa_symbolic, word_tokenizer

ROOT = Path(__file__).parents[1]
MARKERS = ["<|start-latent|>", "<|end-latent|>", "<|latent|>"]
WORDS = [*prosqa.NAMES, *prosqa.CONCEPTS]
TEXT_MODELS = [*word_tokenizer.WORD_MODELS, *word_tokenizer.PHRASE_MODELS]
ALL_MODELS = [*TEXT_MODELS, *word_tokenizer.SYMBOL_MODELS]
TOKENIZER = word_tokenizer.build_word_tokenizer(WORDS)

words = st.sampled_from([word for word in word_tokenizer.FIXED_WORDS if word != "\n"] + WORDS)
sentences = st.builds(lambda ws, end: " ".join(ws) + end, st.lists(words, min_size=1), st.sampled_from(["", ".", "?"]))
lines = st.lists(sentences, max_size=4).map(" ".join)


def parts_of(record: prosqa.Record) -> list[str]:
    steps = [step + "\n" for step in record["steps"]]
    return [record["question"] + "\n", *steps, "### " + record["answer"]]


@given(st.lists(lines))
def test_text_survives_and_parts_may_be_encoded_one_by_one(text_lines):
    parts = [line + "\n" for line in text_lines]
    text = "".join(parts)
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert list(itertools.chain(*map(TOKENIZER.encode, parts))) == ids


@given(st.lists(words, min_size=1), st.lists(st.sampled_from([" ", "\n"]), min_size=1))
def test_a_word_has_one_id_wherever_it_stands(text_words, gaps):
    text = "".join(word + gaps[i % len(gaps)] for i, word in enumerate(text_words))
    newline = TOKENIZER.encode("\n")
    ids = [token for token in TOKENIZER.encode(text.strip(" ")) if [token] != newline]
    assert ids == [TOKENIZER.encode(word)[0] for word in text_words]


def test_every_word_and_sign_is_one_token():
    for word in [*WORDS, *word_tokenizer.FIXED_WORDS]:
        assert len(TOKENIZER.encode(word)) == 1
    for sign in word_tokenizer.PUNCTUATION:
        assert TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(f"Tom{sign}"))[1:] == [sign]
    assert TOKENIZER.unk_token_id not in TOKENIZER.encode(" ".join(WORDS))
    assert TOKENIZER.encode("zzz") == [TOKENIZER.unk_token_id]


def test_phrases_are_one_token_each_and_lossless():
    tokenizer = word_tokenizer.build_phrase_tokenizer(prosqa.NAMES, prosqa.CONCEPTS)
    records = [*prosqa.prosqa_records(5, 0, "test"), *prosqa.chain_records(20, 0, "test")]
    for record in records:
        parts = parts_of(record)
        ids = tokenizer.encode("".join(parts))
        assert tokenizer.unk_token_id not in ids
        assert list(itertools.chain(*map(tokenizer.encode, parts))) == ids
        assert tokenizer.decode(ids) == "".join(parts)
        assert len(tokenizer.encode(parts[1])) == 3  # who, what, newline
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Is Tom a lempus or yumpus?"))[2:] == ["▁a▁lempus", "▁or▁yumpus?"]
    assert (
        json.loads((ROOT / "configs" / "llama_quick" / "tokenizer.json").read_text())["model"]["vocab"] == tokenizer.get_vocab()
    )


def test_symbols_are_one_token_each_and_lossless_and_forty_with_the_markers():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "gpt2_symbolic")
    for record in prosqa.prosqa_records(20, 0, "test", symbolic=True):
        parts = parts_of(record)
        ids = tokenizer.encode("".join(parts))
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == "".join(parts)
        assert list(itertools.chain(*map(tokenizer.encode, parts))) == ids
        assert len(ids) == 3 * len(record["edges"]) + 5 + len(record["steps"]) + 2  # a line break makes no token
        assert tokenizer.decode(ids[-len(record["steps"]) - 2 :]) == "".join(parts[1:])
    for symbol in (*prosqa_symbolic.NODES, prosqa_symbolic.EDGE, prosqa_symbolic.OPTIONS, prosqa_symbolic.ROOT):
        assert len(tokenizer.encode(symbol)) == 1
        assert tokenizer.unk_token_id not in tokenizer.encode(symbol)
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    assert len(tokenizer) == 40
    text = "n4 n7 <e> <q> n1 n2 <r> n4<|start-latent|><|latent|><|end-latent|>n7\nn12\n### n2"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_token_id], skip_special_tokens=True).endswith("### n2")
    assert all("▁\n" not in tokenizer.convert_ids_to_tokens(tokenizer.encode(one)) for one in ("n4\n", "n4\nn5", "\n### n5"))


def test_the_symbolic_model_is_the_papers():
    config = AutoConfig.from_pretrained(ROOT / "configs" / "gpt2_symbolic")
    assert (config.model_type, config.n_layer, config.n_head, config.n_embd) == ("gpt2", 2, 8, 768)
    longest = 3 * max(len(record["edges"]) for record in prosqa.prosqa_records(200, 0, "test", symbolic=True)) + 50
    assert config.n_positions > 2 * longest


def test_a_step_and_an_answer_alone():
    text = "Tom is a terpus.\nEvery terpus is a brimpus.\n### Tom is a brimpus."
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode("### Tom is a brimpus.")) == "### Tom is a brimpus."
    assert len(TOKENIZER.encode("### Tom is a brimpus.")) == 6


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_markers_stay_whole_beside_the_words(name):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / name)
    first = len(tokenizer)
    assert tokenizer.add_tokens(MARKERS) == 3
    question, *steps, answer = parts_of(prosqa.prosqa_records(1, 0, "test")[0])
    text = question + "<|start-latent|><|latent|><|latent|><|end-latent|>" + "".join(steps[2:]) + answer
    ids = tokenizer.encode(text)
    assert [token for token in ids if token >= first] == [first, first + 2, first + 2, first + 1]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_directories_load_and_fit_together(name):
    directory = ROOT / "configs" / name
    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == config.eos_token_id == config.pad_token_id
    if name in TEXT_MODELS:
        assert (tokenizer.encode("Tom is") == TOKENIZER.encode("Tom is")) == (name in word_tokenizer.WORD_MODELS)
    model = AutoModelForCausalLM.from_config(config)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == config.tie_word_embeddings
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), config.hidden_size)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_files_in_configs_are_what_the_command_writes(name, tmp_path):
    word_tokenizer.main(["--out", str(tmp_path)])
    for made in (tmp_path / name).iterdir():
        assert json.loads((ROOT / "configs" / name / made.name).read_text()) == json.loads(made.read_text())


def test_ids_do_not_move():
    first = {"<unk>": 0, "<eos>": 1, ".": 2, "?": 3, "\n": 4, "###": 5, "Every": 16, "Alex": 21, "bompus": 38}
    for word, index in first.items():
        assert TOKENIZER.get_vocab()[word if index < 4 else word_tokenizer.SPACE + word] == index
    assert len(TOKENIZER) == 76


@pytest.mark.published_data("prosqa_official_valid.json")
def test_the_published_valid_file_has_no_unknown_word():
    for record in json.loads((PUBLISHED / "prosqa_official_valid.json").read_text()):
        parts = parts_of(record)
        ids = TOKENIZER.encode("".join(parts))
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == "".join(parts)
        assert list(itertools.chain(*map(TOKENIZER.encode, parts))) == ids


def test_an_unwritable_directory_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        word_tokenizer.main(["--out", str(tmp_path / "file")])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
