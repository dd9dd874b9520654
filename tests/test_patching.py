"""Patching the key-value cache: which columns and layers come from which question, and what is answered then."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import chain_records
from test_run import start
from transformers import DynamicCache

from coconut import Coconut
from experiments.patching import (
    NEW_TOKENS,
    Patch,
    _answer,
    _patched,
    _think,
    answers_by_patch,
    last_word,
    main,
    pairs_of,
    patch_checkpoints,
    patches,
)
from utils import UserError


@pytest.fixture
def checkpoint(run_arguments: list[str], tmp_path: Path) -> Path:
    start(run_arguments)
    return tmp_path / "checkpoints" / "run" / "checkpoint_3"


def equal_columns(one: DynamicCache, two: DynamicCache) -> list[torch.Tensor]:
    """By layer, whether keys and values are the same, (T,)."""
    return [
        torch.stack([(getattr(a, name) == getattr(b, name)).all(dim=1).all(dim=-1)[0] for name in ("keys", "values")]).all(
            dim=0
        )
        for a, b in zip(one.layers, two.layers, strict=True)
    ]


@torch.no_grad()
def test_parts_of_the_cache_come_from_the_question_that_is_named(checkpoint: Path) -> None:
    model = Coconut.from_pretrained(checkpoint)
    records = chain_records(7)
    pair = pairs_of(model, records)[0]
    own, other = (_think(model, [prompt]) for prompt in pair.prompts)
    thoughts = pair.prompts[0].count(model.latent_token_id)
    question = len(pair.prompts[0]) - thoughts
    assert thoughts == 2

    def from_other(patch: Patch) -> list[list[bool]]:
        """By layer and column."""
        cache = _patched(model, patch, own, other, thoughts)
        before, after = equal_columns(own.cache, other.cache), equal_columns(cache, other.cache)
        return [(new & ~old).tolist() for old, new in zip(before, after, strict=True)]

    assert not any(map(any, from_other(Patch("nothing"))))
    for column, layer in ((question, 0), (question + 1, 1)):
        changed = from_other(Patch("one", thoughts=(column - question,), layers=(layer,)))
        assert [(number, place) for number, row in enumerate(changed) for place, new in enumerate(row) if new] == [
            (layer, column)
        ]
    everything = from_other(Patch("both", question=True, thoughts=None))
    assert all(everything[layer][place] for layer in range(len(everything)) for place in (question, question + 1))
    assert any(everything[0][:question])
    assert not any(from_other(Patch("question", question=True))[0][question:])


@torch.no_grad()
def test_answers_are_those_of_the_model(checkpoint: Path) -> None:
    """Without a patch its own, with the whole cache those to the other question; anew: against passes without a cache."""
    model = Coconut.from_pretrained(checkpoint)
    records = chain_records(7)
    by_prompt = {
        tuple(pair.prompts[0]): last_word(model.answer(record["question"], NEW_TOKENS))
        for record, pair in zip(records, pairs_of(model, records), strict=True)
    }
    for pair in pairs_of(model, records):
        own, other = (_think(model, [prompt]) for prompt in pair.prompts)
        assert _answer(model, _patched(model, Patch("nothing"), own, other, 2), 1) == [by_prompt[tuple(pair.prompts[0])]]
        both = Patch("both", question=True, thoughts=None)
        assert _answer(model, _patched(model, both, own, other, 2), 1) == [by_prompt[tuple(pair.prompts[1])]]
        anew = _patched(model, Patch("anew", thoughts=None, recomputed=True), own, other, 2)
        embeds = torch.cat([own.inputs_embeds[:, :-2], other.inputs_embeds[:, -2:]], dim=1)
        expected = model.base_causallm(inputs_embeds=embeds, use_cache=True).past_key_values
        for layer, naive in zip(anew.layers, expected.layers, strict=True):
            torch.testing.assert_close(layer.values, naive.values, rtol=1e-5, atol=1e-6)


def test_pauses_are_patched_as_pauses(run_arguments: list[str], tmp_path: Path) -> None:
    """In their places stand the method's own tokens, and no state is fed back; without markers there is no place."""
    start(run_arguments, "method=pause_as_thought", "name=paused")
    model = Coconut.from_pretrained(tmp_path / "checkpoints" / "paused")
    [pair, *_] = pairs = pairs_of(model, chain_records(7))
    assert pair.prompts[0][-2:] == [model.trained.tokenizer.convert_tokens_to_ids("<pause>")] * 2
    found = answers_by_patch(model, pairs)
    assert {len(one) for one in found.values()} == {len(pairs)}
    start(run_arguments, "method=pause", "name=bare")
    with pytest.raises(UserError, match=r"method pause at stage \d has no thoughts between markers"):
        pairs_of(Coconut.from_pretrained(tmp_path / "checkpoints" / "bare"), chain_records(7))


def test_command_writes_shares_over_checkpoints(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, data_file = tmp_path / "out", tmp_path / "valid.json"
    given = ["patching", str(checkpoint), str(checkpoint), "--data", str(data_file), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    main()
    written = json.loads((out / "patching.json").read_text())["patches"]
    assert list(written) == [patch.about for patch in patches(2, 2)]
    for sides in written.values():
        assert len(sides["other"]["seeds"]) == 2
        assert sides["other"]["mean"] + sides["own"]["mean"] <= 100
    assert written["nothing"]["own"]["mean"] == written["keys and values of both"]["other"]["mean"]
    assert "keys and values of thought 2" in (out / "patching.md").read_text()
    with pytest.raises(UserError, match="no two of the first 1 questions"):
        patch_checkpoints([str(checkpoint)], data_file, 1)
    with pytest.raises(UserError, match="no questions to patch"):
        patch_checkpoints([str(checkpoint)], data_file, 0)
