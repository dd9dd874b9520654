"""The numbers, tables and figures of an ablation: accuracy of every value of each part, paired with self-consistency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from experiments.answers.benchmarks import Same, find_benchmark
from experiments.noise.settings import BranchConfig
from experiments.noise.summary import GREEDY, JUDGE, Outcome, Record, compare, condition_summary, correct, votes
from experiments.plots import Numbers, grouped, shades
from experiments.tables import markdown, text, with_interval
from systems.writing import save_config, write_json, write_text
from utils import get_logger

RIGHT = "right.json"  # of each part, value and amount of noise: which questions were answered right; for `across_seeds`
NO_NOISE, MIXED = "none", "mixed"  # amounts of noise that are no ratio: self-consistency, and all ratios in turns
LEGEND = "noise by the norm\nof the thought"
COLUMNS = ("noise", "measured", "questions", "accuracy", "any branch right", "agreement")
COMPARED = ("minus self-consistency", "p", "p (Holm)", "minus {}", "p", "p (Holm)")
Cells = dict[tuple[str, str], dict[int, Outcome]]  # (value, amount of noise) -> outcomes by the question's index


@dataclass
class Part:
    """What every question got under every value of one thing, and every amount of noise.

    default: the value that the other parts have. about: what is varied. ordered: its values are numbers. of_self_consistency:
    it changes self-consistency, too.
    """

    name: str
    default: str
    cells: Cells
    about: str = ""
    ordered: bool = False
    of_self_consistency: bool = False


def vote(branches: Sequence[dict[str, Any]], ratios: Sequence[float] | None, same: Same) -> Outcome:
    """The outcome of recorded branches: what they say together. ratios: noise of at least as many; None is no noise.

    How far their thoughts are apart is not known (None).
    """
    noise = [0.0] * len(branches) if ratios is None else list(ratios[: len(branches)])
    return {
        "branches": list(branches),
        **votes(branches, noise, same),
        "noise_ratio": None if ratios is None else noise,
        "diversity": None,
    }


def rows(part: Part, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each value and amount of noise that any question has, in the order of the cells.

    A `summary.condition_summary` with value, noise, and two rows of `summary.compare` on the same questions: versus_baseline
    against self-consistency of the same value, versus_default against the default value with as much noise; None where they
    are the same thing. p_holm is corrected for the part's comparisons of that kind.
    """
    records = _records(part.cells)
    found = []
    for (value, noise), cell in part.cells.items():
        if not cell:
            continue
        others = {"versus_baseline": (value, NO_NOISE)} if noise != NO_NOISE else {}
        if value != part.default and (noise != NO_NOISE or part.of_self_consistency):
            others["versus_default"] = (part.default, noise)
        key = _key(value, noise)
        compared = {
            kind: compare(records, _key(*other), key, seed) if other in part.cells else None for kind, other in others.items()
        }
        found.append({"value": value, "noise": noise, **condition_summary(records, key), **compared})
    for kind in ("versus_baseline", "versus_default"):
        correct([row[kind] for row in found if row.get(kind)])
    return found


def _records(cells: Cells) -> list[Record]:
    records: dict[int, Record] = {}
    for place, cell in cells.items():
        for index, outcome in cell.items():
            record = records.setdefault(index, {"index": index, "error": None, "conditions": {}})
            record["conditions"][_key(*place)] = outcome
    return [records[index] for index in sorted(records)]


def _key(value: str, noise: str) -> str:
    return f"{value}, noise {noise}"


def right_answers(part: Part) -> dict[str, Any]:
    """`default`, and of each value and amount of noise the indices of its questions and whether each was answered right."""
    cells = [
        {"value": value, "noise": noise, "right": {str(index): bool(one[JUDGE]["correct"]) for index, one in cell.items()}}
        for (value, noise), cell in part.cells.items()
    ]
    return {"default": part.default, "cells": cells}


# --- files ---


