"""What the records of a noise experiment say: each condition in numbers, paired comparisons, decay with the scale, tables.

A record is one question with what every condition made of it; a condition is one way of treating the thoughts. How the
conditions' keys are spelled is decided here alone: NO_LATENTS, GREEDY, CLEAN and SELF_CONSISTENCY, controls such as
"zero/first", and for noise "type[-direction]@scale". Shares are in percent here, confidence and agreement are fractions
0..1. Everything that is returned can be written as JSON: what is undefined is None, never nan or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from evaluation import interval, wrote_steps
from experiments.answers.benchmarks import NO_ANSWER
from experiments.answers.judging import Coverage, Vote, coverage_curve
from experiments.significance import fit_decays, half_scale, holm, mcnemar, paired_difference, status
from experiments.tables import probability, terminal, text
from noise import check_noise, find_noise, noise_rows

NO_LATENTS, GREEDY, CLEAN, SELF_CONSISTENCY = "no_latents", "greedy", "clean", "self_consistency"
AGGREGATIONS = ("majority", "probability", "probability_sum", "noise_weighted")
JUDGE = "majority"  # whose answers are a condition's accuracy

Record = dict[str, Any]
Outcome = dict[str, Any]  # what one condition made of one question


# --- keys of conditions ---


def setting_name(noise_type: str, direction: str | None) -> str:
    """ "targeted-opposite"; for every other type its name, which has no direction."""
    return find_noise(noise_type, direction).name


def condition_key(noise_type: str, direction: str | None, scale: float) -> str:
    """ "targeted-opposite@0.5": setting and scale. Inverse: `split_key`."""
    return f"{setting_name(noise_type, direction)}@{scale_name(scale)}"


def scale_name(scale: float) -> str:
    """How a scale is written in keys and result files: "0.1", "2.0", "inf"."""
    return repr(float(scale) + 0.0)  # a negative zero is 0.0


def split_key(key: str) -> tuple[str, str | None, float]:
    """Noise type, direction (None but for targeted) and scale. ValueError: not a key that `condition_key` makes."""
    setting, _, scale = key.rpartition("@")
    noise_type, _, direction = setting.partition("-")
    try:
        found = noise_type, direction or None, float(scale)
        check_noise(found[2], found[0], found[1])
    except ValueError as error:
        raise ValueError(f"{key!r} is no key of a noisy condition, type[-direction]@scale: {error}") from error
    if condition_key(*found) != key:
        raise ValueError(f"{key!r} is no key of a noisy condition; {condition_key(*found)!r} is")
    return found


def noise_axis(noise_type: str, scale: float) -> float:
    """The scale on an axis on which more is more noise, for fits and figures: itself; for snr its inverse. 0 is no noise."""
    return noise_rows(noise_type)[0].amount(float(scale))


def measured_key(noise_type: str, direction: str | None, scale: float) -> str:
    """The condition that holds a scale's numbers: CLEAN for no noise, which is the same for every type."""
    return condition_key(noise_type, direction, scale) if noise_axis(noise_type, scale) else CLEAN


def control_key(control: str, place: str) -> str:
    """ "zero/first": what stands in place of thoughts, and of which. Inverse: `control_of`."""
    return f"{control}/{place}"


def control_of(key: str) -> tuple[str, str] | None:
    """The control and the place of a condition; None of any other condition."""
    control, slash, place = key.partition("/")
    return (control, place) if slash else None


def counterpart(key: str) -> str:
    """The condition with its own thoughts that is decoded alike: GREEDY for what has one greedy branch, else CLEAN."""
    return GREEDY if control_of(key) or key == NO_LATENTS else CLEAN


def condition_keys(records: Iterable[Record]) -> list[str]:
    """Every condition of the records without error, in the order in which they first come."""
    return list(dict.fromkeys(key for record in records for key in _conditions(record)))


def _conditions(record: Record) -> dict[str, Outcome]:
    """None of a question that failed: what it left, if anything, is not whole."""
    return {} if record["error"] is not None else record["conditions"]


# --- one condition ---


