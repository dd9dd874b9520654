"""What the records of a noise experiment say: each condition in numbers, paired comparisons, decay with the scale, tables.

A record is one question with what every condition made of it; a condition is one way of treating the thoughts. How the
conditions' keys are spelled is decided here alone. Shares are in percent, confidence and agreement are fractions 0..1.
Everything that is returned can be written as JSON: what is undefined is None, never nan or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from evaluation import interval, wrote_steps
from experiments.answers.benchmarks import NO_ANSWER, Same
from experiments.answers.judging import AGGREGATIONS, agreement_level, vote
from experiments.significance import CURVES, fit_decay, half_scale, holm, mcnemar, paired_difference, status
from experiments.tables import probability, terminal, text
from noise import NoiseType

NO_LATENTS, GREEDY, CLEAN, SELF_CONSISTENCY = "no_latents", "greedy", "clean", "self_consistency"
MC_DROPOUT = "mc_dropout "  # and the rate
JUDGE = "majority"  # whose answers are a condition's accuracy
DIVERSITY = ("diversity", "all_steps", "late_half", "normalised")

Record = dict[str, Any]
Outcome = dict[str, Any]  # what one condition made of one question


# --- keys of conditions ---


def condition_key(kind: NoiseType, scale: float) -> str:
    """ "targeted-opposite@0.5": noise type with its direction, and scale."""
    return f"{kind.name}@{scale_name(scale)}"


def scale_name(scale: float) -> str:
    """How a scale is written in keys and result files: "0.1", "2.0", "inf"."""
    return repr(float(scale) + 0.0)  # a negative zero is 0.0


def measured_key(kind: NoiseType, scale: float) -> str:
    """The condition that holds a scale's numbers: CLEAN for no noise, which is the same for every type."""
    return condition_key(kind, scale) if kind.amount(float(scale)) else CLEAN


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


# --- one question ---


def votes(branches: Sequence[dict[str, Any]], noise: Sequence[float], same: Same) -> Outcome:
    """What branches say together: by aggregation the answer, its votes and confidence, and whether it is correct.

    noise: of each branch by the thought's norm. same: when two answers count as one.
    """
    answers = [one["answer"] for one in branches]
    right = {one["answer"]: one["correct"] for one in branches}
    found = {}
    for name, log_weight in AGGREGATIONS.items():
        weights = [log_weight(branch, ratio) for branch, ratio in zip(branches, noise, strict=True)]
        said = vote(answers, weights, same)
        found[name] = {**said._asdict(), "correct": right.get(said.answer, False)}
    return found


# --- one condition ---


def condition_summary(records: Sequence[Record], key: str) -> dict[str, Any]:
    """A condition over all questions that have it; accuracy, with its 95% Wilson interval, is that of the majority's answers.

    Questions that failed count in `errors` alone. no_answer, wrote_steps and branch_accuracy: percent of single branches.
    any_correct: percent of questions with a right branch (coverage at K, pass@K: what a perfect choice among them would reach).
    best_correct: percent whose likeliest branch with an answer is right (best of K by the mean log-probability of a token).
    agreement: mean confidence of the majority, 0..1. perturbed: questions of which a thought got noise. new_tokens and
    noise_ratio (noise norm by thought norm): means over branches. diversity, all_steps, late_half, normalised: means of
    `thoughts.PathDiversity` over the questions that have it. coverage: for every threshold 1..K the questions on which so many
    branches agree, in percent, and the accuracy on them (None if there are none); empty for one branch.
    """
    outcomes = [conditions[key] for conditions in map(_conditions, records) if key in conditions]
    branches = [branch for one in outcomes for branch in one["branches"]]
    paths = [one["diversity"] for one in outcomes if one["diversity"] is not None]
    judged = {name: [one[name]["correct"] for one in outcomes] for name in AGGREGATIONS}
    aggregation = {name: {"correct": sum(correct), "accuracy": _percent(correct)} for name, correct in judged.items()}
    right, total = sum(judged[JUDGE]), len(outcomes)
    low, high = (100 * bound for bound in interval(right, total)) if total else (None, None)
    return {
        **aggregation[JUDGE],
        "total": total,
        "low": low,
        "high": high,
        "status": status(right / total) if total else None,
        "errors": sum(record["error"] is not None for record in records),
        "no_answer": _percent(branch["answer"] == NO_ANSWER for branch in branches),
        "any_correct": _percent(any(branch["correct"] for branch in one["branches"]) for one in outcomes),
        "best_correct": _percent(likeliest(one["branches"])["correct"] for one in outcomes),
        "branch_accuracy": _percent(branch["correct"] for branch in branches),
        "agreement": _mean(one[JUDGE]["confidence"] for one in outcomes),
        "new_tokens": _mean(branch["new_tokens"] for branch in branches),
        "wrote_steps": _percent(wrote_steps(branch["text"]) for branch in branches),
        "perturbed": sum(one["noise_ratio"] is not None for one in outcomes),
        "noise_ratio": _mean(ratio for one in outcomes for ratio in one["noise_ratio"] or ()),
        **{name: _mean(one[name] for one in paths if one[name] is not None) for name in DIVERSITY},
        "aggregation": aggregation,
        "coverage": _coverage(outcomes),
    }


