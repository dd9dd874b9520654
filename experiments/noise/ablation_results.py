"""The numbers, tables and figures of an ablation: accuracy of every value of each part, paired with self-consistency.

A part varies one thing. Its cells hold, for a value of that thing and an amount of noise, the outcome of each question; an
outcome is what `sweep` records of a question under one condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from experiments.answers.benchmarks import Same
from experiments.answers.judging import majority_vote, noise_weighted_vote, probability_vote
from experiments.noise.results import chance
from experiments.noise.settings import BranchConfig
from experiments.noise.summary import GREEDY, JUDGE, Outcome, Record, compare, condition_summary
from experiments.plots import grouped, shades
from experiments.significance import holm
from experiments.tables import markdown, text
from systems.writing import save_config, write_json, write_text
from utils import get_logger

NO_NOISE, MIXED = "none", "mixed"  # amounts of noise that are no ratio: self-consistency, and all ratios in turns
OF_SELF_CONSISTENCY = ("branches", "aggregation")  # parts that change self-consistency, too
ORDERED = ("injection_step", "branches")  # parts whose values are numbers
VARIED = {
    "injection_step": "thought that gets the noise",
    "branches": "branches that vote",
    "noise_type": "noise type",
    "aggregation": "from branches to an answer",
    "shared_noise": "noise vectors of the branches",
    "schedule": "schedule of the noise in later thoughts",
}
LEGEND = "noise by the norm\nof the thought"
Cells = dict[tuple[str, str], dict[int, Outcome]]  # (value, amount of noise) -> outcomes by the question's index


@dataclass
class Part:
    """name: a key of VARIED. default: the value that the other parts have."""

    name: str
    default: str
    cells: Cells


def ratio_name(ratio: float) -> str:
    return f"{ratio:g}"


# --- outcomes ---


def vote(branches: Sequence[dict[str, Any]], ratios: Sequence[float] | None, same: Same) -> Outcome:
    """The outcome of recorded branches: what they say together. ratios: noise of at least as many; None is no noise.

    How far their thoughts are apart is not known (None).
    """
    answers = [branch["answer"] for branch in branches]
    noise = [0.0] * len(branches) if ratios is None else list(ratios[: len(branches)])
    sums = [[branch["log_probability"]] for branch in branches]
    means = [[branch["log_probability"] / branch["new_tokens"]] for branch in branches]
    votes = {
        "majority": majority_vote(answers, same),
        "probability": probability_vote(answers, means, same=same),
        "probability_sum": probability_vote(answers, sums, same=same),
        "noise_weighted": noise_weighted_vote(answers, noise, same),
    }
    judged = {branch["answer"]: branch["correct"] for branch in branches}
    return {
        "branches": list(branches),
        **{
            name: {
                "answer": one.answer,
                "votes": one.votes,
                "confidence": one.confidence,
                "correct": judged.get(one.answer, False),
            }
            for name, one in votes.items()
        },
        "noise_ratio": ratios and noise,
        "diversity": None,
    }


def judged_by(outcome: Outcome, aggregation: str) -> Outcome:
    """The outcome with the answer of another aggregation where the majority's stands, which is what is counted."""
    return {**outcome, JUDGE: outcome[aggregation]}


# --- numbers ---


