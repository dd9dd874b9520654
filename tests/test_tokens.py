"""Tokens of records: what they are, and how they are kept on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import chain_records, write_json
from test_dataset import RECORD
from transformers import PreTrainedTokenizerFast

from systems import tokens as dataset_module
from systems.tokens import get_dataset
from utils import UserError, get_logger


def test_tokens_are_question_steps_and_answer_with_eos(tokenizer: Any, tmp_path: Path) -> None:
    row = get_dataset(write_json(tmp_path / "data.json", [RECORD]), tokenizer)[0]
    text = "Is Tom a lempus?\nTom is a lempus.\n### Tom is a lempus."
    parts = row["question_tokenized"] + row["steps_tokenized"][0] + row["answer_tokenized"]
    assert parts == [*tokenizer.encode(text), tokenizer.eos_token_id]


def test_words_that_a_tokenizer_does_not_know(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"question": "Is Tom a lempus?", "steps": ["Tom is a lempus."], "answer": "Tom is a lempus."}
    foreign = {"question": "Wie viel ist drei plus vier?", "steps": ["sieben"], "answer": "sieben"}
    monkeypatch.setattr(get_logger(), "propagate", True)
    get_dataset(write_json(tmp_path / "known.json", [known] * 9), tokenizer)
    assert "<unk>" not in caplog.text
    get_dataset(write_json(tmp_path / "mixed.json", [known] * 9 + [foreign]), tokenizer)
    assert re.search(r"mixed.json: \d+% of the tokens are <unk>: the tokenizer was made for other words", caplog.text)
    with pytest.raises(UserError, match=r"foreign.json: \d+% of the tokens are <unk>"):
        get_dataset(write_json(tmp_path / "foreign.json", [foreign]), tokenizer)


def test_max_size_keeps_the_first_records(tokenizer: Any, tmp_path: Path) -> None:
    dataset = get_dataset(write_json(tmp_path / "data.json", chain_records(9)), tokenizer, 4)
    assert dataset["idx"] == [0, 1, 2, 3]


def test_tokens_are_kept_once_and_mapped_into_memory(
    tokenizer: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path / "data.json", chain_records(9))
    first = get_dataset(path, tokenizer)
    assert first.cache_files  # mapped: processes of a node share the memory
    monkeypatch.setattr(dataset_module, "_tokenised", None)  # from here on all comes from the cache
    moved = write_json(tmp_path / "moved.json", chain_records(9))
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    for one in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path / "checkpoint")):
        again = get_dataset(moved, one)
        assert again.to_list() == first.to_list()
        assert again.cache_files
    assert len(list(cache.iterdir())) == 1  # nothing half-written either


def test_other_text_tokenizer_size_or_template_are_other_tokens(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    path = write_json(tmp_path / "data.json", chain_records(9))
    variants = [get_dataset(path, tokenizer), get_dataset(path, tokenizer, 4)]
    tokenizer.chat_template = "{% for message in messages %}Sam {{ message.content }}{% endfor %}"
    variants.append(get_dataset(path, tokenizer, chat_template=True))
    tokenizer.chat_template = "{% for message in messages %}Rex {{ message.content }}{% endfor %}"
    variants.append(get_dataset(path, tokenizer, chat_template=True))
    tokenizer.add_tokens(["lempus."])
    variants.append(get_dataset(path, tokenizer))
    variants.append(get_dataset(write_json(path, chain_records(8)), tokenizer))
    assert len(list(cache.iterdir())) == len(variants)
    assert len({json.dumps(variant.to_list()) for variant in variants}) == len(variants)


def test_a_damaged_cache_is_made_anew(tokenizer: Any, tmp_path: Path, cache: Path, capsys: Any) -> None:
    path = write_json(tmp_path / "data.json", chain_records(9))
    first = get_dataset(path, tokenizer).to_list()
    for damage in ("*.arrow", "state.json"):
        file = next(next(cache.iterdir()).glob(damage))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert get_dataset(path, tokenizer).to_list() == first
        assert "damaged, tokenising again" in capsys.readouterr().out
        assert get_dataset(path, tokenizer).to_list() == first
        assert "damaged" not in capsys.readouterr().out


def test_without_a_place_for_the_cache_all_works(tokenizer: Any, tmp_path: Path, cache: Path, capsys: Any) -> None:
    path = write_json(tmp_path / "data.json", chain_records(9))
    cache.parent.write_text("a file, where a directory should be made")
    assert len(get_dataset(path, tokenizer)) == 9
    assert "the tokens cannot be kept" in capsys.readouterr().out


def test_a_tokenizer_that_merges_across_joints_is_reported(tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    def merging(texts: Any, add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": [7] if isinstance(texts, str) else [[7] for _ in texts]}

    methods = {
        "__call__": staticmethod(merging),
        "decode": staticmethod(lambda ids: ""),
        "eos_token_id": 1,
    } | dict.fromkeys(("unk_token_id", "bos_token_id", "pad_token_id"))
    stub = type("Tokenizer", (), methods)()
    get_dataset(write_json(tmp_path / "data.json", [RECORD]), stub)
    assert "joins question, steps and answer differently" in capsys.readouterr().out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokens are kept, of small files too."""
    monkeypatch.setattr(dataset_module, "CACHED_FROM", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "coconut"
