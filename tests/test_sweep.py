"""The runner of the noise experiments: answers against the naive model, the same however they are batched, split or killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, chain_records, write_json
from naive import naive_decode, naive_perturb, naive_sampler
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from coconut import Coconut
from config import RunConfig
from dataset import get_question_latent_dataset
from experiments.answers.questions import BenchmarkQuestion, load_questions
from experiments.compare import report
from experiments.noise import results, sweep
from experiments.noise.progress import open_progress
from experiments.noise.results import write_results
from experiments.noise.settings import BranchConfig, SweepConfig
from experiments.noise.subjects import load_subject
from experiments.noise.summary import condition_summary
from experiments.noise.sweep import Preempted, clean_thoughts, conditions, run_sweep
from generation import MAX_N_LATENT
from noise import noise_generator, sampling_generator
from systems import models
from systems.checkpoint import Facts, id_facts
from systems.models import build_model, latent_ids, load_tokenizer
from systems.tokens import get_dataset
from thoughts import Intervention
from utils import UserError

CPU = torch.device("cpu")
QUESTIONS = 7
ANSWERED = {"error": None, "conditions": {}, "n_latents": 1, "seconds": 1.0}  # as little as a record can hold
TIMES = ("seconds", "timestamp", "git_commit", "processes", "threads")  # and what else does not change the answers


@pytest.fixture
def trained(model_directory: Path, tmp_path: Path) -> Path:
    """A checkpoint directory as run.py leaves it: as many thoughts as steps, at most three."""
    config = RunConfig(
        name="x", val_path="v", train_path="t", model_id=str(model_directory), from_scratch=True, method="coconut"
    )
    tokenizer = load_tokenizer(str(model_directory))
    ids = latent_ids(tokenizer, "coconut")
    torch.manual_seed(0)
    base = build_model(config, tokenizer, ids).base_causallm
    directory = tmp_path / "checkpoint"
    base.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    facts = Facts("coconut", 4, 1, 3, False, 9, 0.5, **id_facts(ids))
    write_json(directory / "coconut.json", asdict(facts))
    return directory


@pytest.fixture
def arguments(trained: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "noise",
        "results_path": str(tmp_path / "results"),
        "load_model_path": str(trained),
        "benchmark": "prosqa",
        "data_path": str(write_json(tmp_path / "questions.json", chain_records(QUESTIONS))),
        "max_new_tokens": 5,
        "batch_size": 16,
    }


BRANCHES = {
    "num_branches": 3,
    "temperature": 1.0,
    "top_p": 0.9,
    "noise_type": ["gaussian_scaled", "targeted"],
    "noise_scales": [0, 0.5, 2.0],
}


def run(arguments: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    finished = run_sweep(SweepConfig(**{**arguments, **changes}), CPU)
    assert finished is not None
    return finished.records


def texts(records: list[dict[str, Any]]) -> dict[tuple[int, str], list[str]]:
    return {
        (record["index"], key): [branch["text"] for branch in one["branches"]]
        for record in records
        for key, one in record["conditions"].items()
    }


# --- what is asked ---


def test_conditions() -> None:
    needed = {"name": "x", "model_id": "m", "benchmark": "prosqa"}
    greedy = conditions(SweepConfig(**needed, noise_type=["gaussian", "snr"], noise_scales=[0, 1, math.inf][:2]))
    assert [one.key for one in greedy] == ["no_latents", "greedy", "clean", "gaussian@1.0", "snr@0.0", "snr@1.0"]
    assert [one.distinct for one in greedy] == [1, 1, 0, 1, 1, 1]  # the clean answer is the greedy one
    voting = conditions(SweepConfig(**needed, num_branches=4, noise_type="targeted", noise_scales=[0.5]))
    keys = ["no_latents", "greedy", "clean", "self_consistency", "targeted-same@0.5", "targeted-opposite@0.5"]
    assert [(one.key, one.distinct) for one in voting] == list(zip(keys, [1, 1, 0, 4, 1, 1], strict=True))
    assert [one.temperature for one in voting] == [0, 0, 0, 0.7, 0, 0]
    sampled = conditions(SweepConfig(**needed, num_branches=4, temperature=0.9, shared_noise=True, noise_scales=0.5))
    assert [(one.key, one.distinct) for one in sampled] == [("no_latents", 1), ("greedy", 1), ("clean", 4), ("gaussian@0.5", 4)]
    shared = conditions(SweepConfig(**needed, num_branches=4, shared_noise=True, noise_scales=0.5))
    assert shared[-1].distinct == 1
    dropped = conditions(SweepConfig(**needed, num_branches=4, noise_scales=0.5, mc_dropout=[0.1, 0.2]))
    assert [(one.key, one.distinct) for one in dropped][-2:] == [("mc_dropout 0.1", 4), ("mc_dropout 0.2", 4)]
    assert dropped[-1].noise == Intervention(dropout=0.2)
    everything = SweepConfig(**needed, noise_type="all", controls="zero")
    assert len(conditions(everything)) == 3 + 8 + 6 + 10 + 6 + 8 + 6 + 5 + 5 + 3
    assert [one.key for one in conditions(everything)][-3:] == ["zero/all", "zero/first", "zero/after"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": None}, "model_id or load_model_path is missing"),
        ({"benchmark": "gsm9k"}, "unknown benchmark 'gsm9k'; did you mean 'gsm8k'"),
        ({"noise_type": "pink"}, "must be one of gaussian"),
        ({"noise_scales": [-1]}, "noise_scale is -1"),
        ({"noise_scales": [1, 1.0]}, "holds something twice"),
        ({"noise_scales": []}, "at least 1 item"),
        ({"controls": ["zero", "zero"]}, "holds something twice"),
        ({"mc_dropout": [1]}, "less than 1"),
        ({"name": "../x"}, "must be a folder below results_path"),
        ({"apply_noise_to_all_passes": True, "schedule": "linear"}, "contradict each other"),
        ({"noise_scale": 1}, "Extra inputs"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig(**{"name": "x", "model_id": "m", "benchmark": "prosqa", **changes})


# --- prompts ---


def test_prompts_of_a_checkpoint_are_those_of_the_evaluation(arguments: dict[str, Any]) -> None:
    subject = load_subject(SweepConfig(**arguments), CPU)
    data = get_dataset(arguments["data_path"], subject.tokenizer)
    assert subject.curriculum is not None
    expected = get_question_latent_dataset(
        subject.stage, data, subject.curriculum, subject.ids.start, subject.ids.latent, subject.ids.end
    )
    questions = load_questions("prosqa", arguments["data_path"])
    prompts = [subject.prompt(question) for question in questions]
    assert prompts == [row["input_ids"] for row in expected]
    assert [prompt.count(subject.ids.latent) for prompt in prompts] == [1 + number % 3 for number in range(QUESTIONS)]
    forced = load_subject(SweepConfig(**arguments, n_latents=5), CPU)
    assert {forced.prompt(question).count(subject.ids.latent) for question in questions} == {5}


def test_prompts_without_training(arguments: dict[str, Any], model_directory: Path, trained: Path) -> None:
    (trained / "coconut.json").unlink()
    subject = load_subject(SweepConfig(**arguments), CPU)
    assert subject.curriculum is None
    prompt = subject.prompt(load_questions("prosqa", arguments["data_path"])[0])
    assert prompt[-MAX_N_LATENT - 2 :] == [subject.ids.start, *[subject.ids.latent] * MAX_N_LATENT, subject.ids.end]
    [record, *_] = run(arguments, num_questions=1, noise_scales=1)
    assert record["n_latents"] == MAX_N_LATENT
    with pytest.raises(UserError, match="question 0 holds a marker"):
        subject.prompt(BenchmarkQuestion("prosqa", 0, "Is <|latent|> Tom?", ""))


# --- what is answered ---


def test_answers_are_those_of_the_naive_model(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Prompt, thoughts, noise, controls and samples of every condition, one by one and without a cache."""
    two_of_each = [record for record in chain_records(QUESTIONS) if len(record["steps"]) > 1]
    few = {
        "data_path": str(write_json(tmp_path / "few.json", two_of_each)),
        "num_branches": 2,
        "noise_scales": [0, 2.0],
        "max_new_tokens": 3,
        "seed": 3,
        "controls": ["zero", "mean", "other", "pause"],
    }
    config = SweepConfig(**{**arguments, **BRANCHES, **few})
    finished = run_sweep(config, CPU)
    assert finished is not None
    subject = load_subject(config, CPU)
    base, ids = subject.model.base_causallm, subject.ids
    questions = load_questions("prosqa", config.data_path)
    prompts = {one.index: torch.tensor([subject.prompt(one)]) for one in questions}
    clean = {}
    for index, prompt in prompts.items():
        clean[index] = naive_decode(base, ids, prompt, 1).embeds[0, : prompt.shape[1]][prompt[0] == ids.latent]
    mean = [torch.stack([path[step] for path in clean.values() if len(path) > step]).mean(dim=0) for step in range(3)]
    thoughts = sweep.clean_thoughts(subject, questions, 4, 3)
    checked = 0
    for record in finished.records:
        prompt, own = prompts[record["index"]], clean[record["index"]]
        plain = prompt[:, prompt[0] != ids.latent]
        other = thoughts.other(record["index"])
        assert other != record["index"]
        assert len(clean[other]) == len(own)
        stead = {
            "zero": [torch.zeros(32)] * 3,
            "mean": mean,
            "other": clean[other],
            "pause": [base.get_input_embeddings().weight[ids.latent].detach()] * 3,
        }
        for key, found in record["conditions"].items():
            assert found.get("displaced_by") == (other if key.startswith("other/") else None)
            for branch, given in enumerate(found["branches"]):
                sampler = naive_sampler(1.0, 0.9, sampling_generator(3, record["index"], branch))
                perturb: Any = None
                if "@" in key:
                    scale, (kind, _, direction) = float(key.split("@")[1]), key.split("@")[0].partition("-")
                    perturb = naive_perturb(
                        lambda number, b=branch, i=record["index"]: noise_generator(3, i, b, number),
                        scale,
                        len(own),
                        kind,
                        direction or None,
                    )
                elif "/" in key:
                    control, place = key.split("/")

                    def perturb(thought, number, place=place, instead=stead[control], own=own):
                        if number == 1 or place == "all":
                            return instead[number - 1]
                        return own[number - 1] if place == "after" else thought

                greedy = key in ("greedy", "no_latents") or "/" in key
                asked = plain if key == "no_latents" else prompt
                choose = {} if greedy else {"choose": sampler}
                expected = naive_decode(base, ids, asked, 3, perturb, **choose)
                new = expected.tokens[0, asked.shape[1] :].tolist()
                assert given["text"] == subject.text([token for token in new if token != ids.eos]), (record["index"], key)
                assert given["new_tokens"] == len(new)
                assert given["log_probability"] == pytest.approx(sum(expected.log_probabilities), rel=1e-3, abs=1e-3)
                checked += 1
    assert checked == 4 * (1 + 1 + 2 + 2 * 3 + 4 * 3)


