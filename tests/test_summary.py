"""Numbers of noise experiments, by hand on small records."""

from __future__ import annotations

import io
import json
import math
import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from evaluation import interval
from experiments.answers.benchmarks import NO_ANSWER
from experiments.answers.judging import AGGREGATIONS
from experiments.noise import summary
from experiments.significance import EXPONENTIAL, HYPERBOLIC, LINEAR
from noise import NOISES, find_noise

GOLD = "18"


def outcome(answers: list[str], ratio: float | None = None, diversity: float | None = None, tokens: int = 10) -> dict[str, Any]:
    """What a condition made of a question whose answer is 18; branch b has tokens + b tokens, the earlier the likelier."""
    branches = [
        {
            "text": answer,
            "answer": answer,
            "correct": answer == GOLD,
            "new_tokens": n,
            "log_probability": -n * (n - tokens + 1.0),
        }
        for n, answer in enumerate(answers, start=tokens)
    ]
    names = ("diversity", "all_steps", "late_half", "normalised")
    paths = None if diversity is None else {name: diversity * (place + 1) for place, name in enumerate(names)}
    counts = {answer: answers.count(answer) for answer in answers}
    ratios = None if ratio is None else [ratio] * len(answers)
    chosen = summary.votes(branches, ratios or [0.0] * len(answers), operator.eq)
    return {"branches": branches, "votes": counts, **chosen, "noise_ratio": ratios, "diversity": paths}


def record(index: int, conditions: dict[str, Any], error: str | None = None) -> dict[str, Any]:
    facts = {"index": index, "question": "How many?", "gold": GOLD, "n_latents": 8}
    return {**facts, "error": error, "conditions": conditions}


FAILED = record(9, {}, "ValueError: no such thing")
FIVE = [
    record(0, {"snr@1.0": outcome(["18"] * 5, ratio=1.0, diversity=2.0, tokens=20)}),
    record(1, {"snr@1.0": outcome(["7", "18", "18", "7", "7"], ratio=1.5, diversity=1.0)}),
    record(2, {"snr@1.0": outcome(["18", "7", "7", "18", NO_ANSWER], ratio=0.5, diversity=0.0)}),  # a tie, the earliest wins
    record(3, {"snr@1.0": outcome([NO_ANSWER] * 5, ratio=1.0, diversity=1.0)}),
    FAILED,
]


# --- keys ---


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("gaussian@0.1", ("gaussian", None, 0.1)),
        ("gaussian_scaled@2.0", ("gaussian_scaled", None, 2.0)),
        ("targeted-opposite@0.5", ("targeted", "opposite", 0.5)),
        ("snr@inf", ("snr", None, math.inf)),
        ("snr@-1.0", ("snr", None, -1.0)),
        ("gaussian@1e-05", ("gaussian", None, 1e-5)),
    ],
)
def test_keys(key: str, parts: tuple[str, str | None, float]) -> None:
    assert summary.condition_key(find_noise(*parts[:2]), parts[2]) == key


def test_one_spelling_of_a_key() -> None:
    assert summary.condition_key(NOISES["gaussian"], 2) == "gaussian@2.0"
    assert summary.condition_key(NOISES["gaussian"], -0.0) == "gaussian@0.0"


def test_more_on_the_axis_is_more_noise() -> None:
    for kind in NOISES.values():
        places = [kind.amount(scale) for scale in kind.scales]
        assert places == sorted(places)
    assert [NOISES["snr"].amount(scale) for scale in (math.inf, 4, 0, -1)] == [0, 0.25, 1000, 1000]
    assert NOISES["gaussian"].amount(4) == 4


def test_no_noise_is_the_clean_condition() -> None:
    assert {summary.measured_key(kind, kind.no_noise) for kind in NOISES.values()} == {"clean"}
    assert summary.measured_key(NOISES["snr"], 0) == "snr@0.0"
    assert summary.measured_key(NOISES["targeted-same"], 0.5) == "targeted-same@0.5"


# --- one condition ---


