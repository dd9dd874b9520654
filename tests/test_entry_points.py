"""The entry points of the noise experiments: what they say to bad input, what the quick checks see, the full suite's report."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, chain_records, write_json
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

import coconut
import generation
import noise
import thoughts
from experiments import plots, significance
from experiments.answers.benchmarks import BENCHMARKS
from experiments.answers.questions import BenchmarkQuestion
from experiments.checks import branch_check, selfcheck, stand_ins
from experiments.noise import full
from experiments.noise.settings import FullConfig, SweepConfig
from experiments.noise.sweep import Answerer, run_sweep
from utils import load_config

CPU = torch.device("cpu")
PROGRAMS = ("test.py", "run_noisy_experiment.py", "quick_test.py", "quick_branch_test.py", "full_test.py")


def start(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run an entry point's main in this process; its exit code."""
    main = runpy.run_path(str(ROOT / program), run_name="started")["main"]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def model(model_directory: Path) -> Path:
    """A tiny random model with its weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(model_directory)).save_pretrained(model_directory)
    return model_directory


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_json(tmp_path / "questions.json", chain_records(6))


# --- bad input ---

SWEEPS = ("test.py", "run_noisy_experiment.py", "full_test.py")
NEEDED = ["name=x", "benchmark=prosqa", "model_id=configs/llama_small"]
BAD = [
    *((program, ["name=x", "benchmark=prosqa"], "model_id or load_model_path is missing") for program in SWEEPS),
    *((program, [*NEEDED, "noise_tpye=snr"], "unknown key 'noise_tpye'; did you mean 'noise_type'?") for program in PROGRAMS),
    *((program, [*NEEDED, "data_path=none.json"], "none.json: no such file") for program in SWEEPS),
    *((program, [*NEEDED, "data_path={broken}"], "row 2: field 'question': expected a text") for program in SWEEPS),
    *((program, [*NEEDED, "data_path={good}"], "a configuration without weights") for program in SWEEPS),
    *((program, [*NEEDED, "noise_scales=-1"], "noise_scale is -1; it must be finite and not negative") for program in SWEEPS),
    *((program, ["model_id=/none/at/all"], "model_id: /none/at/all: no such file") for program in PROGRAMS[2:4]),
    *((program, ["data_path={broken}"], "row 2: field 'question': expected a text") for program in PROGRAMS[2:4]),
    *((program, ["results_path=x"], "results_path has no effect here") for program in PROGRAMS[2:4]),
    ("quick_test.py", ["noise_type=snr"], "noise_type has no effect here; leave it out"),
    ("quick_test.py", ["num_branches=1"], "num_branches: input should be greater than or equal to 2"),
    ("quick_branch_test.py", ["benchmark=prontoqa"], "prontoqa: not on the hub; give a file of records"),
    ("quick_branch_test.py", ["max_new_tokens=5000", "num_questions=1"], "all 1 questions failed; the first with ValueError"),
    ("full_test.py", [*NEEDED, "num_branches=1"], "num_branches: input should be greater than or equal to 2"),
    ("full_test.py", [*NEEDED, "apply_noise_to_all_passes=true"], "tries noise in one pass and in all of them; leave it out"),
    ("full_test.py", [*NEEDED, "noise_type=snr", "noise_scales=-1"], "noise_scale is -1"),
    ("full_test.py", [*NEEDED, "name=../x"], "name: '../x' must be a folder below results_path"),
]


@pytest.mark.parametrize(("program", "arguments", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_line(
    program: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    files = {
        "broken": write_json(tmp_path / "broken.json", [*chain_records(1), {"answer": "Tom is a lempus."}]),
        "good": write_json(tmp_path / "good.json", chain_records(2)),
    }
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert start(program, [argument.format(**files) for argument in arguments], monkeypatch) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "results").exists()


# --- quick_test.py ---


@pytest.fixture(scope="module")
def bench() -> selfcheck.Bench:
    config = load_config(selfcheck.CheckConfig, ["num_questions=3", "num_branches=2", "max_new_tokens=5"])
    return selfcheck.Bench(config, stand_ins.quick_subject(config, CPU), stand_ins.quick_questions(config))


def test_everything_works_here(bench: selfcheck.Bench) -> None:
    checks = list(selfcheck.all_checks(bench))
    assert [check for check in checks if check.passed is False] == []
    assert [check.name for check in checks if check.passed is None] == ["speed"]
    assert len(checks) == len(noise.NOISES) + 10
    assert set(selfcheck.SAMPLES) == set(BENCHMARKS)


def ignoring(*places: int) -> Callable[..., torch.Generator]:
    """A generator of noise that does not depend on some parts of its key: seed, question, branch, pass."""
    return lambda *key: noise.derived_generator(*(0 if place in places else part for place, part in enumerate(key)))


def fresh_numbers(*_key: int) -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def in_place(_self: Any, thoughts: torch.Tensor, _column: int) -> torch.Tensor:
    return thoughts.mul_(1.5)


def emptied(cache: Any, rows: torch.Tensor) -> Any:
    selected = SELECT(cache, rows)
    for layer in selected.layers:
        layer.values = torch.zeros_like(layer.values)
    return selected


def unmasked(self: coconut.Coconut, ids: torch.Tensor, *_: Any) -> generation.Prompt:
    return PROMPT(self, ids, None)


SELECT, PROMPT, SNR_NOISE = generation.select_cache, coconut.Coconut.prompt, noise.NOISES["snr"]
ONE_STREAM = torch.Generator().manual_seed(0)
TWICE = {**noise.NOISES, "snr": replace(SNR_NOISE, add=lambda h, s, g: 2 * SNR_NOISE.add(h, s, g))}
[SNR] = [setting for setting in selfcheck.settings() if setting.noise_type == "snr"]
DEFECTS: dict[str, tuple[Callable[[selfcheck.Bench], selfcheck.Check], Any, str, Any]] = {
    "noise twice as large": (lambda bench: selfcheck.check_formula(bench, SNR), noise, "NOISES", TWICE),
    "scale 0 rounds": (selfcheck.check_no_noise, selfcheck, "apply_noise_to_hidden_states", lambda h, *_: (h + 1e-3, {})),
    "noise in the prompt": (selfcheck.check_prompt_states, thoughts.ThoughtInterventions, "apply", in_place),
    "no noise": (selfcheck.check_prompt_states, thoughts.ThoughtInterventions, "apply", lambda _, thoughts, __: thoughts),
    "padding read": (selfcheck.check_batch, coconut.Coconut, "prompt", unmasked),
    "cache lost": (selfcheck.check_cache, generation, "select_cache", emptied),
    "seed ignored": (selfcheck.check_seed, thoughts, "noise_generator", ignoring(0)),
    "noise unseeded": (selfcheck.check_seed, thoughts, "noise_generator", fresh_numbers),
    "samples unseeded": (selfcheck.check_seed, coconut, "sampling_generator", fresh_numbers),
    "one noise for all": (selfcheck.check_noise_of_branches, thoughts, "noise_generator", ignoring(2)),
    "shared noise ignored": (selfcheck.check_noise_of_branches, thoughts, "noise_generator", fresh_numbers),
    "branches seeded otherwise": (selfcheck.check_first_branch, thoughts, "noise_generator", fresh_numbers),
    "noise by turns": (selfcheck.check_batch_size, thoughts, "noise_generator", lambda *_: ONE_STREAM),
    "samples by turns": (selfcheck.check_batch_size, generation, "sampling_generator", lambda *_: ONE_STREAM),
    "extraction": (selfcheck.check_extraction, selfcheck, "extract_answer", lambda *_: "1234"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect: str, bench: selfcheck.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    check, owner, name, wrong = DEFECTS[defect]
    monkeypatch.setattr(owner, name, wrong)
    assert check(bench).passed is False


def test_16_bits_pass() -> None:
    config = load_config(selfcheck.CheckConfig, ["dtype=bfloat16", "num_questions=2", "num_branches=2", "max_new_tokens=3"])
    bench = selfcheck.Bench(config, stand_ins.quick_subject(config, CPU), stand_ins.quick_questions(config))
    for check in (selfcheck.check_first_branch, selfcheck.check_batch_size):
        assert check(bench).passed


@pytest.mark.parametrize(
    ("dtype", "same", "distance", "passed"),
    [
        (torch.float32, True, 5e-4, True),
        (torch.float32, False, 0.0, False),
        (torch.float32, True, 2e-3, False),
        (torch.bfloat16, False, 0.1, True),
        (torch.bfloat16, True, 0.3, False),
        (torch.bfloat16, True, float("nan"), False),
    ],
)
def test_what_rounding_may_change(
    bench: selfcheck.Bench, dtype: torch.dtype, same: bool, distance: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "dtype", dtype)
    assert bench.judge("x", [True, same], "thoughts", selfcheck.largest([0.0, distance, 0.0])).passed is passed


def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    good, bad = selfcheck.Check("a", "1.0", True), selfcheck.Check("b", "2.0", False)
    for checks, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(selfcheck, "all_checks", lambda _, checks=checks: checks)
        assert start("quick_test.py", [], monkeypatch) == code
    assert "FAILED" in capsys.readouterr().out


def test_what_raises_has_failed() -> None:
    def check() -> selfcheck.Check:
        raise RuntimeError('"addmm" not implemented\nfor Half')

    assert selfcheck._attempt("x", check) == ("x", 'RuntimeError: "addmm" not implemented for Half', False)


# --- quick_branch_test.py ---


def test_branches_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert start("quick_branch_test.py", ["num_questions=2", "max_new_tokens=3"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "checkpoints/quick-coconut is not there (scripts/quickstart.sh): a small random model, made questions" in shown
    for text in ("branch 4", "noise weighted", "gaussian_scaled@0.5", "at least 5", "unanimous"):
        assert text in shown


def test_details_of_a_question() -> None:
    vote = {"answer": "18", "votes": 4, "confidence": 0.8, "correct": True}
    other = {"answer": "20", "votes": 1, "confidence": 0.6, "correct": False}
    branches = [{"answer": "18", "correct": True, "log_probability": -1.25}] * 4
    outcome = {
        "branches": [*branches, {"answer": "20", "correct": False, "log_probability": -7.5}],
        **dict.fromkeys(("majority", "probability", "noise_weighted"), vote),
        "probability_sum": other,
        "diversity": {"diversity": 1.5, "normalised": 0.25},
    }
    greedy = {**outcome, "branches": branches[:1], "majority": {**vote, "votes": 1}, "diversity": None}
    question = BenchmarkQuestion("gsm8k", 3, "w " * 80 + "How many?", "18")
    record = {"conditions": {"greedy": greedy, "snr@2.0": outcome}}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(branch_check.question_table(question, record))
    rows = [line.split() for line in console.export_text().splitlines()]
    title = " ".join(itertools.chain(*rows[:6]))
    assert title.startswith("3: ... w w")
    assert "w w How many? (18)" in title
    for row in (
        "branch 0 ✓ 18 -1.25 ✓ 18 -1.25",
        "branch 4 ✗ 20 -7.50",
        "majority ✓ 18 0.80 ✓ 18 0.80",
        "probability sum ✗ 20 0.60 ✗ 20 0.60",
        "agreement 1 of 1 4 of 5, strong",
        "diversity 1.5 (0.25)",
    ):
        assert row.split() in rows


def test_who_answers_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(branch_check.QuickBranchConfig, ["load_model_path=None"])
    assert branch_check.with_quick_start(config) == config
    assert config.model_id == stand_ins.RANDOM
    (tmp_path / branch_check.CHECKPOINT).mkdir(parents=True)
    chosen = branch_check.with_quick_start(config)
    assert (chosen.model_id, chosen.load_model_path) == (None, str(branch_check.CHECKPOINT))
    named = load_config(branch_check.QuickBranchConfig, ["model_id=m", "noise_type=snr", "noise_scales=[2, 1]"])
    assert branch_check.with_quick_start(named) == named
    assert (named.model_id, named.noise_type, named.noise_scales) == ("m", ["snr"], [2, 1])


# --- full_test.py ---


@pytest.fixture
def suite(model: Path, questions: Path, tmp_path: Path) -> list[str]:
    values = {
        "name": "all/of/it",
        "results_path": tmp_path / "results",
        "model_id": model,
        "benchmark": "prosqa",
        "data_path": questions,
        "n_latents": 2,
        "max_new_tokens": 3,
        "noise_type": "snr",
        "noise_scales": "[0.5, 2.0]",
        "controls": "[zero, other]",
        "num_branches": 2,
    }
    return [f"{key}={value}" for key, value in values.items()]


def test_the_suite_and_its_report(suite: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.noise.progress.git_commit", lambda: "abc")  # somebody may commit meanwhile
    monkeypatch.setattr(plots, "save_figure", lambda _, path: path.touch())  # drawn in test_figures
    assert start("full_test.py", suite, monkeypatch) == 0
    directory = tmp_path / "results" / "all" / "of" / "it"
    [page] = directory.glob("report_*.md")
    text, content = page.read_text(encoding="utf-8"), json.loads((directory / "report.json").read_text(encoding="utf-8"))
    assert content["noise"]["snr"]["all_passes"]["most_scale"] == 0.5  # less signal is more noise
    assert set(content["controls"]) == {f"{one}/{place}" for one in ("zero", "other") for place in ("all", "first", "after")}
    branching = content["branching"]
    assert list(branching["conditions"]) == ["no_latents", "greedy", "clean", "gaussian_scaled@0.5", "gaussian_scaled@2.0"]
    assert branching["conditions"]["clean"]["versus_self_consistency"] is None
    assert [len(one["coverage"]) for one in branching["conditions"].values()] == [0, 0, 2, 2, 2]
    assert content["clean"]["total"] == content["tested"]["questions"] == 6
    figures = {"noise/controls.png", "noise/snr.png", "all_passes/snr.png", "branching/diversity.png"}
    assert figures | {"branching/gaussian_scaled.png", "branching/coverage_gaussian_scaled.png"} == set(content["figures"])
    for path in content["figures"]:
        assert (directory / path).is_file()
        assert f"]({path})" in text
    for needed in ("seed 0", "torch 2", "| commit | abc |", "Clean accuracy", "self-consistency, no noise", "-2 points (`h"):
        assert needed in text

    def decoded_again(*_: Any) -> None:
        raise AssertionError("everything was there")

    monkeypatch.setattr(Answerer, "answer", decoded_again)
    monkeypatch.setattr(full, "write_results", lambda _: None)
    assert start("full_test.py", suite, monkeypatch) == 0
    assert page.read_text(encoding="utf-8") == text


def test_a_signal_stops_the_suite(suite: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a part is answered, and while the results of one are written."""
    begun: list[str] = []

    def stopped_in_the_second(config: SweepConfig, device: torch.device) -> Any:
        begun.append(config.name)
        return run_sweep(config, device) if len(begun) == 1 else None

    monkeypatch.setattr(full, "run_sweep", stopped_in_the_second)
    monkeypatch.setattr(full, "write_results", lambda _: None)
    assert start("full_test.py", suite, monkeypatch) == 0
    assert begun == ["all/of/it/noise", "all/of/it/all_passes"]
    begun.clear()
    monkeypatch.setattr(full, "write_results", lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    assert start("full_test.py", suite, monkeypatch) == 0
    assert begun == ["all/of/it/noise"]
    assert not list((tmp_path / "results").rglob("report*"))


def test_parts_of_the_suite() -> None:
    needed = {"name": "x", "model_id": "m", "benchmark": "gsm8k", "schedule": "linear", "noise_at_step": 2}
    noisy, everywhere, branching = full.parts(FullConfig(**needed, branch_noise_type="targeted", temperature=0.3)).values()
    assert noisy.noise_type == everywhere.noise_type == noise.noise_types()
    assert noisy.controls == ["zero", "mean", "other", "pause"]
    assert (noisy.num_branches, noisy.temperature, noisy.schedule, noisy.noise_at_step) == (1, 0, "linear", 2)
    assert (everywhere.apply_noise_to_all_passes, everywhere.controls, everywhere.noise_at_step) == (True, [], 1)
    assert (everywhere.num_branches, everywhere.temperature, everywhere.top_p) == (1, 0, 1)
    assert (branching.noise_type, branching.num_branches, branching.temperature) == (["targeted"], 5, 0.3)
    assert (branching.top_p, branching.controls, branching.schedule) == (0.95, [], "linear")
    directed = FullConfig(**needed, noise_type="gaussian", branch_noise_type="targeted", noise_direction="same")
    assert [part.noise_direction for part in full.parts(directed).values()] == [None, None, "same"]
    with pytest.raises(ValueError, match="noise_direction: same has no effect without noise_type: targeted"):
        FullConfig(**needed, noise_type="gaussian", noise_direction="same")


def planted(only_first: int, only_second: int = 0, questions: int = 500) -> dict[str, Any]:
    """A comparison with clean in which so many answers became wrong, and right."""
    tested = significance.mcnemar(
        [True] * only_first + [False] * only_second + [True] * (questions - only_first - only_second),
        [False] * only_first + [True] * (questions - only_first),
    )
    return {"versus_clean": {**tested, "questions": questions}}


def test_the_most_noise_without_loss() -> None:
    def found(planted_losses: dict[float, dict[str, Any]], noise_type: str = "gaussian", margin: float = 2.0) -> float | None:
        summary = {f"{noise_type}@{scale}": one for scale, one in planted_losses.items()}
        scales = sorted(planted_losses, reverse=noise_type == "snr")
        return full.harmless_scale(summary, noise.NOISES[noise_type], scales, margin)

    assert found({1.0: planted(2, 1), 2.0: planted(150), 5.0: planted(0)}) == 1.0  # not 5: 2 is a loss
    assert found({1.0: planted(0), 2.0: planted(10)}) == 1.0  # 2 points
    assert found({1.0: planted(10)}, margin=5) == 1.0
    assert found({2.0: planted(150)}) is None
    assert found({5.0: planted(1), 1.0: planted(0, 150)}, "snr") == 1.0  # a gain
    loss = planted(21, 10, questions=100)  # 11 points that the test of 67 conditions does not find
    assert significance.holm([loss["versus_clean"]["p_value"]] * 67)[0] > 0.05
    assert found({1.0: loss}, margin=5) is None
    assert found({1.0: planted(0, questions=20)}, margin=5) is None  # no loss, but too few questions to exclude one
    no_noise = {"clean": {"versus_clean": None}}
    assert full.harmless_scale(no_noise, noise.NOISES["gaussian"], [0.0], 2.0) is None


def test_self_consistency_is_the_reference_of_branches_without_samples(
    suite: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = full.parts(load_config(FullConfig, [*suite, "temperature=0", "noise_scales=1.0"]))["branching"]
    finished = run_sweep(config, CPU)
    assert finished is not None
    found = full.branching_result(finished, full.summarise(finished.records))
    assert found["self_consistency"] == "self_consistency"
    assert list(full.shown_conditions(found)) == [
        "greedy, one answer",
        "self-consistency, no noise",
        "gaussian_scaled@1.0",
    ]
