"""Ablations: every part from tiny runs, votes of fewer branches, equal noise of all types, comparisons by hand."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chain_records, write_json
from transformers import AutoConfig, AutoModelForCausalLM

from experiments import ablation
from experiments.ablation import PARTS, Ablation, AblationConfig, equal_scale
from experiments.answers.benchmarks import NO_ANSWER, same_answer
from experiments.answers.judging import AGGREGATIONS
from experiments.noise import sweep
from experiments.noise.ablation_results import MIXED, NO_NOISE, Part, rows, table, vote
from experiments.noise.settings import BranchConfig
from experiments.noise.sweep import Sweep, run_sweep
from noise import NOISES, SCHEDULES, apply_noise_to_hidden_states
from utils import UserError

CPU = torch.device("cpu")
NEEDED = {"name": "x", "model_id": "m", "benchmark": "gsm8k"}
SAME = functools.partial(same_answer, "gsm8k")


@pytest.fixture
def values(model_directory: Path, tmp_path: Path) -> dict[str, Any]:
    """An ablation of seconds: a random model that writes digits now and then, two thoughts, three branches."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_directory)).save_pretrained(model_directory)
    records = [{**record, "answer": str(number)} for number, record in enumerate(chain_records(4))]
    return {
        "name": "small",
        "results_path": str(tmp_path / "results"),
        "model_id": str(model_directory),
        "benchmark": "gsm8k",
        "data_path": str(write_json(tmp_path / "questions.json", records)),
        "n_latents": 2,
        "noise_ratios": [0.5, 1.0],
        "num_branches": 3,
        "temperature": 1.0,
        "max_new_tokens": 12,
        "batch_size": 64,
    }


