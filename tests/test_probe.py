"""Probes on planted cases, where the truth is known, and the command on small trained models."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_models import make_tokenizer
from test_run import start

from experiments import probe
from experiments.probes import PROBES, Probed
from experiments.probes.causal import causal, confidence
from experiments.probes.decoded import decoded, final_norm, layers
from experiments.probes.forced import forced
from experiments.probes.frontier import KINDS, frontier, height, ranks, tree
from experiments.probes.geometry import geometry
from experiments.probes.paths import kind_of, paths, stacked
from experiments.probes.reachable import reachable
from preprocessing.prosqa import CONCEPTS, chain_records
from thoughts import gather_thoughts
from utils import UserError, load_config

RECORDS = chain_records(60, 0, "test", hops=(2,))
WORDS = sorted({word for record in RECORDS for word in record["question"].replace(".", " . ").replace("?", " ? ").split()})


def planted(states: torch.Tensor, tokenizer: Any) -> Any:
    """A probed model whose states (Q, N, D) are given, and whose head reads their largest entry as the token."""
    steps = [[tokenizer(step)["input_ids"] for step in record["steps"]] for record in RECORDS]
    return SimpleNamespace(
        dataset={"steps_tokenized": steps, "steps": [record["steps"] for record in RECORDS]},
        thoughts=states.shape[1],
        records=lambda *keys: RECORDS,
        evaluator=SimpleNamespace(tokenizer=tokenizer),
        model=SimpleNamespace(project=lambda states: states, decoder=SimpleNamespace(norm=torch.nn.Identity())),
        states=lambda: iter([(list(range(len(RECORDS))), states)]),
        layers=lambda: iter([(list(range(len(RECORDS))), torch.stack([0 * states, 0 * states, states], dim=1))]),
    )


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer({word: number for number, word in enumerate(WORDS)})


def finds(tokenizer: Any, record: dict[str, Any], step: int) -> int:
    """The token of the concept that a step arrives at."""
    return int(tokenizer(record["steps"][step].rstrip(".").split()[-1])["input_ids"][0])


def saying_steps(tokenizer: Any) -> torch.Tensor:
    """States in which thought 1 says what step 1 finds, and thought 2 what step 2 finds."""
    states = torch.zeros(len(RECORDS), 2, len(tokenizer))
    for place, record in enumerate(RECORDS):
        for step in (0, 1):
            states[place, step, finds(tokenizer, record, step)] = 50
    return states


def test_decoded_finds_planted_steps_and_nothing_where_they_are_shuffled(tokenizer: Any) -> None:
    """Of its own question; then of another one."""
    states = saying_steps(tokenizer)
    found = decoded(planted(states, tokenizer))
    assert found["thought 1 says what step 1 finds"].mean() == found["thought 2 says what step 2 finds"].mean() == 100
    assert found["thought 1 says what step 2 finds"].mean() == 0
    shuffled = decoded(planted(states.roll(1, dims=0), tokenizer))
    assert shuffled["thought 1 says what step 1 finds"].mean() < 20


def test_frontier_tells_distances_and_the_other_chain_apart(tokenizer: Any) -> None:
    states = saying_steps(tokenizer)
    found = frontier(planted(states, tokenizer))
    assert found["thought 1, distance 1"].mean() == pytest.approx(100)
    assert found["thought 2, distance 2"].mean() == pytest.approx(100)
    assert found["thought 1, unreachable"].mean() == pytest.approx(0, abs=1e-6)
    flat = frontier(planted(0 * states, tokenizer))
    assert flat["thought 1, distance 1"].mean() == pytest.approx(flat["thought 1, unreachable"].mean())  # the null


def test_tree_reads_the_state_at_the_end_marker(tokenizer: Any) -> None:
    """After k thoughts the next token is the concept at distance k."""

    def think(thoughts: int) -> Any:
        states = torch.zeros(len(RECORDS), 2, len(tokenizer))
        for place, record in enumerate(RECORDS if thoughts else []):
            states[place, -1, finds(tokenizer, record, thoughts - 1)] = 50
        return SimpleNamespace(hidden=states)

    probed = planted(torch.zeros(1, 2, 1), tokenizer)
    probed.batches = lambda thoughts: iter([(list(range(len(RECORDS))), thoughts, None)])
    probed.think = think
    found = tree(probed)
    assert [found[f"after {k}, distance {d}"].mean().round() for k, d in ((1, 1), (1, 2), (2, 1), (2, 2))] == [100, 0, 0, 100]
    assert found["after 0, distance 1"].mean() == pytest.approx(found["after 0, unreachable"].mean())


# Root 0 leads to 1 and 2, these to 3 and 4; the target is 3. Node 5 is under 2 as well and leads on to 6.
BRANCHES = {
    "question": "q",
    "steps": ["a", "b"],
    "answer": "x",
    "edges": [[0, 1], [0, 2], [1, 3], [2, 4], [2, 5], [5, 6]],
    "root": 0,
    "target": 3,
    "idx_to_symbol": ["tom", "lempus", "yumpus", "zumpus", "terpus", "gorpus", "bompus"],
}


def test_ranks_and_heights_tell_a_choice_from_an_even_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("experiments.probes.frontier")
    monkeypatch.setattr(module, "words", lambda probed: {name: [at] for at, name in enumerate(BRANCHES["idx_to_symbol"])})
    monkeypatch.setattr(module, "probabilities", lambda probed, states: states.numpy())
    thoughts = torch.tensor([[0, 0.6, 0.2, 0, 0, 0, 0], [0, 0, 0, 0.1, 0.1, 0.2, 0]])  # (2, V)
    probed: Any = SimpleNamespace(
        records=lambda *fields: [BRANCHES] * 2,
        states=lambda: iter([([0, 1], torch.stack([thoughts, thoughts]))]),
        thoughts=2,
    )
    found = {name: values.tolist() for name, values in ranks(probed).items()}
    assert found["thought 1, together"] == pytest.approx([80, 80])
    assert found["thought 1, first 1"] == pytest.approx([75, 75])
    assert found["thought 1, first 2"] == pytest.approx([100, 100])
    assert found["thought 1, the likeliest leads"] == [100, 100]
    assert found["thought 1, a blind choice leads"] == [50, 50]
    assert found["thought 2, first 2"] == pytest.approx([75, 75])
    assert found["thought 2, the likeliest leads"] == [0, 0]
    assert found["thought 2, a blind choice leads"] == pytest.approx([100 / 3] * 2)
    monkeypatch.setattr(
        module, "after", lambda probed, count: iter([(0, thoughts[count].numpy()), (1, thoughts[count].numpy())])
    )
    heights = {name: values.tolist() for name, values in height(probed).items()}
    assert heights == {  # of step 1: lempus 75, yumpus 25; of step 2: zumpus 25 and terpus 25 lead nowhere, gorpus 50 to bompus
        "height 0, leads to the target": [25, 25],
        "height 0, does not": [25, 25],
        "height 1, leads to the target": [75, 75],
        "height 1, does not": pytest.approx([37.5, 37.5]),  # yumpus, gorpus
    }


def test_concepts_of_several_tokens_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no probability of their own: zeros would look like a finding."""
    module = importlib.import_module("experiments.probes.frontier")
    monkeypatch.setattr(module, "words", lambda probed: {"lempus": [1], "zumpus": [3], "terpus": [4], "bompus": [6]})
    monkeypatch.setattr(module, "probabilities", lambda probed, states: states.numpy())
    monkeypatch.setattr(module, "after", lambda probed, count: iter([(0, np.full(7, 0.1))]))
    states = torch.full((1, 2, 7), 0.1)
    probed: Any = SimpleNamespace(records=lambda *fields: [BRANCHES], states=lambda: iter([([0], states)]), thoughts=2)
    assert ranks(probed) == height(probed) == {}
    found = {name: values.tolist() for name, values in frontier(probed).items() if not np.isnan(values).any()}
    assert list(found) == ["thought 1, distance 3", "thought 2, distance 3"]  # bompus