def test_a_condition_of_five_branches() -> None:
    found = summary.condition_summary(FIVE, "snr@1.0")
    low, high = interval(2, 4)
    assert (found["correct"], found["total"], found["errors"]) == (2, 4, 1)
    assert (found["accuracy"], found["low"], found["high"]) == pytest.approx((50, 100 * low, 100 * high))
    assert found["status"] == "Degraded"
    assert found["no_answer"] == pytest.approx(100 * 6 / 20)
    assert found["branch_accuracy"] == pytest.approx(100 * 9 / 20)
    assert found["any_correct"] == 75  # one of four questions has no right branch
    assert found["best_correct"] == 50
    assert found["agreement"] == pytest.approx((1 + 0.6 + 0.4 + 0) / 4)
    assert found["new_tokens"] == pytest.approx((22 + 3 * 12) / 4)
    assert found["noise_ratio"] == pytest.approx(1)
    assert (found["diversity"], found["all_steps"], found["late_half"], found["normalised"]) == (1, 2, 3, 4)


def test_each_aggregation_is_judged_by_its_own_answers() -> None:
    found = summary.condition_summary(FIVE, "snr@1.0")["aggregation"]
    # Question 1: 7 has the earliest, likeliest branch; two branches for 18 do not outweigh it in any vote.
    assert found == {name: {"correct": 2, "accuracy": 50.0} for name in AGGREGATIONS}
    records = [record(0, {"clean": outcome(["18", "7", "7"])})]  # the likeliest branch is right, the majority is not
    assert summary.condition_summary(records, "clean")["best_correct"] == 100
    silent = [record(0, {"clean": outcome([NO_ANSWER, "18", "7"])})]  # saying nothing is likelier, but no answer
    assert summary.condition_summary(silent, "clean")["best_correct"] == 100
    found = summary.condition_summary(records, "clean")
    assert found["correct"] == 0
    assert [found["aggregation"][name]["correct"] for name in AGGREGATIONS] == [0, 1, 1, 0]


def test_coverage_by_threshold() -> None:
    points = summary.condition_summary(FIVE, "snr@1.0")["coverage"]
    assert [point["threshold"] for point in points] == [1, 2, 3, 4, 5]
    assert [point["level"] for point in points] == [None, "minimal", "moderate", "strong", "unanimous"]
    assert [point["answered"] for point in points] == [3, 3, 2, 1, 1]
    assert [point["coverage"] for point in points] == [75, 75, 50, 25, 25]
    assert [point["accuracy"] for point in points] == pytest.approx([200 / 3, 200 / 3, 50, 100, 100])


def test_a_condition_of_one_branch() -> None:
    records = [record(0, {"greedy": outcome(["18"])}), record(1, {"greedy": outcome([NO_ANSWER])})]
    found = summary.condition_summary(records, "greedy")
    assert (found["accuracy"], found["branch_accuracy"], found["no_answer"], found["agreement"]) == (50, 50, 50, 0.5)
    assert found["coverage"] == []
    assert [found[name] for name in ("noise_ratio", "diversity", "all_steps", "late_half", "normalised")] == [None] * 5


@pytest.mark.parametrize("records", [[], [FAILED], [FAILED, record(0, {"greedy": outcome(["18"])})]])
def test_a_condition_that_no_question_has(records: list[dict[str, Any]]) -> None:
    found = summary.condition_summary(records, "clean")
    assert (found["correct"], found["total"], found["errors"]) == (0, 0, len([one for one in records if one["error"]]))
    assert [found[name] for name in ("accuracy", "low", "high", "status", "no_answer", "agreement")] == [None] * 6
    assert found["coverage"] == []


def test_a_question_that_failed_midway_counts_as_an_error_alone() -> None:
    records = [record(0, {"clean": outcome(["18"])}), record(1, {"clean": outcome(["7"])}, error="RuntimeError: memory")]
    found = summary.condition_summary(records, "clean")
    assert (found["correct"], found["total"], found["errors"], found["accuracy"]) == (1, 1, 1, 100)
    assert summary.compare(records, "clean", "clean")["questions"] == 1