def rows(part: Part, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each value and amount of noise that any question has, in the order of the cells.

    A `summary.condition_summary` with value, noise, and two rows of `summary.compare` on the same questions: versus_baseline
    against self-consistency of the same value, versus_default against the default value with as much noise; None where they
    are the same thing. p_holm is corrected for the part's comparisons of that kind.
    """
    records = _records(part.cells)
    found = []
    for (value, noise), cell in part.cells.items():
        if cell:
            row = {"value": value, "noise": noise, **condition_summary(records, _key(value, noise))}
            for kind, other in _references(part, value, noise).items():
                row[kind] = compare(records, _key(*other), _key(value, noise), seed) if other in part.cells else None
            found.append(row)
    for kind in ("versus_baseline", "versus_default"):
        tested = [row[kind] for row in found if row.get(kind) and row[kind]["p_value"] is not None]
        for comparison, corrected in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
            comparison["p_holm"] = corrected
    return found


def _records(cells: Cells) -> list[Record]:
    indices = sorted({index for cell in cells.values() for index in cell})
    return [
        {
            "index": index,
            "error": None,
            "conditions": {_key(*place): cell[index] for place, cell in cells.items() if index in cell},
        }
        for index in indices
    ]


def _key(value: str, noise: str) -> str:
    return f"{value}, noise {noise}"


def _references(part: Part, value: str, noise: str) -> dict[str, tuple[str, str]]:
    """The cells that a cell is compared with."""
    found = {}
    if noise != NO_NOISE:
        found["versus_baseline"] = (value, NO_NOISE)
    if value != part.default and (noise != NO_NOISE or part.name in OF_SELF_CONSISTENCY):
        found["versus_default"] = (part.default, noise)
    return found


# --- files ---


def write_results(config: BranchConfig, info: dict[str, Any], parts: Sequence[Part], base: Sequence[Record]) -> None:
    """Into the ablation's directory: <part>_<timestamp>.json and <part>.png of each part, table.md of all, config.yaml.

    info: experiment_info of the JSON files. base: records of the run that the parts share, for the greedy answers.
    """
    directory = config.directory
    save_config(config, directory / "config.yaml")
    greedy = condition_summary(base, GREEDY)
    tables = [_heading(config, info, greedy)]
    for part in parts:
        measured = rows(part, config.seed)
        content = {
            "experiment_info": {**info, "part": part.name, "default": part.default},
            "greedy": greedy,
            "results": measured,
        }
        write_json(directory / f"{part.name}_{info['timestamp']}.json", content)
        title = f"{VARIED[part.name].capitalize()}: {config.benchmark}, {greedy['total']} questions"
        plot(part, measured, directory / f"{part.name}.png", title, greedy["accuracy"], chance(config.benchmark))
        tables.append(table(part, measured))
    write_text(directory / "table.md", "\n".join(tables))
    get_logger().info("\n".join(tables))
    get_logger().info(f"results, figures and table.md: {directory}")


def _heading(config: BranchConfig, info: dict[str, Any], greedy: dict[str, Any]) -> str:
    failed = f", {info['errors']} more failed and are not counted" if info["errors"] else ""
    return (
        f"# {config.name}: {config.benchmark}, {greedy['total']} questions{failed}\n\n"
        f"{info['model']}; {config.num_branches} branches, temperature {config.temperature:g}, top-p {config.top_p:g}, seed "
        f"{config.seed}. Varied: {info['noise_type']} noise in thought {config.noise_at_step}, schedule {config.schedule}. "
        f"Greedy, without branches and noise: {greedy['accuracy']:.1f}%.\n\n"
        "Noise: norm of the noise by the norm of the thought, as asked for; measured: as it was in the first noisy thought. "
        "Accuracy in % with its 95% interval. Self-consistency: as many branches without noise on the same questions. "
        "Differences in points with 95% bootstrap intervals, p of the exact McNemar test, corrected by Holm for the table.\n"
    )


COLUMNS = ("noise", "measured", "questions", "accuracy", "agreement")
COMPARED = ("minus self-consistency", "p", "p (Holm)", "minus {}", "p", "p (Holm)")


def table(part: Part, measured: Sequence[dict[str, Any]]) -> str:
    """Markdown with a heading."""
    compared = [column.format(part.default) for column in COMPARED]
    columns = [VARIED[part.name], *COLUMNS, *compared]
    shown = [row for row in measured if part.name in OF_SELF_CONSISTENCY or row["noise"] != NO_NOISE or row is measured[0]]
    return f"## {part.name}\n\n{markdown(columns, (_row_cells(part, row) for row in shown))}\n"


def _row_cells(part: Part, row: dict[str, Any]) -> list[str]:
    clean = row["noise"] == NO_NOISE
    return [
        "" if clean and part.name not in OF_SELF_CONSISTENCY else row["value"],
        "self-consistency" if clean else row["noise"],
        text(row["noise_ratio"], "{:.2f}"),
        str(row["total"]),
        f"{row['accuracy']:.1f} ({row['low']:.1f} to {row['high']:.1f})",
        f"{row['agreement']:.2f}",
        *_compared_cells(row.get("versus_baseline")),
        *_compared_cells(row.get("versus_default")),
    ]


def _compared_cells(comparison: dict[str, Any] | None) -> list[str]:
    if comparison is None or comparison["p_value"] is None:
        return [""] * 3
    points = "{difference:+.1f} ({low:+.1f} to {high:+.1f})".format(**comparison)
    return [points, f"{comparison['p_value']:.2g}", f"{comparison['p_holm']:.2g}"]


def plot(
    part: Part, measured: Sequence[dict[str, Any]], path: Path, title: str, greedy: float | None, guess: float | None
) -> Axes:
    """Accuracy with its 95% interval of each value, side by side for the amounts of noise; black is self-consistency.

    greedy, guess: accuracies drawn as lines.
    """
    amounts = list(dict.fromkeys(row["noise"] for row in measured))
    series = {
        "self-consistency" if noise == NO_NOISE else f"noise {noise}": {
            row["value"]: row for row in measured if row["noise"] == noise
        }
        for noise in amounts
    }
    names = {row["value"]: _tick(part, row["value"], measured) for row in measured}
    ratios = shades([noise for noise in amounts if noise not in (NO_NOISE, MIXED)])
    colours = [{NO_NOISE: "black", MIXED: "C3"}.get(noise, ratios.get(noise)) for noise in amounts]
    style = {"marker": "o", "linestyle": ":" if part.name in ORDERED else "none", "linewidth": 1.2}
    xlabel = VARIED[part.name]
    return grouped(series, path, title, xlabel, names, colours, style, legend=LEGEND, greedy=greedy, chance=guess)


def _tick(part: Part, value: str, measured: Sequence[dict[str, Any]]) -> str:
    """A value, whether it is the default, and how many questions it has if not all."""
    questions = max(row["total"] for row in measured if row["value"] == value)
    fewer = questions < max(row["total"] for row in measured)
    return value + "\n(default)" * (value == part.default) + f"\n({questions} questions)" * fewer