def test_the_prompt_is_read_once_and_no_scale_twice(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the passes over prompts, and rows that are decoded: baselines and scale 0 are not computed again."""
    points, rows = [], []
    branch_point = sweep.Subject.branch_point

    def counting_point(self: Any, prompts: Any, at: int) -> Any:
        points.append(len(prompts))
        return branch_point(self, prompts, at)

    generate = sweep.Answerer._generate

    def counting_rows(self: Any, point: Any, branches: Any) -> Any:
        rows.append(len(branches))
        return generate(self, point, branches)

    monkeypatch.setattr(sweep.Subject, "branch_point", counting_point)
    monkeypatch.setattr(sweep.Answerer, "_generate", counting_rows)
    run(arguments, **BRANCHES)
    assert sum(points) == QUESTIONS * 2  # with thoughts and without
    assert sum(rows) == QUESTIONS * (1 + 1 + 3 + 3 * 3 * 2)
    assert max(rows) <= 16
    rows.clear()
    run(arguments, name="greedy", noise_type="all", noise_scales=[0, 1])
    assert sum(rows) == QUESTIONS * (1 + 1 + 6 + 2 + 1)  # six types, targeted both ways, and snr at 0, which is noise


def test_batches_by_positions_never_take_more(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = sweep.generate_from

    def watched(model: Any, point: Any, branches: Any, *rest: Any) -> Any:
        sizes.append(len(branches) * (point.prompt.mask.shape[1] + arguments["max_new_tokens"]))
        return original(model, point, branches, *rest)

    monkeypatch.setattr(sweep, "generate_from", watched)
    wanted = texts(run(arguments, **BRANCHES, name="rows", num_questions=3))
    sizes.clear()
    thought: list[int] = []
    paths = sweep._paths
    monkeypatch.setattr(sweep, "_paths", lambda subject, chunk: thought.append(len(chunk)) or paths(subject, chunk))
    more = {"num_questions": 3, "controls": ["mean"], "tokens_per_batch": 100}
    found = run(arguments, **BRANCHES, name="positions", **more)
    assert len(thought) > 1  # a batch of all questions would not fit
    assert (
        texts([{**one, "conditions": {k: v for k, v in one["conditions"].items() if "/" not in k}} for one in found]) == wanted
    )
    assert max(sizes) <= 100
    assert len(sizes) > 3


def test_answers_do_not_depend_on_the_batch(arguments: dict[str, Any]) -> None:
    """Nor do the distances of the branches: 200 rows hold questions of one, two and three thoughts."""
    asked = {**arguments, **BRANCHES, "num_questions": 3, "mc_dropout": 0.3}
    one, many = (run(asked, name=f"b{size}", batch_size=size) for size in (1, 200))
    assert texts(one) == texts(many)
    for first, second in zip(one, many, strict=True):
        for key, outcome in first["conditions"].items():
            same = second["conditions"][key]
            assert outcome["votes"] == same["votes"]
            assert outcome["majority"] == same["majority"]
            assert outcome["noise_ratio"] == (same["noise_ratio"] and pytest.approx(same["noise_ratio"], rel=1e-3))
            distances, others = ([*(found["diversity"] or {}).values()] for found in (outcome, same))
            assert [one is None for one in distances] == [one is None for one in others]
            assert [one or 0 for one in distances] == pytest.approx([one or 0 for one in others], rel=1e-3)
            assert (outcome["noise_ratio"] is None) == ("@" not in key)
            assert (outcome["diversity"] is None) == (key in ("greedy", "no_latents"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_direction": "same"}, "noise_direction: same has no effect without noise_type: targeted"),
        ({"shared_noise": True}, "shared_noise: True has no effect without num_branches of at least 2"),
        ({"top_p": 0.9}, "top_p: 0.9 has no effect without temperature above 0, or branches"),
        ({"subset": "p1"}, "subset: p1 has no effect without the hub's data set in place of data_path"),
        ({"split": "train"}, "split: train has no effect without the hub's data set in place of data_path"),
        ({"self_consistency_temperature": 0.3}, "self_consistency_temperature: 0.3 has no effect without temperature: 0 and"),
        ({"lambda_decay": 1.0}, "lambda_decay: 1.0 has no effect without schedule: exponential or adaptive"),
    ],
)
def test_keys_without_effect_are_refused(arguments: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig(**arguments, **change)


def test_noise_at_a_step_that_few_or_no_questions_have(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The questions have one, two or three thoughts; noise of 100 times the third one reaches two of seven."""
    with pytest.raises(UserError, match="noise_at_step: 4: no question has so many thoughts; the most is 3"):
        run(arguments, noise_at_step=4)
    finished = run_sweep(SweepConfig(**arguments, noise_type="gaussian_scaled", noise_scales=100, noise_at_step=3), CPU)
    assert finished is not None
    assert "2 of 7 questions have 3 thoughts; the others get no noise" in capsys.readouterr().out
    for record in finished.records:  # as if noise made every answer wrong that it reached, and all others were right
        for outcome in record["conditions"].values():
            outcome["majority"]["correct"] = outcome["noise_ratio"] is None
    found = write_results(finished)["gaussian_scaled@100.0"]
    assert (found["total"], found["perturbed"], found["versus_clean"]["questions"]) == (7, 2, 2)
    [path] = finished.config.directory.glob("gaussian_scaled_*.json")
    setting = json.loads(path.read_text())  # the decay is that of the questions which noise reached
    assert (setting["results"]["100.0"]["accuracy"], setting["half_scale"]) == (0, 50)


def test_a_question_that_cannot_be_thought_about_takes_no_other_with_it(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Controls need the thoughts of all questions, of which a batch holds many."""
    rows = chain_records(4)
    rows[1]["question"] += " <|latent|>"
    path = write_json(tmp_path / "marker.json", rows)
    records = run(arguments, data_path=str(path), batch_size=64, noise_scales=[5.0], controls=["mean"])
    assert [record["error"] is None for record in records] == [True, False, True, True]


def test_distances_are_undefined_where_no_thought_comes_after_the_noise(arguments: dict[str, Any]) -> None:
    """The questions have one, two and three thoughts; the mean is over those that have one after the first."""
    records = run(arguments, num_branches=3, noise_scales=[5.0], num_questions=3)
    found = [record["conditions"]["gaussian@5.0"]["diversity"] for record in records]
    assert [one["diversity"] is None for one in found] == [True, False, False]
    assert all(one["all_steps"] > 0 for one in found)
    summarised = condition_summary(records, "gaussian@5.0")
    assert summarised["diversity"] == pytest.approx((found[1]["diversity"] + found[2]["diversity"]) / 2)


def test_the_decay_of_a_schedule_is_a_key(arguments: dict[str, Any]) -> None:
    """A decay so large that nothing is left is no schedule at all; none is the constant one."""
    given = {"noise_type": "gaussian_scaled", "noise_scales": 5, "max_new_tokens": 12}
    none, gone, stays, constant = (
        texts(run(arguments, **given, name=str(number), **change))
        for number, change in enumerate(
            [
                {},
                {"schedule": "exponential", "lambda_decay": 1e3},
                {"schedule": "exponential", "lambda_decay": 0},
                {"schedule": "constant"},
            ]
        )
    )
    assert stays == constant != none
    assert gone.keys() == none.keys()


def test_a_model_is_loaded_in_the_precision_it_runs_in(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the memory would be needed on the way otherwise; the weights are the rounded ones in either case."""
    asked = []
    original = models.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*positional: Any, **options: Any) -> Any:
        asked.append(options["dtype"])
        return original(*positional, **options)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    full, half = (load_subject(SweepConfig(**arguments, dtype=dtype), CPU).model for dtype in ("float32", "bfloat16"))
    assert asked == [torch.float32, torch.bfloat16]
    for one, other in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)