@pytest.mark.parametrize("ratio", [math.inf, math.nan])
def test_a_ratio_that_is_no_number_is_left_out(ratio: float) -> None:
    records = [record(0, {"snr@0.0": outcome(["18"] * 2, ratio=0.5)}), record(1, {"snr@0.0": outcome(["18"] * 2)})]
    assert summary.condition_summary(records, "snr@0.0")["noise_ratio"] == 0.5
    records[1]["conditions"]["snr@0.0"]["noise_ratio"] = [0.5, ratio]
    assert summary.condition_summary(records, "snr@0.0")["noise_ratio"] is None


BRANCHES = st.lists(st.sampled_from(["18", "7", NO_ANSWER]), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.lists(BRANCHES, min_size=1, max_size=6))
def test_coverage_falls_to_the_unanimous_questions(questions: list[list[str]]) -> None:
    found = summary.condition_summary(
        [record(number, {"clean": outcome(one)}) for number, one in enumerate(questions)], "clean"
    )
    points = found["coverage"]
    assert [point["answered"] for point in points] == sorted((point["answered"] for point in points), reverse=True)
    unanimous = [one for one in questions if len(set(one)) == 1 and one[0] != NO_ANSWER]
    assert points[-1]["answered"] == len(unanimous)
    assert points[-1]["correct"] == unanimous.count([GOLD] * 3)
    assert points[0]["correct"] == found["correct"]  # at threshold 1 only those without any answer are left out
    assert found["low"] <= found["accuracy"] <= found["high"]
    json.dumps(found, allow_nan=False)


# --- comparisons ---


def paired(rows: list[tuple[str | None, ...]], keys: tuple[str, ...] = ("clean", "snr@1.0")) -> list[dict[str, Any]]:
    """Questions with one branch in each condition; None: this question lacks the condition."""
    return [
        record(
            number,
            {
                key: outcome([answer], 1.0 if "@" in key else None)
                for key, answer in zip(keys, row, strict=True)
                if answer is not None
            },
        )
        for number, row in enumerate(rows)
    ]


def test_noise_is_judged_where_it_reached_a_thought() -> None:
    """Questions with too few thoughts for noise_at_step are counted apart: without noise they only dilute the loss."""
    reached = paired([("18", "7")] * 3)
    untouched = [record(9 + n, {"clean": outcome(["18"]), "snr@1.0": outcome(["18"])}) for n in range(7)]
    assert summary.condition_summary([*reached, *untouched], "snr@1.0")["perturbed"] == 3
    found = summary.compare([*reached, *untouched], "clean", "snr@1.0")
    assert (found["questions"], found["difference"]) == (3, -100)
    assert "noise reached 3 of them" in " ".join(shown(summary.summary_table(summary.summarise([*reached, *untouched]), "")))


def test_two_conditions_on_the_questions_that_have_both() -> None:
    rows = [("18", "7")] * 6 + [("7", "18")] + [("18", "18")] * 2 + [("7", "7")] + [("18", None), (None, "7")]
    found = summary.compare([*paired(rows), FAILED], "clean", "snr@1.0")
    assert (found["first"], found["second"], found["questions"]) == ("clean", "snr@1.0", 10)
    assert (found["only_first"], found["only_second"]) == (6, 1)
    assert found["p_value"] == pytest.approx(2 * (1 + 7) / 128)
    assert found["difference"] == pytest.approx(-50)
    assert -100 <= found["low"] < -50 < found["high"] <= 0
    swapped = summary.compare(paired(rows), "snr@1.0", "clean")
    assert (swapped["only_first"], swapped["difference"]) == (1, pytest.approx(50))
    assert summary.compare(paired(rows), "clean", "snr@1.0") == found
    bounds = {summary.compare(paired(rows) * 1000, "clean", "snr@1.0", seed)["low"] for seed in range(5)}
    assert len(bounds) > 1


def test_no_question_in_common() -> None:
    found = summary.compare(paired([("18", None), (None, "18")]), "clean", "snr@1.0")
    assert (found["questions"], found["only_first"], found["only_second"]) == (0, 0, 0)
    assert [found[name] for name in ("p_value", "difference", "low", "high")] == [None] * 4