def test_distances_stand_in_their_order(tokenizer: Any) -> None:
    """The first question has nothing four steps away, the last one has."""
    names = list(frontier(planted(torch.zeros(len(RECORDS), 2, len(tokenizer)), tokenizer)))
    assert names == [f"thought {k}, {kind}" for k in (1, 2) for kind in KINDS]


def test_layers_finds_the_layer_that_says_the_step(tokenizer: Any) -> None:
    states = torch.zeros(len(RECORDS), 2, len(tokenizer))
    for place, record in enumerate(RECORDS):
        states[place, 1, finds(tokenizer, record, 0)] = 5
    found = layers(planted(states, tokenizer))
    assert {name for name, values in found.items() if values.mean() == 100} == {"thought 2, layer 2"}
    probed = planted(states, tokenizer)
    probed.dataset["steps_tokenized"][0] = []  # it finds nothing
    values = layers(probed)["thought 2, layer 2"]
    assert np.isnan(values[0])
    assert values[1:].mean() == 100


def test_a_norm_of_an_unknown_name_is_refused() -> None:
    """Without the last norm a layer's states are not what the head reads."""
    inner = torch.nn.Module()
    inner.final_layer_norm = torch.nn.LayerNorm(3)
    outer = torch.nn.Module()
    outer.decoder = inner
    assert final_norm(outer) is final_norm(inner) is inner.final_layer_norm
    with pytest.raises(UserError, match="the last norm of Linear is none of norm, ln_f"):
        final_norm(torch.nn.Linear(2, 2))