def _mean(values: Iterable[float]) -> float | None:
    """None where there is nothing to average, or something that is no finite number."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers and all(map(math.isfinite, numbers)) else None


def likeliest(branches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of them, if several are as likely; one without an answer only where none has any."""
    return max(branches, key=lambda one: (one["answer"] != NO_ANSWER, one["log_probability"] / max(one["new_tokens"], 1)))


def _percent(which: Iterable[bool]) -> float | None:
    return _mean(100 * one for one in which)


def _coverage(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Answering only where at least `threshold` branches agree; NO_ANSWER is never an answer."""
    branches = len(outcomes[0]["branches"]) if outcomes else 0
    points = []
    for threshold in range(1, branches + 1) if branches > 1 else ():
        judged = [one[JUDGE]["correct"] for one in outcomes if one[JUDGE]["votes"] >= threshold]
        points.append(
            {
                "threshold": threshold,
                "level": agreement_level(threshold, branches),
                "answered": len(judged),
                "correct": sum(judged),
                "coverage": 100 * len(judged) / len(outcomes),
                "accuracy": _percent(judged),
            }
        )
    return points


# --- comparisons ---


def compare(records: Sequence[Record], first_key: str, second_key: str, seed: int = 0) -> dict[str, Any]:
    """Two conditions on the questions that have both, judged by the majority; of noisy ones, where noise reached a thought.

    only_first, only_second, p_value: `significance.mcnemar`. difference, low, high: accuracy of the second minus that of the
    first in percentage points and its 95% bootstrap interval. None where no question has both.
    """
    both = [found for found in map(_conditions, records) if reached(found, first_key) and reached(found, second_key)]
    first, second = ([bool(found[key][JUDGE]["correct"]) for found in both] for key in (first_key, second_key))
    tested = mcnemar(first, second) if both else {"only_first": 0, "only_second": 0, "p_value": None}
    points = [100 * value for value in paired_difference(first, second, seed)] if both else [None] * 3
    return {
        "first": first_key,
        "second": second_key,
        "questions": len(both),
        **tested,
        **dict(zip(("difference", "low", "high"), points, strict=True)),
    }


def reached(conditions: dict[str, Outcome], key: str) -> bool:
    """Whether a question has a condition, and, if that is noise, had the thought that it goes into."""
    return key in conditions and ("@" not in key or conditions[key]["noise_ratio"] is not None)


def correct(comparisons: Sequence[dict[str, Any]]) -> None:
    """Add p_holm to each `compare`: its p_value, corrected for all that were tested; None where no question has both."""
    tested = [one["p_value"] for one in comparisons if one["p_value"] is not None]
    corrected = iter(holm(tested))
    for one in comparisons:
        one["p_holm"] = None if one["p_value"] is None else next(corrected)


def compare_all(records: Sequence[Record], baseline_key: str) -> dict[str, dict[str, Any]]:
    """Every other condition against the baseline, under its key, and corrected for all of them."""
    found = {key: compare(records, baseline_key, key) for key in condition_keys(records) if key != baseline_key}
    correct([*found.values()])
    return found


def condition_result(records: Sequence[Record], key: str) -> dict[str, Any]:
    """`condition_summary`, and under versus_clean the comparison with its `counterpart`."""
    return {**condition_summary(records, key), "versus_clean": compare(records, counterpart(key), key)}


def summarise(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Every condition's `condition_result`; versus_clean is None for clean itself, and corrected for all the others."""
    found = {key: condition_result(records, key) for key in condition_keys(records)}
    if CLEAN in found:
        found[CLEAN]["versus_clean"] = None
    correct([one["versus_clean"] for key, one in found.items() if key != CLEAN])
    return found


# --- one noise setting ---


def setting_result(records: Sequence[Record], kind: NoiseType, scales: Sequence[float]) -> dict[str, Any]:
    """One noise type and direction: {"results": by scale, "fits": .., "half_scale": ..}, the last two from `decay_fits`.

    A result is a `condition_result` and, as noise_axis, the `NoiseType.amount` of its scale. Fits and half scale start from the
    clean accuracy, whether or not the scales have the one without noise. Questions with too few thoughts for it are left out.
    """
    noisy = {condition_key(kind, scale) for scale in scales}
    records = [one for one in records if all(reached(_conditions(one), key) for key in noisy & _conditions(one).keys())]
    results = {
        scale_name(scale): {"noise_axis": kind.amount(float(scale)), **condition_result(records, measured_key(kind, scale))}
        for scale in scales
    }
    accuracies = {kind.no_noise: condition_summary(records, CLEAN)["accuracy"]}
    accuracies |= {scale: results[scale_name(scale)]["accuracy"] for scale in scales}
    measured = {scale: accuracy for scale, accuracy in accuracies.items() if accuracy is not None}
    return {"results": results, **decay_fits(list(measured), list(measured.values()), kind)}


def decay_fits(scales: Sequence[float], accuracies: Sequence[float], kind: NoiseType) -> dict[str, Any]:
    """{"fits": {formula: {"parameters": [..], "r_squared": ..} or None}, "half_scale": .. or None} of `significance`.

    The formulas' x is the `NoiseType.amount` of a scale, their values are in the accuracies' unit; half_scale is a scale (for
    snr signal by noise), interpolated along that axis.
    """
    places = [kind.amount(float(scale)) for scale in scales]
    fits = {formula: fit_decay(formula, places, accuracies) for formula in CURVES}
    half = half_scale(places, accuracies)
    return {"fits": fits, "half_scale": half and kind.amount(half)}  # the inverse of an inverse is the scale


# --- tables ---


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "accuracy": lambda row: text(row["accuracy"], "{:.1f}%"),
    "95%\ninterval": lambda row: "" if row["low"] is None else f"{row['low']:.1f}-{row['high']:.1f}",
    "status": lambda row: row["status"] or "",
    "wrote\nsteps": lambda row: text(row["wrote_steps"], "{:.0f}%"),
    "agree": lambda row: text(row["agreement"], "{:.2f}"),
    "diversity": lambda row: text(row["diversity"], "{:.3g}"),
    "p vs\nclean": lambda row: probability((row["versus_clean"] or {}).get("p_value")),
    "p\n(Holm)": lambda row: probability((row["versus_clean"] or {}).get("p_holm")),
}


