"""One noise experiment on several checkpoints: `python -m experiments.across_seeds OUT DIRECTORY DIRECTORY ...`.

Each DIRECTORY is the same experiment (test.py, one configuration) on a checkpoint of another seed; scripts/across_seeds.sh runs
them. Writes OUT/across_seeds.json, OUT/across_seeds.md and figures. Intervals count seeds and questions:
both are drawn again with replacement, the same questions for every seed (a hierarchical bootstrap, crossed).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.noise.progress import Record, finished_records
from experiments.noise.summary import CLEAN, JUDGE, condition_keys, counterpart
from experiments.plots import ACCURACY, drawing
from experiments.tables import markdown
from experiments.transfer import transferred
from systems.writing import write_json, write_text
from utils import UserError, entry_point, get_logger

RESAMPLES = 10_000
COLUMNS = ("condition", "seeds", "questions", "mean of seeds, 95%", "lowest to highest seed", "minus its baseline, 95%")
Numbers = dict[str, Any]


def interval_over_seeds(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values`, (seeds, questions).

    Few seeds make it narrow: where seeds vary more than questions do, five of them give about 85% instead of 95%.
    ValueError: no values.
    """
    if not values.size:
        raise ValueError("an interval needs at least one seed and one question")
    seeds, questions = values.shape
    generator = np.random.default_rng(seed)
    of_seeds = generator.multinomial(seeds, [1 / seeds] * seeds, size=resamples)  # how often each is drawn
    of_questions = generator.multinomial(questions, [1 / questions] * questions, size=resamples)
    means = np.einsum("rq,rq->r", of_seeds @ values, of_questions) / values.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def numbers(values: np.ndarray) -> Numbers:
    """In percent: mean, its interval, and each seed's mean. values: (seeds, questions)."""
    low, high = interval_over_seeds(values)
    by_seed = [100 * float(mean) for mean in values.mean(axis=1)]
    return {
        "questions": values.shape[1],
        "mean": float(np.mean(by_seed)),
        "low": 100 * low,
        "high": 100 * high,
        "seeds": by_seed,
    }


def across_seeds(experiments: Sequence[list[Record]]) -> dict[str, Numbers]:
    """Every condition that all experiments have, over the questions that all answered; `difference` is to its counterpart."""
    by_index = [{record["index"]: record["conditions"] for record in one if record["error"] is None} for one in experiments]
    common = sorted(set.intersection(*(set(one) for one in by_index)))
    keys = [key for key in condition_keys(experiments[0]) if all(key in condition_keys(one) for one in experiments)]
    found: dict[str, np.ndarray] = {}
    for key in keys:
        indices = [index for index in common if all(key in one[index] for one in by_index)]
        if indices:
            found[key] = np.array([[bool(one[index][key][JUDGE]["correct"]) for index in indices] for one in by_index], float)
    result = {key: numbers(values) for key, values in found.items()}
    for key, values in found.items():
        baseline = found.get(counterpart(key))
        if baseline is not None and key != counterpart(key) and baseline.shape == values.shape:
            result[key]["difference"] = numbers(values - baseline)
    return result | _transfers(experiments)


def _transfers(experiments: Sequence[list[Record]]) -> dict[str, Numbers]:
    """Answers of the question whose thoughts stood there."""
    each = [transferred(records) for records in experiments]
    places = [place for place in each[0] if len({len(one.get(place, ())) for one in each}) == 1 and each[0][place]]
    return {
        f"{place}, answers of the other": numbers(np.array([[theirs for theirs, _ in one[place]] for one in each], float))
        for place in places
    }


def table(result: Mapping[str, Numbers]) -> str:
    rows = []
    for key, one in result.items():
        change = one.get("difference")
        rows.append(
            (
                key,
                str(len(one["seeds"])),
                str(one["questions"]),
                f"{one['mean']:.1f} ({one['low']:.1f} to {one['high']:.1f})",
                f"{min(one['seeds']):.1f} to {max(one['seeds']):.1f}",
                "" if change is None else f"{change['mean']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f})",
            )
        )
    return markdown(COLUMNS, rows)


def write_results(directories: Sequence[Path], out: Path) -> dict[str, Numbers]:
    """Raises UserError: fewer than two experiments, or one without records, or nothing that all of them did."""
    if len(directories) < 2:
        raise UserError(f"{len(directories)} experiment given; intervals over seeds need at least two, better five")
    result = across_seeds([finished_records(directory) for directory in directories])
    if not result:
        raise UserError("the experiments have no condition and question in common; run them with one configuration")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "across_seeds.json", {"experiments": [str(one) for one in directories], "conditions": result})
    write_text(out / "across_seeds.md", table(result) + "\n")
    for setting in dict.fromkeys(key.split("@")[0] for key in result if "@" in key):
        curve = {float(key.split("@")[1]): one for key, one in result.items() if key.startswith(f"{setting}@")}
        _draw(dict(sorted(curve.items())), out / f"{setting}.png", f"{setting}, {len(directories)} seeds", result.get(CLEAN))
    return result


def _draw(curve: Mapping[float, Numbers], path: Path, title: str, clean: Numbers | None) -> None:
    """A line for each seed; their mean with its interval."""
    scales = list(curve)
    with drawing(path, (7.5, 4.4), xlabel="scale of the noise", ylabel=ACCURACY, title=title) as axes:
        axes.plot(scales, [one["seeds"] for one in curve.values()], color="#97b8dd", linewidth=1)
        axes.plot(scales, [one["mean"] for one in curve.values()], color="#1f3d66", marker="o", label="mean over seeds")
        low, high = ([one[key] for one in curve.values()] for key in ("low", "high"))
        axes.fill_between(scales, low, high, color="#1f3d66", alpha=0.2, label="95% over seeds and questions")
        if clean is not None:
            axes.axhline(clean["mean"], color="black", linewidth=1, label="no noise")
        if min(scales) > 0:
            axes.set_xscale("log")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.minorticks_off()


@entry_point
def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.across_seeds", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("directories", type=Path, nargs="+", help="one noise experiment for each seed")
    arguments = parser.parse_args(given)
    get_logger().info(table(write_results(arguments.directories, arguments.out)))


if __name__ == "__main__":
    main()