def test_linear_probes_find_what_is_planted_and_nothing_in_noise() -> None:
    """The states hold a random rotation of what the first step finds, among as much noise; the null is noise alone."""
    records = chain_records(300, 0, "test", hops=(2,), concepts=CONCEPTS[:8])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    first = [CONCEPTS.index(record["steps"][0].rstrip(".").split()[-1]) for record in records]
    held = 3 * torch.nn.functional.one_hot(torch.tensor(first), 8).float() @ rotation + noise

    def areas(states: torch.Tensor) -> dict[str, float]:
        every = torch.stack([0 * states, states], dim=1)[:, :, None]  # an embedding and one layer, one thought
        probed: Any = SimpleNamespace(records=lambda *keys: records, layers=lambda: iter([(list(range(300)), every)]))
        return {name: float(np.nanmean(values)) for name, values in reachable(probed).items()}

    found, null = areas(held), areas(noise)
    assert found["thought 1, layer 1, within 1"] > 90
    assert found["thought 1, layer 1, within 1"] > found["thought 1, layer 1, within 2"] + 5
    assert 45 < found["thought 1, layer 1, within 1, shuffled"] < 55
    assert 45 < null["thought 1, layer 1, within 1"] < 55
    wide = torch.cat([held, torch.zeros(300, 200)], dim=1)  # more entries than questions to fit on: the same from the dual
    assert areas(wide)["thought 1, layer 1, within 1"] == pytest.approx(found["thought 1, layer 1, within 1"])


class SecondThought:
    """A model whose answer depends on its second thought alone, which is the question's sign: token 3 or token 4."""

    def think(self, input_ids: Any, attention_mask: Any, position_ids: Any, interventions: Any = None) -> Any:
        latent = input_ids == 9
        embeds = torch.zeros(*input_ids.shape, 2)
        for column in latent.any(dim=0).nonzero().flatten().tolist():
            own = torch.stack([input_ids[:, 0].float() - 1, torch.ones(len(latent))], dim=-1)[:, None]
            embeds[:, column] = (own if interventions is None else interventions.apply(own, column))[:, 0]
        second = latent & (latent.cumsum(dim=1) == 2)
        says = (embeds[..., 0] * second).sum(dim=1)  # (B,)
        return SimpleNamespace(inputs_embeds=embeds, hidden=says[:, None].expand(input_ids.shape)[..., None])

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([-100 + 0 * hidden.expand(*hidden.shape[:-1], 3), hidden, -hidden], dim=-1)


def test_causal_finds_the_thought_that_the_answer_depends_on() -> None:
    signs = [0, 2, 2, 0]  # as tokens of the questions; another question's is the one before
    ids = torch.tensor([[sign, 9, 9, 9, 1] for sign in signs])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(5).expand(4, -1)}
    answers = [3 if sign else 4 for sign in signs]
    records = [{"answer": str(token)} for token in answers]
    model = SecondThought()
    kept: dict[str, Any] = {}
    probed: Any = SimpleNamespace(
        model=model,
        thoughts=3,
        dataset={"answer_tokenized": [[token, Tokens.eos_token_id] for token in answers]},
        evaluator=SimpleNamespace(ids=SimpleNamespace(thought=9, latent=9), tokenizer=Tokens()),
        records=lambda *keys: records,
        think=lambda batch, changes=None: model.think(**batch, interventions=changes),
    )
    probed.batches = lambda latents="max": iter([([0, 1, 2, 3], batch, ids == 9)])
    probed.once = lambda measure: kept.setdefault("odds", None) or kept.update(odds=measure(probed)) or kept["odds"]
    found = causal(probed)
    assert found["log-odds, as they are"] == pytest.approx(2)  # log-odds of logits 1 and -1
    assert found["change with zero for thought 2, later ones recomputed"] == pytest.approx(-2)
    assert found["change with another question's for thought 2, later ones as they were"] == pytest.approx([0, -4, 0, -4])
    moved = {name for name, values in found.items() if name.startswith("change") and abs(values).max() > 1e-6}
    assert {name for name in moved if " for thought " in name} == {name for name in found if " for thought 2" in name}
    sure = confidence(probed)
    assert sure["as they are: right"].mean() == 100
    assert sure["zero for all thoughts: Brier"] == pytest.approx(25)