def fewest_reached(summary: Mapping[str, Mapping[str, Any]]) -> int:
    """Of how many questions a thought got noise, in the condition with the fewest; all of them where no condition is noise."""
    questions = max((row["total"] for row in summary.values()), default=0)
    return min((row["perturbed"] for key, row in summary.items() if "@" in key), default=questions)


def summary_table(summary: dict[str, dict[str, Any]], title: str) -> Table:
    """One row for each condition of a `summarise`; narrow enough for 100 columns."""
    rows = [[key, *(cell(row) for cell in COLUMNS.values())] for key, row in summary.items()]
    questions, failed = (max((row[name] for row in summary.values()), default=0) for name in ("total", "errors"))
    failures = f"; {failed} more failed and are not counted" if failed else ""
    reached = fewest_reached(summary)
    some = f"; noise reached {reached} of them, on which p is taken" if reached < questions else ""
    meaning = "steps: branches that wrote some; agree: mean confidence of the majority; p: exact McNemar test"
    return terminal(title, ["condition", *COLUMNS], rows, f"{questions} questions{failures}{some}. {meaning}.")


def votes_table(summary: dict[str, dict[str, Any]], title: str) -> Table:
    """For each condition of several branches: what is right of one branch, of their votes, of the likeliest one, of any."""
    columns = ("condition", "one\nbranch", *(name.replace("_", "\n") for name in AGGREGATIONS), "best\nof K", "any", "agree")
    rows = [
        [
            key,
            f"{row['branch_accuracy']:.1f}%",
            *(f"{row['aggregation'][name]['accuracy']:.1f}%" for name in AGGREGATIONS),
            f"{row['best_correct']:.1f}%",
            f"{row['any_correct']:.1f}%",
            f"{row['agreement']:.2f}",
        ]
        for key, row in summary.items()
        if row["coverage"]
    ]
    meaning = "Right: one branch, four kinds of vote, the likeliest branch, any branch; agree: mean confidence of the majority."
    return terminal(title, columns, rows, meaning)


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