def test_all_against_the_baseline_are_corrected_together() -> None:
    keys = ("clean", "a", "b", "c", "d")
    rows = [("18", "7", "7", "18", None)] * 6 + [("18", "7", "18", "18", None)] * 2 + [(None, None, None, None, "18")]
    found = summary.compare_all(paired(rows, keys), "clean")
    assert list(found) == ["a", "b", "c", "d"]
    raw = [2 / 256, 2 / 64, 1.0]
    assert [found[key]["p_value"] for key in "abc"] == pytest.approx(raw)
    assert [found[key]["p_holm"] for key in "abc"] == pytest.approx([3 * raw[0], 2 * raw[1], 1])
    assert found["d"]["p_value"] is found["d"]["p_holm"] is None
    assert summary.compare_all([FAILED], "clean") == {}


def test_controls_are_compared_with_the_greedy_baseline() -> None:
    keys = ("greedy", "clean", "zero/all", "snr@1.0")
    records = paired([("18", "7", "7", "7")] * 6, keys)
    found = summary.summarise(records)
    assert [found[key]["versus_clean"]["first"] for key in ("greedy", "zero/all", "snr@1.0")] == ["clean", "greedy", "clean"]
    assert found["zero/all"]["versus_clean"]["difference"] == -100
    assert found["zero/all"]["versus_clean"]["p_holm"] == pytest.approx(3 * 2 / 64)
    assert summary.condition_result(records, "zero/all")["versus_clean"]["only_first"] == 6


# --- one noise setting ---


def sweep(noise_type: str, right_by_scale: dict[float, int], clean: int, total: int = 10) -> list[dict[str, Any]]:
    """Questions of one branch; of each condition the first so many are right."""
    right = {
        "clean": clean,
        **{summary.condition_key(NOISES[noise_type], scale): count for scale, count in right_by_scale.items()},
    }
    ratio = {key: None if key == "clean" else NOISES[noise_type].amount(float(key.partition("@")[2])) for key in right}
    return [
        record(number, {key: outcome(["18" if number < count else "7"], ratio=ratio[key]) for key, count in right.items()})
        for number in range(total)
    ]


LINE = np.polyfit([0, 0.5, 1, 2], [80, 60, 50, 10], 1)  # slope and intercept of the setting below


def test_a_setting_scale_by_scale() -> None:
    found = summary.setting_result(sweep("gaussian", {0.5: 6, 1.0: 5, 2.0: 1}, clean=8), NOISES["gaussian"], [0, 0.5, 1, 2])
    assert list(found) == ["results", "fits", "half_scale"]
    assert list(found["results"]) == ["0.0", "0.5", "1.0", "2.0"]
    assert [one["accuracy"] for one in found["results"].values()] == [80, 60, 50, 10]
    assert [one["noise_axis"] for one in found["results"].values()] == [0, 0.5, 1, 2]
    assert [one["noise_ratio"] for one in found["results"].values()] == [None, 0.5, 1, 2]
    assert [one["versus_clean"]["difference"] for one in found["results"].values()] == pytest.approx([0, -20, -30, -70])
    assert found["results"]["2.0"]["versus_clean"]["only_first"] == 7
    assert found["half_scale"] == pytest.approx(1.25)
    assert found["fits"][LINEAR]["parameters"] == pytest.approx([LINE[1], -LINE[0]], rel=1e-5)
    assert 0.95 < found["fits"][LINEAR]["r_squared"] < 1
    assert len(found["fits"][EXPONENTIAL]["parameters"]) == 2
    assert len(found["fits"][HYPERBOLIC]["parameters"]) == 3