def write_results(config: BranchConfig, info: dict[str, Any], parts: Sequence[Part], base: Sequence[Record]) -> None:
    """Into the ablation's directory: <part>_<timestamp>.json and <part>.png of each part, table.md, RIGHT and config.yaml.

    info: experiment_info of the JSON files. base: records of the run that the parts share, for the greedy answers.
    """
    directory = config.directory
    save_config(config, directory / "config.yaml")
    greedy = condition_summary(base, GREEDY)
    tables = [_heading(config, info, greedy)]
    for part in parts:
        measured = rows(part, config.seed)
        about = {**info, "part": part.name, "default": part.default}
        content = {"experiment_info": about, "greedy": greedy, "results": measured}
        write_json(directory / f"{part.name}_{info['timestamp']}.json", content)
        title = f"{part.about.capitalize()}: {config.benchmark}, {greedy['total']} questions"
        lines = {"greedy": greedy["accuracy"], "chance": find_benchmark(config.benchmark).kind.chance}
        plot(part, measured, directory / f"{part.name}.png", title, **lines)
        tables.append(table(part, measured))
    write_json(directory / RIGHT, {part.name: right_answers(part) for part in parts})
    page = "\n".join(tables)
    write_text(directory / "table.md", page)
    get_logger().info(f"{page}\nresults, figures and table.md: {directory}")


def _heading(config: BranchConfig, info: dict[str, Any], greedy: Numbers) -> str:
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


def table(part: Part, measured: Sequence[Numbers]) -> str:
    """Markdown with a heading. Self-consistency is shown once, if it is the same for all values."""
    columns = [part.about, *COLUMNS, *(column.format(part.default) for column in COMPARED)]
    shown = [row for row in measured if part.of_self_consistency or row["noise"] != NO_NOISE or row is measured[0]]
    return f"## {part.name}\n\n{markdown(columns, (_row_cells(part, row) for row in shown))}\n"


def _row_cells(part: Part, row: Numbers) -> list[str]:
    clean = row["noise"] == NO_NOISE
    cells = [
        "" if clean and not part.of_self_consistency else row["value"],
        "self-consistency" if clean else row["noise"],
        text(row["noise_ratio"], "{:.2f}"),
        str(row["total"]),
        with_interval(row, "accuracy"),
        f"{row['any_correct']:.1f}",
        f"{row['agreement']:.2f}",
    ]
    for comparison in (row.get("versus_baseline"), row.get("versus_default")):
        if comparison is None or comparison["p_value"] is None:
            cells += [""] * 3
        else:
            points = with_interval(comparison, "difference", "+")
            cells += [points, f"{comparison['p_value']:.2g}", f"{comparison['p_holm']:.2g}"]
    return cells


def plot(part: Part, measured: Sequence[Numbers], path: Path, title: str, **lines: float | None) -> Axes:
    """Accuracy with its 95% interval of each value, side by side for the amounts of noise; black is self-consistency.

    A value's mark says whether it is the default, and how many questions it has if not all. lines: see `grouped`.
    """
    totals: dict[str, int] = {}
    for row in measured:
        totals[row["value"]] = max(row["total"], totals.get(row["value"], 0))
    marks = {
        value: value + "\n(default)" * (value == part.default) + f"\n({total} questions)" * (total < max(totals.values()))
        for value, total in totals.items()
    }
    amounts = list(dict.fromkeys(row["noise"] for row in measured))
    colours = {NO_NOISE: "black", MIXED: "C3"} | shades([noise for noise in amounts if noise not in (NO_NOISE, MIXED)])
    series: dict[str, dict[str, Numbers]] = {}
    styles = {}
    for noise in amounts:
        label = "self-consistency" if noise == NO_NOISE else f"noise {noise}"
        series[label] = {marks[row["value"]]: row for row in measured if row["noise"] == noise}
        line = ":" if part.ordered else "none"
        styles[label] = {"color": colours[noise], "marker": "o", "linestyle": line, "linewidth": 1.2}
    return grouped(series, path, title, part.about, LEGEND, styles, lines=lines)
