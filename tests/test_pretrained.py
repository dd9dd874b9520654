"""Checkpoints from Python: from_pretrained, answer, save_pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import chain_records, read_rows
from safetensors.torch import load_file
from test_run import start
from tiny_models import tiny_model

from coconut import Coconut
from thoughts import ThoughtMap
from utils import UserError


@pytest.mark.parametrize(
    "more", [["thought_map=projection"], ["pad_latent_to_max=false"], ["method=cot"], ["method=pause"]], ids=str
)
def test_round_trip_and_answers_of_an_evaluation(run_arguments: list[str], tmp_path: Path, more: list[str]) -> None:
    start(run_arguments, "num_epochs=3", *more, "eval_latents=max" if more[0] != "method=cot" else "eval_latents=gold")
    run = tmp_path / "checkpoints" / "run"
    model = Coconut.from_pretrained(run)
    assert not model.training
    for record, row in zip(chain_records(7), read_rows(run / "predictions_3.jsonl"), strict=True):
        text, thoughts = model.answer(record["question"], max_new_tokens=8, return_thoughts=True)
        assert text == row["output"]
        assert len(thoughts) == (0 if more[0].startswith("method") else 2)
    model.save_pretrained(tmp_path / "again")
    newest = run / "checkpoint_3"
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in newest.iterdir()} - {
        "training_state.pt"
    }
    for path in newest.glob("*.safetensors"):
        one, two = load_file(path), load_file(tmp_path / "again" / path.name)
        assert all(torch.equal(two[name], value) for name, value in one.items())
    assert json.loads((tmp_path / "again" / "coconut.json").read_text()) == json.loads((newest / "coconut.json").read_text())
    question = chain_records(1)[0]["question"]
    assert Coconut.from_pretrained(tmp_path / "again").answer(question, 8) == model.answer(question, 8)
    best = json.loads(Coconut.from_pretrained(f"{run}@best").trained.config.model_dump_json())["load_model_path"]
    assert Path(best).parent == run
    with pytest.raises(UserError, match="again is there already"):
        model.save_pretrained(tmp_path / "again")


def test_questions_and_numbers_that_make_no_sense(
    run_arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(run_arguments)
    model = Coconut.from_pretrained(tmp_path / "checkpoints" / "run")
    for latents in (-1, 2.5, "3", None):
        with pytest.raises(UserError, match=f"latents: {latents!r}: a whole number of at least 0, or 'max'"):
            model.answer("Is Tom a lempus?", latents=latents)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the question holds <|latent|>, which stands for a thought"):
        model.answer("Is Tom <|latent|> a lempus?")
    start(run_arguments, "method=cot", "name=cot")
    without = Coconut.from_pretrained(tmp_path / "checkpoints" / "cot")
    assert without.answer("Is Tom a lempus?", max_new_tokens=2, latents=0) == without.answer(
        "Is Tom a lempus?", max_new_tokens=2
    )
    with pytest.raises(UserError, match="latents: 2: a model trained with method cot has no latents"):
        without.answer("Is Tom a lempus?", latents=2)
    with pytest.raises(UserError, match=r"the question: \d+% of the tokens are <unk>"):
        model.answer("Welches Wort kennt er davon?")


def test_another_thought_map_is_saved_as_what_it_is(run_arguments: list[str], tmp_path: Path) -> None:
    start(run_arguments, "thought_map=norm")
    model = Coconut.from_pretrained(tmp_path / "checkpoints" / "run")
    model.thought_map = ThoughtMap()
    model.save_pretrained(tmp_path / "plain")
    again = Coconut.from_pretrained(tmp_path / "plain")
    assert type(again.thought_map) is ThoughtMap
    start(
        run_arguments, "method=pause_as_thought", "from_scratch=false", f"load_model_path={tmp_path / 'plain'}", "name=pauses"
    )


def test_another_number_of_latents(run_arguments: list[str], tmp_path: Path) -> None:
    start(run_arguments)
    model = Coconut.from_pretrained(tmp_path / "checkpoints" / "run" / "checkpoint_3")
    text, thoughts = model.answer("Is Tom a lempus?", max_new_tokens=8, latents=5, return_thoughts=True)
    assert isinstance(text, str)
    assert thoughts.shape == (5, 32)
    assert model.half().answer("Is Tom a lempus?", max_new_tokens=2)


def test_what_is_no_checkpoint_is_one_line(model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of this project: it has no coconut.json"):
        Coconut.from_pretrained(model_directory)
    base, ids = tiny_model("llama")
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
    for use in (lambda: model.answer("?"), lambda: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(UserError, match="load it with Coconut.from_pretrained"):
            use()