def test_snr_is_fitted_over_its_inverse_and_starts_from_clean() -> None:
    records = sweep("snr", {2.0: 6, 1.0: 5, 0.5: 1}, clean=8)
    found = summary.setting_result(records, NOISES["snr"], [2.0, 1.0, 0.5])
    assert [one["noise_axis"] for one in found["results"].values()] == [0.5, 1, 2]
    assert found["fits"][LINEAR]["parameters"] == pytest.approx([LINE[1], -LINE[0]], rel=1e-5)
    assert found["half_scale"] == pytest.approx(1 / 1.25)
    with_infinity = summary.setting_result(records, NOISES["snr"], [math.inf, 2.0, 1.0, 0.5])
    assert list(with_infinity["results"]) == ["inf", "2.0", "1.0", "0.5"]
    assert with_infinity["results"]["inf"]["accuracy"] == 80
    assert with_infinity["fits"] == found["fits"]
    json.dumps(with_infinity, allow_nan=False)


def test_decay_over_scales_of_each_kind() -> None:
    found = summary.decay_fits([math.inf, 2.0, 1.0, 0.5], [80, 60, 50, 10], NOISES["snr"])
    assert found["half_scale"] == pytest.approx(1 / 1.25)
    assert found["fits"] == summary.decay_fits([0, 0.5, 1.0, 2.0], [80, 60, 50, 10], NOISES["uniform"])["fits"]
    assert summary.decay_fits([0, 0.5, 1.0, 2.0], [80, 60, 50, 10], NOISES["uniform"])["half_scale"] == pytest.approx(1.25)


def test_scales_that_were_not_measured() -> None:
    found = summary.setting_result(sweep("gaussian", {0.5: 6}, clean=8), NOISES["gaussian"], [0.5, 2])
    assert found["results"]["2.0"]["accuracy"] is None
    assert found["results"]["2.0"]["versus_clean"]["p_value"] is None
    assert found["fits"][HYPERBOLIC] is None  # two points
    assert found["fits"][LINEAR]["parameters"] == pytest.approx([80, 40], rel=1e-6)
    assert found["half_scale"] is None
    json.dumps(found, allow_nan=False)
    nothing = summary.setting_result([FAILED], NOISES["gaussian"], [0.5])
    assert nothing["fits"] == {EXPONENTIAL: None, HYPERBOLIC: None, LINEAR: None}
    json.dumps(nothing, allow_nan=False)


# --- everything ---


def shown(table: Any) -> list[str]:
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    return [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]


def test_the_tables() -> None:
    records = [
        record(
            number, {"greedy": outcome(["18"]), "clean": outcome(["18"] * 5), "snr@1.0": outcome(answers, 1.0, diversity=1.5)}
        )
        for number, answers in enumerate([["7"] * 5] * 9 + [["18"] * 4 + ["7"]] * 3)
    ]
    found = summary.summarise([*records, FAILED])
    assert list(found) == ["greedy", "clean", "snr@1.0"]
    assert found["clean"]["versus_clean"] is None
    assert found["snr@1.0"]["versus_clean"]["p_holm"] == pytest.approx(2 * 2 / 2**9)
    json.dumps(found, allow_nan=False)
    rows = shown(summary.summary_table(found, "Three conditions"))
    low, high = (100 * bound for bound in interval(3, 12))
    assert rows[0] == "Three conditions"
    assert f"snr@1.0 25.0% {low:.1f}-{high:.1f} Degraded 100% 0.95 1.5 0.004 0.008" in rows
    assert any(row.startswith("clean 100.0%") and row.endswith("Good 100% 1.00") for row in rows)
    assert "12 questions; 1 more failed and are not counted" in " ".join(rows)
    rows = shown(summary.coverage_table(found, "Coverage"))
    assert "snr@1.0 at least 1 12 100.0% 25.0%" in rows
    assert "at least 5 unanimous 9 75.0% 0.0%" in rows
    assert not any(row.startswith("greedy") for row in rows)


def test_tables_of_nothing() -> None:
    assert summary.summarise([FAILED]) == {}
    assert shown(summary.summary_table({}, "Nothing"))
    without_clean = summary.summarise(paired([("18", "7")], ("greedy", "snr@1.0")))
    assert any(row.startswith("snr@1.0 0.0%") for row in shown(summary.summary_table(without_clean, "No clean one")))