def condition_summary(records: Sequence[Record], key: str) -> dict[str, Any]:
    """A condition over all questions that have it; accuracy, with its 95% Wilson interval, is that of the majority's answers.

    Questions that failed count in `errors` alone. no_answer, wrote_steps and branch_accuracy: percent of single branches.
    agreement: mean confidence of the majority, 0..1. perturbed: questions of which a thought got noise. new_tokens and
    noise_ratio (noise norm by thought norm): means over branches. diversity, all_steps, late_half, normalised: means over
    questions of `noise.PathDiversity`. coverage: for every threshold 1..K an `answers.Coverage`, judged by the majority;
    empty for one.
    """
    outcomes = [conditions[key] for conditions in map(_conditions, records) if key in conditions]
    branches = [branch for one in outcomes for branch in one["branches"]]
    ratios = [ratio for one in outcomes for ratio in one["noise_ratio"] or ()]
    return {
        **_accuracy([one[JUDGE]["correct"] for one in outcomes]),
        "errors": sum(record["error"] is not None for record in records),
        "no_answer": _percent([branch["answer"] == NO_ANSWER for branch in branches]),
        "branch_accuracy": _percent([branch["correct"] for branch in branches]),
        "agreement": _mean([one[JUDGE]["confidence"] for one in outcomes]),
        "new_tokens": _mean([branch["new_tokens"] for branch in branches]),
        "wrote_steps": _percent([wrote_steps(branch["text"]) for branch in branches]),
        "perturbed": sum(one["noise_ratio"] is not None for one in outcomes),
        "noise_ratio": _mean(ratios),
        **_diversity([one["diversity"] for one in outcomes if one["diversity"] is not None]),
        "aggregation": {name: _judged([one[name]["correct"] for one in outcomes]) for name in AGGREGATIONS},
        "coverage": _coverage(outcomes),
    }


def _accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    right, total = sum(correct), len(correct)
    low, high = interval(right, total) if total else (None, None)
    return {
        **_judged(correct),
        "total": total,
        "low": None if low is None else 100 * low,
        "high": None if high is None else 100 * high,
        "status": status(right / total) if total else None,
    }


def _judged(correct: Sequence[bool]) -> dict[str, Any]:
    return {"correct": sum(correct), "accuracy": _percent(correct)}


def _percent(which: Sequence[bool]) -> float | None:
    return 100 * sum(which) / len(which) if which else None


def _mean(values: Sequence[float | None]) -> float | None:
    """None where there is nothing to average, or something that is no finite number."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _diversity(found: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Over the questions that have it: where no thought comes after the noise, only all_steps is defined."""
    names = ("diversity", "all_steps", "late_half", "normalised")
    return {name: _mean([one[name] for one in found if one[name] is not None]) for name in names}


