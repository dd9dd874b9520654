"""Probes on planted cases, where the truth is known, and the command on small trained models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_json
from test_models import make_tokenizer
from test_run import start

from experiments import probe
from experiments.probes import PROBES, Probed
from experiments.probes.decoded import decoded
from experiments.probes.forced import forced
from experiments.probes.frontier import frontier
from experiments.probes.geometry import geometry
from preprocessing.prosqa import chain_records
from utils import UserError, load_config

RECORDS = chain_records(60, 0, "test", hops=(2,))
WORDS = sorted({word for record in RECORDS for word in record["question"].replace(".", " . ").replace("?", " ? ").split()})


def planted(states: torch.Tensor, tokenizer: Any, data: Path) -> Any:
    """A probed model whose states (Q, N, D) are given, and whose head reads their largest entry as the token."""
    steps = [[tokenizer(step)["input_ids"] for step in record["steps"]] for record in RECORDS]
    return SimpleNamespace(
        dataset={"steps_tokenized": steps},
        thoughts=states.shape[1],
        data=data,
        evaluator=SimpleNamespace(tokenizer=tokenizer),
        model=SimpleNamespace(project=lambda states: states),
        states=lambda: iter([(list(range(len(RECORDS))), states)]),
    )


class Dataset(dict):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return len(RECORDS)


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer({word: number for number, word in enumerate(WORDS)})


def finds(tokenizer: Any, record: dict[str, Any], step: int) -> int:
    """The token of the concept that a step arrives at."""
    return int(tokenizer(record["steps"][step].rstrip(".").split()[-1])["input_ids"][0])


def test_decoded_finds_planted_steps_and_nothing_where_they_are_shuffled(tokenizer: Any, tmp_path: Path) -> None:
    """Thought 1 says step 1, thought 2 says step 2 of its own question; then of another one."""
    data = write_json(tmp_path / "test.json", RECORDS)
    states = torch.zeros(len(RECORDS), 2, len(tokenizer))
    for place, record in enumerate(RECORDS):
        for step in (0, 1):
            states[place, step, finds(tokenizer, record, step)] = 5
    probed = planted(states, tokenizer, data)
    found = decoded(probed)
    assert found["thought 1 says what step 1 finds"].mean() == found["thought 2 says what step 2 finds"].mean() == 100
    assert found["thought 1 says what step 2 finds"].mean() == 0
    shuffled = decoded(planted(states[torch.arange(len(RECORDS)) - 1], tokenizer, data))
    assert shuffled["thought 1 says what step 1 finds"].mean() < 20


def test_frontier_tells_distances_and_the_other_chain_apart(tokenizer: Any, tmp_path: Path) -> None:
    data = write_json(tmp_path / "test.json", RECORDS)
    states = torch.zeros(len(RECORDS), 2, len(tokenizer))
    for place, record in enumerate(RECORDS):
        for step in (0, 1):
            states[place, step, finds(tokenizer, record, step)] = 50
    probed = planted(states, tokenizer, data)
    probed.dataset = Dataset(probed.dataset)
    found = frontier(probed)
    assert found["thought 1, distance 1"].mean() == pytest.approx(100)
    assert found["thought 2, distance 2"].mean() == pytest.approx(100)
    assert found["thought 1, unreachable"].mean() == pytest.approx(0, abs=1e-6)
    flat = frontier(SimpleNamespace(**{**vars(probed), "states": lambda: iter([(list(range(len(RECORDS))), 0 * states)])}))
    assert flat["thought 1, distance 1"].mean() == pytest.approx(flat["thought 1, unreachable"].mean())  # the null
    without = write_json(tmp_path / "plain.json", [{"question": "q", "steps": ["s"], "answer": "a"}] * len(RECORDS))
    probed.data = without
    with pytest.raises(UserError, match="its records hold no graph"):
        frontier(probed)


def test_geometry_of_thoughts_that_ignore_the_question() -> None:
    states = torch.tensor([[3.0, 0.0], [0.0, 6.0]]).expand(5, 2, 2)
    found = geometry(SimpleNamespace(thoughts=2, states=lambda: iter([([0, 1, 2, 3, 4], states)])))  # type: ignore[arg-type]
    assert found["thought 2: norm by that of the first"].tolist() == [200] * 5
    assert found["thought 1: cosine with other questions'"] == pytest.approx(100)
    assert found["thought 2: cosine with the one before"] == pytest.approx(0)


def test_forced_asks_with_no_thoughts_and_with_too_many() -> None:
    def predict(model: Any, stage: int, latents: Any) -> list[Any]:
        return [SimpleNamespace(correct=latents == 2, wrote_steps=latents == 0)] * 3

    found = forced(SimpleNamespace(model=None, stage=1, thoughts=2, evaluator=SimpleNamespace(predict=predict)))  # type: ignore[arg-type]
    right = {key: values.mean() for key, values in found.items() if "right" in key}
    assert right == {
        "0 thoughts, right": 0,
        "1 thoughts, right": 0,
        "2 thoughts, right": 100,
        "3 thoughts, right": 0,
        "4 thoughts, right": 0,
    }
    assert found["0 thoughts, wrote steps"].mean() == 100


@pytest.fixture
def trained(run_arguments: list[str], tmp_path: Path) -> dict[str, list[str]]:
    start(run_arguments, "num_epochs=3")
    start(run_arguments, "num_epochs=1", "method=no_cot", "name=control")
    return {"coconut": [str(tmp_path / "checkpoints" / "run")] * 2, "control": [str(tmp_path / "checkpoints" / "control")]}


def test_the_command_probes_every_group_and_goes_on(
    trained: dict[str, list[str]], run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    out = tmp_path / "results"
    arguments = [
        "name=x",
        f"results_path={out}",
        f"data_path={data}",
        "num_questions=5",
        "max_new_tokens=8",
        f"groups={json.dumps(trained)}",
    ]
    config = load_config(probe.ProbeConfig, [*arguments, "probes=[forced, decoded, geometry]"])
    probe.run(config)
    page = (out / "x" / "probes.md").read_text()
    found = json.loads((out / "x" / "probes.json").read_text())["probes"]
    assert len(found["forced"]["0 thoughts, right"]["coconut"]["seeds"]) == 2
    assert set(found["forced"]["0 thoughts, right"]) == {"coconut", "control"}
    assert "Without thoughts, and so without numbers here: control." in page
    assert all((out / "x" / f"{name}.png").stat().st_size > 5000 for name in ("forced", "decoded", "geometry"))

    def never(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Probed, "load", never)
    probe.run(config)
    assert json.loads((out / "x" / "probes.json").read_text())["probes"] == found
    with pytest.raises(AssertionError, match="measured again"):  # other questions
        probe.run(config.model_copy(update={"num_questions": 4}))


def test_states_are_those_before_the_thoughts(trained: dict[str, list[str]], run_arguments: list[str]) -> None:
    """With the map `identity` they are the very thoughts that are fed back."""
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    probed = Probed.load(trained["coconut"][0], Path(data), 5, {"batch_size_eval": 2}, torch.device("cpu"))
    states = torch.cat([own for _, own in probed.states()])
    fed = torch.cat([details.thoughts for _, _, details, _ in probed.passes()])
    assert states.shape[:2] == (5, probed.thoughts)
    torch.testing.assert_close(states, fed)
    assert not np.isnan(states.detach().numpy()).any()


def test_groups_must_have_checkpoints() -> None:
    with pytest.raises(UserError, match="groups: name at least one checkpoint in each"):
        load_config(probe.ProbeConfig, ["name=x", "data_path=d", "groups={a: []}"])
    assert set(PROBES) == {"forced", "decoded", "frontier", "geometry"}