class Tokens:
    """Texts are the digits of their tokens."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(text.removeprefix("### "))]}


def test_geometry_of_thoughts_that_ignore_the_question() -> None:
    states = torch.tensor([[3.0, 0.0], [0.0, 6.0]]).expand(5, 2, 2)
    pauses = SimpleNamespace(ids=SimpleNamespace(thought=1, latent=2))
    found = geometry(SimpleNamespace(thoughts=2, evaluator=pauses, states=lambda: iter([([0, 1, 2, 3, 4], states)])))  # type: ignore[arg-type]
    assert found["thought 2: norm by that of the first"].tolist() == [200] * 5
    assert found["thought 1: cosine with other questions'"] == pytest.approx(100)
    assert found["thought 2: cosine with the one before"] == pytest.approx(0)


def test_forced_asks_with_no_thoughts_and_with_too_many() -> None:
    def predict(model: Any, stage: int, latents: Any) -> list[Any]:
        return [SimpleNamespace(correct=latents == 2, wrote_steps=latents == 0)] * 3

    found = forced(SimpleNamespace(model=None, stage=1, thoughts=2, evaluator=SimpleNamespace(predict=predict)))  # type: ignore[arg-type]
    right = {key: values.mean() for key, values in found.items() if "right" in key}
    assert right == {f"{count} thoughts, right": 100 * (count == 2) for count in range(5)}
    assert found["0 thoughts, wrote steps"].mean() == 100


GRAPH = {
    "idx_to_symbol": ["Tom", "lempus", "yumpus", "zumpus", "rompus", "Sam"],
    "edges": [[0, 1], [1, 2], [2, 3], [1, 3], [1, 4], [5, 4]],
    "root": 0,
    "target": 3,
}


@pytest.mark.parametrize(
    ("output", "correct", "kind"),
    [
        ("Tom is a lempus.\nEvery lempus is a zumpus.\n### Tom is a zumpus.", True, "correct path"),
        ("Every lempus is a zumpus.\n### Tom is a zumpus.", True, "correct path"),  # the first step was thought
        ("lempus\nzumpus\n### zumpus", True, "correct path"),  # symbols
        ("Tom is a lempus.\nEvery lempus is a yumpus.\nEvery yumpus is a zumpus.\n### Tom is a zumpus.", True, "longer path"),
        ("Every lempus is a rompus.\n### Tom is a rompus.", False, "wrong target"),
        ("Every lempus is a zumpus.\n### Tom is a rompus.", False, "wrong target"),
        ("Every yumpus is a rompus.\n### Tom is a rompus.", False, "hallucination"),  # no such edge
        ("Tom is a lempus.\nEvery yumpus is a zumpus.\n### Tom is a zumpus.", True, "hallucination"),  # does not go on
        ("Sam is a rompus.\n### Tom is a rompus.", False, "hallucination"),  # from where the person never comes
        ("Every wumpus is a dumpus.\n### Tom is a zumpus.", True, "hallucination"),
        ("### Tom is a zumpus.", True, "correct label"),
        ("### Tom is a rompus.", False, "incorrect label"),
    ],
)
def test_kinds_of_what_is_written(output: str, correct: bool, kind: str) -> None:
    assert kind_of(GRAPH, output, correct) == kind


def test_paths_are_counted_for_each_number_of_thoughts_and_drawn(tmp_path: Path) -> None:
    """With one thought the answer alone, else a path."""

    def predict(model: Any, stage: int, latents: Any) -> list[Any]:
        written = "" if latents else "Every lempus is a zumpus.\n"
        return [SimpleNamespace(output=f"{written}### Tom is a zumpus.", correct=True)] * 2

    probed: Any = SimpleNamespace(
        records=lambda *keys: [GRAPH] * 2, thoughts=1, model=None, stage=1, evaluator=SimpleNamespace(predict=predict)
    )
    found = {key: values.mean() for key, values in paths(probed).items()}
    assert {key for key, mean in found.items() if mean} == {"0 thoughts, correct path", "1 thoughts, correct label"}
    stacked({key: {"mine": {"mean": mean}} for key, mean in found.items()}, ["mine"], tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 5000


def test_operators_and_results_of_equations() -> None:
    calculator = make_tokenizer({"*": 0, "12": 1, "<<": 2, "<unk>": 3})
    states = torch.tensor([[[9.0, 0, 0, 0], [0, 9.0, 0, 0]]])
    probed = planted(states, calculator)
    probed.dataset = {"steps": [["<<3*4=12>>"]], "steps_tokenized": [[[2, 1]]]}
    probed.states = lambda: iter([([0], states)])
    found = {name: values.tolist() for name, values in decoded(probed).items()}
    assert found == {
        "thought 1 says what step 1 finds": [0],
        "thought 2 says what step 1 finds": [100],
        "thought 1 says the operator of step 1": [100],
        "thought 2 says the operator of step 1": [0],
    }


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
    given = ["name=x", f"results_path={out}", f"data_path={data}", "num_questions=5", "max_new_tokens=8"]
    names = ["forced", "decoded", "spelled", "layers", "geometry", "causal"]
    config = load_config(probe.ProbeConfig, [*given, f"groups={json.dumps(trained)}", f"probes={json.dumps(names)}"])
    probe.run(config)
    page = (out / "x" / "probes.md").read_text()
    found = json.loads((out / "x" / "probes.json").read_text())["probes"]
    assert len(found["forced"]["0 thoughts, right"]["coconut"]["seeds"]) == 2
    assert set(found["forced"]["0 thoughts, right"]) == {"coconut", "control"}
    assert "## spelled" in page
    assert "None of these checkpoints has what it looks at." in page
    assert "Without what it looks at, and so without numbers here: control." in page
    assert all((out / "x" / f"{name}.png").stat().st_size > 5000 for name in names if name != "spelled")

    def never(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Probed, "load", never)
    probe.run(config)
    assert json.loads((out / "x" / "probes.json").read_text())["probes"] == found
    with pytest.raises(AssertionError, match="measured again"):  # other questions
        probe.run(config.model_copy(update={"num_questions": 4}))


def test_a_run_that_has_gone_on_is_probed_again(
    trained: dict[str, list[str]], run_arguments: list[str], tmp_path: Path
) -> None:
    """A run's directory stands for its newest checkpoint, which is another one then."""
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    run = str(tmp_path / "checkpoints" / "run")
    given = ["name=x", f"results_path={tmp_path}", f"data_path={data}", f"groups={{a: [{run}]}}", "probes=[geometry]"]
    config = load_config(probe.ProbeConfig, given)
    first, again = (probe.measured(config, run, torch.device("cpu"))["geometry"] for _ in range(2))
    start([*run_arguments, "num_epochs=5"])
    later = probe.measured(config, run, torch.device("cpu"))["geometry"]
    fresh = probe.measured(config.model_copy(update={"name": "y"}), run, torch.device("cpu"))["geometry"]
    for name, values in later.items():
        assert np.array_equal(first[name], again[name], equal_nan=True)
        assert np.array_equal(values, fresh[name], equal_nan=True)
    assert any(not np.array_equal(first[name], later[name], equal_nan=True) for name in later)