def run_main(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Path:
    monkeypatch.setattr(sys, "argv", ["ablation", *(f"{key}={value}" for key, value in values.items())])
    ablation.main()
    return Path(values["results_path"]) / values["name"]


def read(directory: Path, part: str) -> dict[str, Any]:
    [path] = directory.glob(f"{part}_2*.json")
    return json.loads(path.read_text())


def questions(directory: Path) -> list[dict[str, Any]]:
    [path] = directory.glob("questions_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(record: dict[str, Any], key: str) -> list[str]:
    return [branch["text"] for branch in record["conditions"][key]["branches"]]


# --- the whole ---


def test_every_part(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = run_main(monkeypatch, values)
    found = {part: read(directory, part)["results"] for part in PARTS}
    assert {path.stem for path in directory.glob("*.png")} == set(PARTS)
    assert [line[3:] for line in (directory / "table.md").read_text().splitlines() if line.startswith("## ")] == list(PARTS)
    places = {part: list(dict.fromkeys(row["value"] for row in result)) for part, result in found.items()}
    assert places["injection_step"] == ["1", "2"]
    assert places["branches"] == ["1", "2", "3"]
    assert places["noise_type"] == list(NOISES)
    assert all(abs(row["noise_ratio"] / float(row["noise"]) - 1) < 0.25 for row in found["noise_type"] if row["noise_ratio"])
    runs = {path.name: questions(path) for path in directory.iterdir() if path.is_dir()}
    assert {"base", "injection_step_2", "noise_type", "shared_noise_shared", "schedule_linear"} < set(runs)
    for records in runs.values():  # the baseline is the same everywhere, which pairs all comparisons
        assert [texts(record, "clean") for record in records] == [texts(record, "clean") for record in runs["base"]]
    noisy = [texts(record, "gaussian_scaled@1.0") for record in runs["base"]]
    for name in ("injection_step_2", "shared_noise_shared", "schedule_constant"):
        assert [texts(record, "gaussian_scaled@1.0") for record in runs[name]] != noisy, name
    for record in runs["base"]:
        for outcome in record["conditions"].values():
            again = vote(outcome["branches"], outcome["noise_ratio"], SAME)
            known = (
                [*AGGREGATIONS] if outcome["noise_ratio"] is None else [*AGGREGATIONS][:-1]
            )  # ties: not by recorded, rounded noise
            for name in known:
                assert again[name] == {**outcome[name], "confidence": pytest.approx(outcome[name]["confidence"], rel=1e-4)}
    assert any(len({branch["answer"] for branch in record["conditions"]["clean"]["branches"]}) > 1 for record in runs["base"])
    fewer = run_sweep(
        BranchConfig(
            **{key: value for key, value in values.items() if key not in ("noise_ratios", "name", "num_branches")},
            name="fewer",
            num_branches=2,
            noise_type="gaussian_scaled",
            noise_scales=[1.0],
        ),
        CPU,
    )
    assert fewer is not None
    for record, whole in zip(fewer.records, runs["base"], strict=True):
        for key in ("clean", "gaussian_scaled@1.0"):
            assert texts(record, key) == texts(whole, key)[:2]


def test_thoughts_are_measured_in_batches_of_positions(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    measure = ablation.all_paths
    monkeypatch.setattr(ablation, "all_paths", lambda *given: sizes.append(given[-1]) or measure(*given))
    found = [ablation.survey(AblationConfig(**values, tokens_per_batch=room), CPU) for room in (None, 1)]
    assert sizes == [64, 1]
    assert found[0].norm_per_entry == pytest.approx(found[1].norm_per_entry)


def test_a_finished_ablation_is_not_run_again(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values["parts"] = "aggregation"
    monkeypatch.setattr("experiments.noise.progress.git_commit", lambda: "x")  # a commit between the two runs must not count
    directory = run_main(monkeypatch, values)
    before = {path.name: path.read_bytes() for path in directory.glob("*.json")}
    monkeypatch.setattr(sweep.Answerer, "answer", lambda *_: pytest.fail("answered again"))
    run_main(monkeypatch, values)
    assert {path.name: path.read_bytes() for path in directory.glob("*.json")} == before
    assert len(before) == 2  # of the part, and which questions were right


def test_a_stopped_run_stops_all(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stopped(config: Any, device: torch.device) -> Sweep | None:
        asked.append(config.name)
        return run_sweep(config, device) if len(asked) == 1 else None

    monkeypatch.setattr(ablation, "run_sweep", stopped)
    directory = run_main(monkeypatch, {**values, "parts": "schedule"})
    assert asked == ["small/base", "small/schedule_constant"]
    assert not list(directory.glob("*.*"))


@pytest.mark.parametrize("key", ["noise_at_step", "injection_steps"])
def test_thoughts_that_no_question_has(key: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, {**values, key: 3})
    assert stopped.value.code == 2
    assert f"error: {key}: 3 is beyond the thoughts: no question has more than 2" in capsys.readouterr().err
    assert not Path(values["results_path"]).exists()


# --- what is varied ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_scales": [1]}, "noise_scales: not for an ablation: set noise_ratios"),
        ({"controls": "zero"}, "controls: not for an ablation: full_test.py tries them"),
        ({"mc_dropout": 0.1}, "mc_dropout: not for an ablation: run_noisy_experiment.py tries it beside noise"),
        ({"apply_noise_to_all_passes": True}, "set schedule: constant"),
        ({"noise_type": ["snr", "uniform"]}, "an ablation varies one noise setting, found snr, uniform"),
        ({"noise_type": "targeted"}, "found targeted-same, targeted-opposite; targeted needs noise_direction"),
        ({"noise_type": "dropout", "noise_ratios": [2]}, "dropout removes at most the whole thought: at most 1"),
        ({"noise_ratios": [1, 1.0]}, "holds something twice"),
        ({"noise_ratios": [0]}, "greater than 0"),
        ({"num_branches": 1}, "greater than or equal to 2"),
        ({"parts": ["branch"]}, "must be one of injection_step, branches"),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="Error|error") as caught:
        AblationConfig(**{**NEEDED, **changes})
    assert message in str(caught.value)


def test_defaults() -> None:
    config = AblationConfig(**NEEDED, parts="all", noise_type="targeted", noise_direction="same")
    assert (config.parts, config.setting.name, config.baseline) == (list(PARTS), "targeted-same", "clean")
    assert AblationConfig(**NEEDED, temperature=0).baseline == "self_consistency"
    assert (config.results_path, config.num_branches, config.injection_steps) == ("ablation/results", 5, None)


def test_runs_differ_in_one_thing_and_share_a_checkpoint() -> None:
    changed = {"load_model_path": "run", "noise_ratios": [0.5, 2], "noise_at_step": 2, "shared_noise": True}
    config = AblationConfig(**NEEDED, **changed)
    runs = ablation.plan_runs(Ablation(config, "run/checkpoint_3", 3, 0.1))
    steps = {"injection_step_1": ("noise_at_step", 1), "injection_step_3": ("noise_at_step", 3)}
    schedules = {f"schedule_{name}": ("schedule", name) for name in SCHEDULES if name != "none"}
    single = {**steps, "shared_noise_own": ("shared_noise", False), **schedules}
    assert list(runs) == ["base", *single, "noise_type"]
    base = runs["base"].model_dump()
    assert base["scales_of"] == {"gaussian_scaled": [0.5, 2.0]}
    for name, (key, value) in single.items():
        assert runs[name].model_dump() == {**base, "name": f"x/{name}", key: value}
    assert {run.load_model_path for run in runs.values()} == {"run/checkpoint_3"}
    assert runs["noise_type"].scales_of["snr"] == [2.0, 0.5]
    assert runs["noise_type"].scales_of["dropout"] == [0.25]
    assert runs["noise_type"].scales_of["uniform"] == [0.0866, 0.346]
    assert "gaussian_scaled" not in runs["noise_type"].scales_of


def test_a_decay_is_for_the_schedules_that_decay() -> None:
    for schedule in ("none", "adaptive"):
        runs = ablation.plan_runs(Ablation(AblationConfig(**NEEDED, schedule=schedule, lambda_decay=0.3), "m", 3, 0.1))
        assert {run.lambda_decay for run in runs.values() if run.schedule in ("exponential", "adaptive")} == {0.3}
        assert {run.lambda_decay for run in runs.values() if run.schedule in ("none", "linear")} == {0.5}
    with pytest.raises(ValueError, match="lambda_decay: 0.3 has no effect without schedule"):
        AblationConfig(**NEEDED, parts="branches", lambda_decay=0.3)


def test_all_noise_types_add_as_much() -> None:
    draws = torch.Generator().manual_seed(0)
    states = 3 * torch.randn(500, 256, generator=draws)
    per_entry = float(states.norm(dim=1).mean()) / math.sqrt(256)
    for kind in NOISES.values():
        for ratio in (0.3, 0.8, 2.0):
            scale = equal_scale(kind, ratio, per_entry)
            if kind.name == "dropout" and ratio > 1:
                assert scale is None
            else:
                _, info = apply_noise_to_hidden_states(states, scale, kind.noise_type, kind.direction, draws)
                assert info["scale_ratio"] == pytest.approx(ratio, rel=0.02), kind.name


# --- numbers ---


def branch(answer: str, gold: str = "1", score: float = -1.0, tokens: int = 1) -> dict[str, Any]:
    return {"text": answer, "answer": answer, "correct": answer == gold, "new_tokens": tokens, "log_probability": score}


def outcome(answers: str, ratios: list[float] | None = None) -> dict[str, Any]:
    """Of one-letter answers, of which 1 is right and - is none."""
    return vote([branch(NO_ANSWER if one == "-" else one) for one in answers], ratios, SAME)


def test_votes() -> None:
    branches = [branch("2", score=-9, tokens=90), branch("1", score=-1, tokens=1), branch("3", score=-1.5, tokens=30)]
    found = vote(branches, [9.0, 9.0, 0.0, 5.0], SAME)
    assert [found[name]["answer"] for name in AGGREGATIONS] == ["2", "3", "1", "3"]
    assert [found[name]["correct"] for name in AGGREGATIONS] == [False, False, True, False]
    assert found["noise_ratio"] == [9.0, 9.0, 0.0]
    assert vote(branches, None, SAME)["noise_ratio"] is None
    assert outcome("--")["majority"] == {"answer": NO_ANSWER, "votes": 0, "confidence": 0.0, "correct": False}


def test_rows_compare_the_same_questions() -> None:
    clean, noisy = [outcome("11"), outcome("11"), outcome("22"), outcome("11")], [outcome("22", [1, 1]), outcome("11", [1, 1])]
    part = Part(
        "injection_step",
        "1",
        {
            ("1", NO_NOISE): dict(enumerate(clean)),
            ("1", "1"): dict(enumerate([noisy[1], noisy[0], noisy[1], noisy[1]])),
            ("2", NO_NOISE): {1: clean[1], 2: clean[2]},
            ("2", "1"): {1: noisy[1], 2: noisy[0]},
            ("3", "1"): {},
        },
    )
    found = {(row["value"], row["noise"]): row for row in rows(part)}
    assert [(*place, row["total"], row["accuracy"]) for place, row in found.items()] == [
        ("1", NO_NOISE, 4, 75),
        ("1", "1", 4, 75),
        ("2", NO_NOISE, 2, 50),
        ("2", "1", 2, 50),
    ]
    first, second = found["1", "1"], found["2", "1"]
    assert (first["versus_baseline"]["only_first"], first["versus_baseline"]["only_second"]) == (1, 1)
    assert first["versus_baseline"]["p_holm"] == second["versus_baseline"]["p_holm"] == 1
    assert second["versus_baseline"]["difference"] == 0
    assert [second[kind]["first"] for kind in ("versus_baseline", "versus_default")] == ["2, noise none", "1, noise 1"]
    assert (second["versus_default"]["only_first"], second["versus_default"]["only_second"]) == (1, 1)
    assert second["versus_default"]["questions"] == 2
    assert "versus_default" not in first
    assert "versus_baseline" not in found["1", NO_NOISE]
    assert "versus_default" not in found["2", NO_NOISE]
    lines = table(part, list(found.values())).splitlines()
    assert [line.split(" | ")[:5] for line in lines[4:]] == [
        ["| ", "self-consistency", "", "4", "75.0 (30.1 to 95.4)"],
        ["| 1", "1", "1.00", "4", "75.0 (30.1 to 95.4)"],
        ["| 2", "1", "1.00", "2", "50.0 (9.5 to 90.5)"],
    ]
    assert "| +0.0 (" in lines[-1]


def test_a_question_that_no_noise_reached_counts_in_no_part() -> None:
    found = small_ablation(["11", "11"], ["11", "22"], ["11", "22"], [1.0, 1.0])
    for key in ("gaussian_scaled@0.5", "gaussian_scaled@1.0"):
        found.sweeps["base"].records[1]["conditions"][key]["noise_ratio"] = None
    for part in ("branches", "aggregation"):
        assert {*map(len, ablation.part_of(found, part).cells.values())} == {1}, part


def small_ablation(clean: list[str], half: list[str], full: list[str], ratios: list[float] | None, **changes: Any) -> Ablation:
    """One of two ratios whose shared run gave these answers."""
    config = AblationConfig(**NEEDED, noise_ratios=[0.5, 1], num_branches=len(clean[0]), **changes)
    given = {"clean": clean, "gaussian_scaled@0.5": half, "gaussian_scaled@1.0": full}
    records = [
        {
            "index": index,
            "error": None,
            "conditions": {key: outcome(one[index], None if key == "clean" else ratios) for key, one in given.items()},
        }
        for index in range(len(clean))
    ]
    records.append({"index": 99, "error": "ValueError: no"})
    return Ablation(config, "m", 2, 1.0, {"base": Sweep(config, {}, records)})


def test_fewer_branches_and_mixed_noise() -> None:
    found = small_ablation(["1212", "2111"], ["3111", "1111"], ["2444", "1333"], [1.0, 2.0, 3.0, 4.0])
    cells = ablation.part_of(found, "branches").cells
    assert [cells[str(k), NO_NOISE][1]["majority"]["answer"] for k in (1, 2, 3, 4)] == ["2", "2", "1", "1"]
    assert [cells[str(k), "0.5"][0]["majority"]["correct"] for k in (1, 2, 3, 4)] == [False, False, True, True]
    assert set(cells["2", "1"]) == {0, 1}
    aggregated = ablation.part_of(found, "aggregation")
    assert aggregated.default == "majority"
    mixed = aggregated.cells["majority", MIXED][0]
    assert [one["answer"] for one in mixed["branches"]] == ["3", "4", "1", "4"]  # 0.5, 1, 0.5, 1
    assert mixed["noise_ratio"] == [1.0, 2.0, 3.0, 4.0]
    assert aggregated.cells["noise_weighted", MIXED][0]["majority"]["answer"] == "4"


def test_questions_without_the_noisy_thought_are_left_out() -> None:
    found = small_ablation(["11", "12"], ["11", "12"], ["11", "12"], [1.0, 1.0], injection_steps=[1])
    del found.sweeps["base"].records[2]
    found.sweeps["base"].records[1]["conditions"]["gaussian_scaled@0.5"]["noise_ratio"] = None
    found.sweeps["base"].records[1]["conditions"]["gaussian_scaled@1.0"]["noise_ratio"] = None
    cells = ablation.part_of(found, "injection_step").cells
    assert {place: set(cell) for place, cell in cells.items()} == {("1", noise): {0} for noise in (NO_NOISE, "0.5", "1")}


def test_survey_leaves_failing_questions_to_the_runs(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no such file"):
        ablation.survey(AblationConfig(**{**values, "data_path": "nowhere.json"}), CPU)
    found = ablation.survey(AblationConfig(**values), CPU)
    assert (found.source, found.thoughts) == (values["model_id"], 2)
    assert found.norm_per_entry == pytest.approx(1, abs=0.1)  # a norm layer of weight 1 is the last
    assert ablation.survey(AblationConfig(**{**values, "parts": "branches"}), CPU).norm_per_entry == 1