def _coverage(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    if not outcomes or len(outcomes[0]["branches"]) < 2:
        return []
    votes = [
        Vote(one[JUDGE]["answer"], one[JUDGE]["votes"], len(one["branches"]), one[JUDGE]["confidence"]) for one in outcomes
    ]
    return [_in_percent(point) for point in coverage_curve(votes, [one[JUDGE]["correct"] for one in outcomes])]


def _in_percent(point: Coverage) -> dict[str, Any]:
    accuracy = None if point.accuracy is None else 100 * point.accuracy
    return {**point._asdict(), "coverage": 100 * point.coverage, "accuracy": accuracy}


# --- comparisons ---


def compare(records: Sequence[Record], first_key: str, second_key: str, seed: int = 0) -> dict[str, Any]:
    """Two conditions on the questions that have both, judged by the majority; of noisy ones, where noise reached a thought.

    only_first, only_second, p_value: `statistics.mcnemar`. difference, low, high: accuracy of the second minus that of the
    first in percentage points and its 95% bootstrap interval. None where no question has both.
    """
    both = [found for found in map(_conditions, records) if _reached(found, first_key) and _reached(found, second_key)]
    first, second = ([bool(found[key][JUDGE]["correct"]) for found in both] for key in (first_key, second_key))
    tested = mcnemar(first, second)
    points = [100 * value for value in paired_difference(first, second, seed)] if both else [None] * 3
    return {
        "first": first_key,
        "second": second_key,
        "questions": len(both),
        "only_first": tested.only_first,
        "only_second": tested.only_second,
        "p_value": tested.p_value if both else None,
        **dict(zip(("difference", "low", "high"), points, strict=True)),
    }


def _reached(conditions: dict[str, Outcome], key: str) -> bool:
    """Whether a question has a condition, and, if that is noise, had the thought that it goes into."""
    return key in conditions and ("@" not in key or conditions[key]["noise_ratio"] is not None)


def compare_all(records: Sequence[Record], baseline_key: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Every other condition against the baseline, under its key; p_holm is p_value corrected for all that were tested."""
    return _corrected(
        {key: compare(records, baseline_key, key, seed) for key in condition_keys(records) if key != baseline_key}
    )


def _corrected(compared: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    tested = [key for key, comparison in compared.items() if comparison["p_value"] is not None]
    corrected = dict(zip(tested, holm([compared[key]["p_value"] for key in tested]), strict=True))
    return {key: {**comparison, "p_holm": corrected.get(key)} for key, comparison in compared.items()}


# --- one noise setting ---


def setting_result(
    records: Sequence[Record], noise_type: str, direction: str | None, scales: Sequence[float]
) -> dict[str, Any]:
    """One noise type and direction: {"results": by scale, "fits": .., "half_scale": ..}, the last two from `decay_fits`.

    A result is a `condition_result` and its place on the `noise_axis`. Fits and half scale start from the clean accuracy,
    whether or not the scales have the one without noise. Questions with too few thoughts for the noise are left out.
    """
    noisy = {condition_key(noise_type, direction, scale) for scale in scales}
    records = [one for one in records if all(_reached(_conditions(one), key) for key in noisy & _conditions(one).keys())]
    results = {}
    for scale in scales:
        result = condition_result(records, measured_key(noise_type, direction, scale))
        results[scale_name(scale)] = {"noise_axis": noise_axis(noise_type, scale), **result}
    no_noise = noise_rows(noise_type)[0].no_noise
    accuracies = {no_noise: condition_summary(records, CLEAN)["accuracy"]}
    accuracies |= {scale: results[scale_name(scale)]["accuracy"] for scale in scales}
    measured = {scale: accuracy for scale, accuracy in accuracies.items() if accuracy is not None}
    return {"results": results, **decay_fits(list(measured), list(measured.values()), noise_type)}


def condition_result(records: Sequence[Record], key: str, seed: int = 0) -> dict[str, Any]:
    """`condition_summary`, and under versus_clean the comparison with its `counterpart`."""
    return {**condition_summary(records, key), "versus_clean": compare(records, counterpart(key), key, seed)}


def decay_fits(scales: Sequence[float], accuracies: Sequence[float], noise_type: str) -> dict[str, Any]:
    """{"fits": {formula: {"parameters": [..], "r_squared": ..} or None}, "half_scale": .. or None} of `statistics`.

    The formulas' x is the `noise_axis`, their values are in the accuracies' unit; half_scale is a scale (for snr signal by
    noise), interpolated along the axis.
    """
    places = [noise_axis(noise_type, scale) for scale in scales]
    fits = {
        formula: found and {"parameters": list(found.parameters), "r_squared": found.r_squared}
        for formula, found in fit_decays(places, accuracies).items()
    }
    half = half_scale(places, accuracies)
    return {"fits": fits, "half_scale": half and noise_axis(noise_type, half)}  # the inverse of an inverse is the scale


# --- everything ---


def summarise(records: Sequence[Record], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Every condition: its `condition_summary`, and under versus_clean how it compares with its `counterpart`.

    That is None for clean itself; p_holm is corrected for all the others together, as in `compare_all`.
    """
    keys = condition_keys(records)
    versus = _corrected({key: compare(records, counterpart(key), key, seed) for key in keys if key != CLEAN})
    return {key: {**condition_summary(records, key), "versus_clean": versus.get(key)} for key in keys}


def summary_table(summary: dict[str, dict[str, Any]], title: str) -> Table:
    """One row for each condition of a `summarise`; narrow enough for 100 columns."""
    columns = (
        "condition",
        "accuracy",
        "95%\ninterval",
        "status",
        "wrote\nsteps",
        "agree",
        "diversity",
        "p vs\nclean",
        "p\n(Holm)",
    )
    rows = []
    for key, row in summary.items():
        versus = row["versus_clean"] or {"p_value": None, "p_holm": None}
        cells = [
            key,
            text(row["accuracy"], "{:.1f}%"),
            "" if row["low"] is None else f"{row['low']:.1f}-{row['high']:.1f}",
            row["status"] or "",
            text(row["wrote_steps"], "{:.0f}%"),
            text(row["agreement"], "{:.2f}"),
            text(row["diversity"], "{:.3g}"),
            probability(versus["p_value"]),
            probability(versus["p_holm"]),
        ]
        rows.append(cells)
    return terminal(title, columns, rows, _caption(summary))


def _caption(summary: dict[str, dict[str, Any]]) -> str:
    questions, failed = (max((row[name] for row in summary.values()), default=0) for name in ("total", "errors"))
    failures = f"; {failed} more failed and are not counted" if failed else ""
    reached = min((row["perturbed"] for key, row in summary.items() if "@" in key), default=questions)
    some = f"; noise reached {reached} of them, on which p is taken" if reached < questions else ""
    columns = "steps: branches that wrote some; agree: mean confidence of the majority; p: exact McNemar test"
    return f"{questions} questions{failures}{some}. {columns}."


def coverage_table(summary: dict[str, dict[str, Any]], title: str) -> Table:
    """For each condition of several branches: accuracy where at least so many agree, and the share of questions left."""
    columns = ("condition", "branches agreeing", "level", "answered", "coverage", "accuracy")
    rows = [
        [
            key if point["threshold"] == 1 else "",
            f"at least {point['threshold']}",
            point["level"] or "",
            str(point["answered"]),
            f"{point['coverage']:.1f}%",
            text(point["accuracy"], "{:.1f}%"),
        ]
        for key, row in summary.items()
        for point in row["coverage"]
    ]
    return terminal(title, columns, rows)