def test_states_are_those_before_the_thoughts(trained: dict[str, list[str]], run_arguments: list[str]) -> None:
    """With the map `identity` they are the very thoughts that are fed back."""
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    probed = Probed.load(trained["coconut"][0], Path(data), 5, {"batch_size_eval": 2}, torch.device("cpu"))
    states = torch.cat([own for _, own in probed.states()])
    fed = torch.cat([gather_thoughts(probed.think(batch).inputs_embeds, thought) for _, batch, thought in probed.batches()])
    assert states.shape[:2] == (5, probed.thoughts)
    torch.testing.assert_close(states, fed)
    assert not np.isnan(states.detach().numpy()).any()


def test_states_are_those_of_passes_that_attended_to_padding(run_arguments: list[str], tmp_path: Path) -> None:
    """attend_padding: one pass over all columns would not, so questions are asked one by one, without padding."""
    start(run_arguments, "attend_padding=true", "attn_implementation=eager")
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    settings = {"batch_size_eval": 4}
    probed = Probed.load(str(tmp_path / "checkpoints" / "run"), Path(data), 5, settings, torch.device("cpu"))
    assert len({len(batch["input_ids"][0]) for _, batch, _ in probed.batches()}) > 1  # a batch of them would have padding
    for (_, own), (_, batch, thought) in zip(probed.states(), probed.batches(), strict=True):
        torch.testing.assert_close(own, gather_thoughts(probed.think(batch).inputs_embeds, thought))


def test_groups_must_have_checkpoints() -> None:
    with pytest.raises(UserError, match="groups: name at least one checkpoint in each"):
        load_config(probe.ProbeConfig, ["name=x", "data_path=d", "groups={a: []}"])


def test_the_page_has_a_row_for_each_probe() -> None:
    page = (ROOT / "docs" / "PROBES.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(PROBES)