def test_layers_that_accelerate_places_answer_alike(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here all on the CPU; several GPUs are not to be had in a test."""
    assert texts(run(arguments, name="placed", device_map="auto")) == texts(run(arguments))
    monkeypatch.setattr("systems.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="device_map: auto spreads a model over all GPUs: start a single process"):
        load_subject(SweepConfig(**arguments, device_map="auto"), CPU)


def test_low_precision_and_layers_run(arguments: dict[str, Any]) -> None:
    for number, change in enumerate([{"dtype": "bfloat16"}, {"dtype": "float16"}, {"hidden_layer_idx": 1}]):
        records = run(arguments, **change, name=str(number), noise_scales=[0.5], num_questions=2)
        assert [record["error"] for record in records] == [None, None]
    with pytest.raises(UserError, match="thought_map: .*layer is 7; the model has 2 layers: use -1, or 0 to 2"):
        run(arguments, hidden_layer_idx=7)
    with pytest.raises(ValueError, match="hidden_layer_idx and thought_map contradict each other: set one of them"):
        run(arguments, hidden_layer_idx=1, thought_map="norm")


# --- failures ---


def test_a_question_that_fails_is_counted_apart_and_tried_again(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = run(arguments, noise_scales=1, name="clean")
    prompt = sweep.Subject.prompt

    def failing(self: Any, question: Any) -> list[int]:
        if question.index == 3:
            raise RuntimeError("no\n room")
        return prompt(self, question)

    monkeypatch.setattr(sweep.Subject, "prompt", failing)
    finished = run_sweep(SweepConfig(**arguments, noise_scales=1), CPU)
    assert finished is not None
    assert [record["error"] for record in finished.records] == [None] * 3 + ["RuntimeError: no room"] + [None] * 3
    assert finished.info["errors"] == 1
    summary = write_results(finished)
    assert (summary["clean"]["total"], summary["clean"]["errors"]) == (6, 1)
    assert texts(finished.records[:3]) == texts(clean[:3])
    monkeypatch.setattr(sweep.Subject, "prompt", prompt)
    assert texts(run(arguments, noise_scales=1)) == texts(clean)


def test_when_all_fail_the_first_reason_is_said(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"all 7 questions failed; the first with ValueError: prompt and new tokens need"):
        run(arguments, max_new_tokens=500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 0}, "is of stage 0, which has no thoughts yet"),
        ({"method": "pause_as_thought"}, "was trained with method pause_as_thought, which has no thoughts to put noise into"),
    ],
)
def test_checkpoints_without_thoughts(arguments: dict[str, Any], trained: Path, change: dict[str, Any], message: str) -> None:
    facts = json.loads((trained / "coconut.json").read_text())
    write_json(trained / "coconut.json", {**facts, **change})
    with pytest.raises(UserError, match=message):
        run(arguments)


def test_records_without_steps_where_their_number_counts(arguments: dict[str, Any], tmp_path: Path) -> None:
    records = [{key: one[key] for key in ("question", "answer")} for one in chain_records(2)]
    path = str(write_json(tmp_path / "bare.json", records))
    with pytest.raises(UserError, match="was trained with as many thoughts as steps"):
        run(arguments, data_path=path)
    assert len(run(arguments, data_path=path, n_latents=2)) == 2
    assert [one["n_latents"] for one in run(arguments, data_path=path, name="max", eval_latents="max")] == [3, 3]


def test_the_number_of_thoughts_follows_eval_latents(arguments: dict[str, Any]) -> None:
    """The checkpoint has as many thoughts as the question's steps, one to three, unless told otherwise."""
    for value, expected in [("gold", [1, 2, 3, 1, 2, 3, 1]), ("max", [3] * 7), (5, [5] * 7)]:
        finished = run_sweep(SweepConfig(**arguments, eval_latents=value, noise_scales=1), CPU)
        assert finished is not None
        assert [record["n_latents"] for record in finished.records] == expected
        arguments["name"] += "x"


def test_a_state_dict_file_must_be_converted(arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="systems.checkpoint convert .*weights.pt"):
        run(arguments, load_model_path=str(tmp_path / "weights.pt"))


def test_spellings_of_one_answer_vote_together(arguments: dict[str, Any]) -> None:
    """Two branches say x + 1, in two ways, and three each something else."""
    answerer = sweep.Answerer(SweepConfig(**arguments, num_branches=5, temperature=1.0), None, [], None)  # type: ignore[arg-type]
    question = BenchmarkQuestion("math", 0, "?", "x+1")
    said = [r"\boxed{3}", r"\boxed{x+1}", r"\boxed{4}", r"\boxed{1+x}", r"\boxed{5}"]
    given = [sweep.Answer(text, [-1.0], None, torch.zeros(2, 4)) for text in said]
    judged = answerer._judge(question, sweep.Condition("clean", 5, 1.0), given)
    for name in ("majority", "probability", "probability_sum", "noise_weighted"):
        assert (judged[name]["votes"], judged[name]["correct"]) == (2, True), name
    assert [branch["correct"] for branch in judged["branches"]] == [False, True, False, True, False]


def test_only_the_sum_of_log_probabilities_prefers_short_texts(arguments: dict[str, Any]) -> None:
    answerer = sweep.Answerer(SweepConfig(**arguments, num_branches=2, temperature=1.0), None, [], None)  # type: ignore[arg-type]
    given = [
        sweep.Answer(r"\boxed{3}", [-0.5] * 4, None, torch.zeros(2, 4)),
        sweep.Answer(r"\boxed{4}", [-1.0], None, torch.zeros(2, 4)),
    ]
    judged = answerer._judge(BenchmarkQuestion("math", 0, "?", "3"), sweep.Condition("clean", 2, 1.0), given)
    assert (judged["probability"]["answer"], judged["probability_sum"]["answer"]) == ("3", "4")


def test_a_text_without_a_probability_is_no_answer(arguments: dict[str, Any]) -> None:
    """A damaged model computes nan; that must fail the question, not count as a likely text."""
    answerer = sweep.Answerer(SweepConfig(**arguments), None, [], None)  # type: ignore[arg-type]
    given = [sweep.Answer(r"\boxed{3}", [-0.5, math.nan], None, torch.zeros(2, 4))]
    question, condition = BenchmarkQuestion("math", 0, "?", "3"), sweep.Condition("clean", 1, 0.0)
    with pytest.raises(ValueError, match="must be at most 0"):
        answerer._judge(question, condition, given)
    endless = sweep.Answer(r"\boxed{3}", [-0.5], {"scale_ratio": math.inf}, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite: inf"):
        answerer._judge(question, condition, [endless])


# --- stopping and going on ---


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def result_files(directory: Path) -> dict[str, str]:
    """Every result file's text but for the times, under its name without the timestamp."""
    found = {}
    for path in directory.glob("*.json"):
        content = json.loads(path.read_text())
        found[path.name.rsplit("_", 1)[0]] = json.dumps(without_times(content), indent=1)
    return found


def finish(arguments: dict[str, Any], **changes: Any) -> dict[str, str]:
    """The result files of a whole run, without figures."""
    more = {"controls": ["zero"], "mc_dropout": 0.3, "batch_size": 20}
    config = SweepConfig(**{**arguments, **BRANCHES, **more, **changes})
    finished = run_sweep(config, CPU)
    assert finished is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_draw", lambda *_: None)
        write_results(finished)
    return result_files(config.directory)


@pytest.mark.parametrize("after", [0, 4])
def test_a_stopped_run_goes_on_to_the_same_files(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Stopped in the middle of a chunk, with a torn line left behind."""
    whole = finish(arguments, name="whole")
    assert set(whole) == {"gaussian_scaled", "targeted-same", "targeted-opposite", "controls", "mc_dropout", "summary"}
    answer, calls = sweep.Answerer._answer, []

    def stopping(self: Any, questions: Any) -> Any:
        calls.append(len(questions))
        if len(calls) > after:
            raise Preempted("SIGTERM")
        return answer(self, questions)

    monkeypatch.setattr(sweep.Answerer, "_answer", stopping)
    config = SweepConfig(**{**arguments, **BRANCHES, "controls": ["zero"], "mc_dropout": 0.3, "batch_size": 20})
    assert run_sweep(config, CPU) is None
    assert not list(config.directory.glob("*.json"))
    with (config.directory / "progress" / "part-0.jsonl").open("a") as file:
        file.write('{"index": 6, "er')
    monkeypatch.setattr(sweep.Answerer, "_answer", answer)
    assert finish(arguments) == {name: text.replace('"whole"', '"noise"') for name, text in whole.items()}
    monkeypatch.setattr(sweep.Answerer, "_answer", stopping)
    assert finish(arguments) == finish(arguments)  # a finished one is only written out again


def test_other_settings_are_refused_once_something_is_answered(
    arguments: dict[str, Any], trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = sweep.Answerer._answer
    monkeypatch.setattr(sweep.Answerer, "_answer", lambda self, questions: (_ for _ in ()).throw(Preempted("SIGTERM")))
    assert run_sweep(SweepConfig(**arguments), CPU) is None
    assert run_sweep(SweepConfig(**{**arguments, "seed": 3}), CPU) is None  # nothing is lost
    monkeypatch.setattr(sweep.Answerer, "_answer", answer)
    run(arguments)
    for change, key in [
        ({"seed": 1}, "seed 0, this one 1"),
        ({"noise_scales": 1}, "noise_scales None"),
        ({"dtype": "bfloat16"}, "dtype"),
    ]:
        with pytest.raises(
            UserError, match=f"settings.json: the experiment there has {key}.*choose another name, or set fresh"
        ):
            run(arguments, **change)
    write_json(tmp_path / "questions.json", chain_records(QUESTIONS)[::-1])
    with pytest.raises(UserError, match="the experiment there has questions_sha256"):
        run(arguments)
    write_json(tmp_path / "questions.json", chain_records(QUESTIONS))
    weights = load_file(trained / "model.safetensors")
    changed = {name: value + 0.01 if "layers.1.mlp.up" in name else value for name, value in weights.items()}
    save_file(changed, trained / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the experiment there has weights_sha256"):
        run(arguments)
    assert run(arguments, fresh=True)
    assert run(arguments, batch_size=3)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_pause_is_an_embedding_as_the_model_reads_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From transformers 5 on Gemma's embedding multiplies its table."""
    base, ids = tiny_model(family)
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
    monkeypatch.setattr(sweep, "_paths", lambda subject, questions: {one: torch.ones(2, 32) for one in questions})
    thoughts = clean_thoughts(SimpleNamespace(model=model, ids=ids), [0, 1], 1, 0)  # type: ignore[arg-type, list-item]
    with torch.no_grad():
        torch.testing.assert_close(thoughts.pause, model.embedding(torch.tensor([[ids.latent]]))[0, 0].float())


def test_any_two_conditions_are_compared(arguments: dict[str, Any]) -> None:
    run(arguments, noise_scales=[5.0], controls="zero")
    directory = Path(arguments["results_path"]) / "noise"
    line = report(directory, ["clean", "zero/all"])
    assert "zero/all minus clean" in line
    assert "McNemar p" in line
    assert report(directory, []).splitlines() == [
        "no_latents",
        "greedy",
        "clean",
        "gaussian@5.0",
        "zero/all",
        "zero/first",
        "zero/after",
    ]
    with pytest.raises(UserError, match="no condition 'gaussian@5'; there are no_latents, greedy, clean"):
        report(directory, ["clean", "gaussian@5"])
    run({**arguments, "name": "later"}, noise_scales=[5.0], noise_at_step=2)
    other = directory.with_name("later")
    both = report(directory, ["clean", "clean"], other)
    assert f"{other} clean minus {directory} clean: +0.0 points" in both
    assert "only in the second 0 of 7 questions" in both
    assert "later gaussian@5.0 minus" in report(directory, ["gaussian@5.0", "gaussian@5.0"], other)
    within, between = (report(directory, ["zero/all", "clean"], place).split(": ")[1] for place in (None, other))
    assert within == between  # the clean answers are the same
    with pytest.raises(UserError, match="later: no condition 'zero/all'"):
        report(directory, ["clean", "zero/all"], other)
    run({**arguments, "name": "RUN@best"}, noise_scales=[5.0])
    best = directory.with_name("RUN@best")
    assert f"{best} clean minus {best} clean: +0.0 points" in report(best, ["clean", "clean"], best)  # no noise by its "@"
    for part in (other / "progress").glob("*.jsonl"):
        part.write_text(part.read_text().replace('"gold": "', '"gold": "not '))
    with pytest.raises(UserError, match="did not ask the same questions"):
        report(directory, ["clean", "clean"], other)
    with pytest.raises(UserError, match="no questions of an experiment there"):
        report(directory / "x", [])


def test_progress_of_several_processes(tmp_path: Path) -> None:
    """Parts are read together; what failed gives way to what came of it later, in whichever part."""
    progress = open_progress(tmp_path, {"a": 1}, False)
    assert progress.records() == []
    lines = [{"index": 4, **ANSWERED}, {"index": 1, "error": "x"}], [{"index": 1, **ANSWERED}, {"index": 0, "error": "y"}]
    for rank, rows in enumerate(lines):
        (progress.folder / f"part-{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"ind')
    assert [(one["index"], one["error"]) for one in progress.records()] == [(0, "y"), (1, None), (4, None)]
    again = open_progress(tmp_path, {"a": 1}, False)
    assert again.timestamp == progress.timestamp
    assert [path.name for path in sorted(progress.folder.glob("part*"))] == ["part-0.jsonl"]
    assert [one["index"] for one in again.records()] == [1, 4]
    assert open_progress(tmp_path, {"a": 2}, True).records() == []
    (progress.folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json: damaged or of another version"):
        open_progress(tmp_path, {"a": 2}, False)


def test_one_experiment_has_one_set_of_files(tmp_path: Path) -> None:
    """Other settings under its name are refused, finished or not; `fresh` removes its files and nothing else."""
    progress = open_progress(tmp_path, {"a": 1}, False)
    progress.append([{"index": 0, **ANSWERED}])
    ours = ["gaussian_20260101-000000.json", "noise_types.png", "table.txt", "config.yaml"]
    for name in [*ours, "notes.md", "poster.png", "notes_1-2.json"]:
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="the experiment there has a 1, this one 2: choose another name, or set fresh: true"):
        open_progress(tmp_path, {"a": 2}, False)
    assert all((tmp_path / name).exists() for name in ours)
    open_progress(tmp_path, {"a": 2}, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md", "notes_1-2.json", "poster.png", "progress"]


def test_a_setting_that_is_new_counts_as_its_default(tmp_path: Path) -> None:
    progress = open_progress(tmp_path, {"a": 1}, False)
    progress.append([{"index": 0, **ANSWERED}])
    again = open_progress(tmp_path, {"a": 1, "new": 5}, False, {"new": 5})
    assert [one["index"] for one in again.records()] == [0]
    with pytest.raises(UserError, match="has new 5, this one 6"):  # something was answered with 5
        open_progress(tmp_path, {"a": 1, "new": 6}, False, {"new": 5})


def test_records_say_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of other settings, and lines that are none, are left out; records of another commit are named."""
    monkeypatch.setattr("experiments.noise.progress.git_commit", lambda: "first")
    progress = open_progress(tmp_path, {"a": 1}, False)
    progress.append([{"index": 0, **ANSWERED}])
    part = progress.folder / "part-0.jsonl"
    foreign = {"index": 1, **ANSWERED, "settings_sha256": "other"}
    of_version_01, nothing_answered = json.dumps({"index": 2, **ANSWERED}), json.dumps({"index": 5, "error": None})
    part.write_text(part.read_text() + json.dumps(foreign) + f"\n\n[1]\nnonsense\n{of_version_01}\n{nothing_answered}\n")
    assert [one["index"] for one in progress.records()] == [0, 2]
    said = capsys.readouterr().out
    assert "line 3 is left out" in said
    assert "an answered question without conditions, n_latents, seconds; line 7 is left out" in said
    monkeypatch.setattr("experiments.noise.progress.git_commit", lambda: "second")
    again = open_progress(tmp_path, {"a": 1}, False)
    assert "questions answered by other code: a commit that is not known, first; now second" in capsys.readouterr().out
    again.append([{"index": 3, **ANSWERED}])
    assert [one.get("git_commit") for one in again.records()] == ["first", None, "second"]


def test_two_sweeps_of_one_name_exclude_each_other(arguments: dict[str, Any]) -> None:
    directory = Path(arguments["results_path"]) / "noise"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(directory)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="another run is writing there"):
            run(arguments, noise_scales=[5.0])
        holder.communicate(b"")
    run(arguments, noise_scales=[5.0])


HOLD_LOCK = """
import sys, pathlib
from systems.storage import alone
with alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_mean_thought_does_not_depend_on_who_thought(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of several processes in any order give the same thoughts in the same order, and so the same sums."""
    config = SweepConfig.model_validate(arguments)
    subject = load_subject(config, torch.device("cpu"))
    questions = load_questions(config.benchmark, config.data_path)
    whole = clean_thoughts(subject, questions, 2, 0)

    def turned(mine: dict[int, torch.Tensor]) -> list[dict[int, torch.Tensor]]:
        return [{index: mine[index]} for index in reversed(mine)]

    monkeypatch.setattr("systems.distributed.gather_objects", turned)
    assert [*clean_thoughts(subject, questions, 2, 0).paths] == [*whole.paths] == sorted(whole.paths)
    assert torch.equal(clean_thoughts(subject, questions, 2, 0).mean, whole.mean)


def program(name: str, arguments: dict[str, Any], *, processes: int = 1, **changes: Any) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    values = [f"{key}={json.dumps(value)}" for key, value in {**arguments, **BRANCHES, **changes}.items()]
    return [sys.executable, *torchrun, str(ROOT / name), *values]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_two_processes_and_a_real_signal(arguments: dict[str, Any]) -> None:
    """SIGTERM ends the program with 0 and a line; two processes finish what one began, to the same files."""
    whole = finish(arguments, name="whole", controls=[], mc_dropout=[])
    slow = {"batch_size": 1, "max_new_tokens": 60}
    process = subprocess.Popen(program("test.py", arguments, **slow), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    part = Path(arguments["results_path"]) / "noise" / "progress" / "part-0.jsonl"
    for _ in range(1000):
        time.sleep(0.1)
        if part.exists() or process.poll() is not None:
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output
    subprocess.run(
        program("test.py", arguments, processes=2, fresh=True, batch_size=20),
        check=True,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=120,
    )
    both = result_files(part.parents[1])
    assert both == {name: text.replace('"whole"', '"noise"') for name, text in whole.items()}


def test_noisy_experiments_have_branches_by_default() -> None:
    config = BranchConfig(name="x", model_id="m", benchmark="gsm8k")
    assert (config.num_branches, config.temperature, config.max_new_tokens) == (5, 0.7, 256)
