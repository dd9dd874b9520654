"""One noise experiment on several checkpoints: `python -m experiments.across_seeds OUT DIRECTORY DIRECTORY ...`.

Each DIRECTORY is the same experiment (test.py or experiments.ablation, one configuration) on a checkpoint of another seed;
scripts/across_seeds.sh runs them. Writes OUT/across_seeds.json, OUT/across_seeds.md and figures. Intervals count seeds and
questions: both are drawn again with replacement, the same questions for every seed (a hierarchical bootstrap, crossed).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.noise.ablation_results import RIGHT
from experiments.noise.progress import finished_records
from experiments.noise.settings import WITHOUT_INFLUENCE
from experiments.noise.summary import CLEAN, JUDGE, counterpart, likeliest, reached
from experiments.plots import ACCURACY, drawing
from experiments.tables import markdown, with_interval
from experiments.transfer import transferred
from systems.arguments import Parser
from systems.writing import write_json, write_text
from utils import UserError, entry_point, get_logger, parse_yaml, read_text

RESAMPLES = 10_000
BY_SEED = ("name", "load_model_path", "model_id", "seed")  # keys that may differ from checkpoint to checkpoint
COLUMNS = ("condition", "seeds", "questions", "mean of seeds, 95%", "lowest to highest seed", "minus its baseline, 95%")
Numbers = dict[str, Any]


def interval_over_seeds(values: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values`, (seeds, questions).

    Few seeds make it narrow: where seeds vary more than questions do, five of them give about 85% instead of 95%.
    """
    seeds, questions = values.shape
    generator = np.random.default_rng(0)
    of_seeds = generator.multinomial(seeds, [1 / seeds] * seeds, size=RESAMPLES)  # how often each is drawn
    of_questions = generator.multinomial(questions, [1 / questions] * questions, size=RESAMPLES)
    means = np.einsum("rq,rq->r", of_seeds @ values, of_questions) / values.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def numbers(values: np.ndarray) -> Numbers:
    """In percent: mean, its interval, and each seed's mean. values: (seeds, questions)."""
    low, high = interval_over_seeds(values)
    seeds = [100 * float(mean) for mean in values.mean(axis=1)]
    mean = float(np.mean(seeds))
    return {"questions": values.shape[1], "mean": mean, "low": 100 * low, "high": 100 * high, "seeds": seeds}


class Experiment(NamedTuple):
    """right: of each condition and question, by its index, whether it was answered right.

    baselines: what a condition is compared with.
    """

    right: dict[str, dict[int, bool]]
    baselines: dict[str, str]


def read_experiment(directory: Path) -> Experiment:
    """A noise experiment, or the parts of an ablation, each value of which is compared with the part's default.

    Of K branches there are also the likeliest one ("CONDITION, best of K") and whether any is right ("CONDITION, any of K"),
    and of the control `other` whether the answer is that of the question whose thoughts stood there. A question that had no
    thought for the noise to go into does not count. UserError: neither is there.
    """
    right: dict[str, dict[int, bool]] = {}
    baselines = {}
    if (directory / RIGHT).exists():
        for name, part in json.loads((directory / RIGHT).read_text()).items():
            for cell in part["cells"]:
                key = f"{name} {cell['value']}, noise {cell['noise']}"
                right[key] = {int(index): answer for index, answer in cell["right"].items()}
                baselines[key] = f"{name} {part['default']}, noise {cell['noise']}"
        return Experiment(right, baselines)
    records = finished_records(directory)
    for record in records:
        for key, outcome in record["conditions"].items() if record["error"] is None else ():
            if not reached(record["conditions"], key):
                continue
            told, branches = {key: outcome[JUDGE]["correct"]}, outcome["branches"]
            if len(branches) > 1:
                told[f"{key}, best of {len(branches)}"] = likeliest(branches)["correct"]
                told[f"{key}, any of {len(branches)}"] = any(branch["correct"] for branch in branches)
            for name, correct in told.items():
                right.setdefault(name, {})[record["index"]] = bool(correct)
                baselines[name] = counterpart(key)
    for place, found in transferred(records).items():
        name = f"{place}, answers of the other"
        right[name], baselines[name] = {index: theirs for index, (theirs, _) in found.items()}, name
    return Experiment(right, baselines)


def across_seeds(experiments: Sequence[Experiment]) -> dict[str, Numbers]:
    """Every condition that all experiments have, over the questions that all answered.

    `difference`: to its baseline, over the questions that have both.
    """
    result: dict[str, Numbers] = {}
    for key in experiments[0].right:
        values = _table(experiments, [key])
        if not values.size:
            continue
        result[key] = numbers(values[0])
        baseline = experiments[0].baselines[key]
        if baseline != key and (both := _table(experiments, [key, baseline])).size:
            result[key]["difference"] = numbers(both[0] - both[1])
    return result


def _table(experiments: Sequence[Experiment], keys: Sequence[str]) -> np.ndarray:
    """(keys, seeds, questions) over the questions that every experiment answered under every key."""
    answered = [one.right.get(key, {}) for one in experiments for key in keys]
    common = sorted(set.intersection(*(set(one) for one in answered)))
    return np.array([[[one.right[key][index] for index in common] for one in experiments] for key in keys if common], float)


def table(result: Mapping[str, Numbers]) -> str:
    rows = []
    for key, one in result.items():
        seeds, change = one["seeds"], with_interval(one.get("difference"), sign="+")
        spread = f"{min(seeds):.1f} to {max(seeds):.1f}"
        rows.append((key, str(len(seeds)), str(one["questions"]), with_interval(one), spread, change))
    return markdown(COLUMNS, rows)


def write_results(directories: Sequence[Path], out: Path) -> dict[str, Numbers]:
    """Raises UserError: fewer than two experiments, or one without records, or nothing that all of them did."""
    if len(directories) < 2:
        raise UserError(f"beside OUT ({out}) {len(directories)} experiment is given; seeds need at least two, better five")
    check_alike(directories)
    result = across_seeds([read_experiment(directory) for directory in directories])
    if not result:
        raise UserError("the experiments have no condition and question in common; run them with one configuration")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "across_seeds.json", {"experiments": [str(one) for one in directories], "conditions": result})
    write_text(out / "across_seeds.md", table(result) + "\n")
    noisy = [key for key in result if "@" in key and "," not in key]
    for setting in dict.fromkeys(key.split("@")[0] for key in noisy):
        curve = {float(key.split("@")[1]): result[key] for key in noisy if key.startswith(f"{setting}@")}
        _draw(dict(sorted(curve.items())), out / f"{setting}.png", f"{setting}, {len(directories)} seeds", result.get(CLEAN))
    return result


def check_alike(directories: Sequence[Path]) -> None:
    """Raise UserError unless this is one experiment, each time on another checkpoint; without a configuration it is trusted."""
    asked = {one: parse_yaml(read_text(path), str(path)) for one in directories if (path := one / "config.yaml").is_file()}
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise UserError("one directory is given twice: that is one seed")
    for (first, config), (second, other) in itertools.combinations(asked.items(), 2):
        if all(config.get(key) == other.get(key) for key in ("load_model_path", "model_id")):
            raise UserError(f"{first} and {second} are of one checkpoint, so of one seed: {config.get('load_model_path')}")
        for key in (config.keys() & other.keys()) - {*WITHOUT_INFLUENCE, *BY_SEED}:
            if config[key] != other[key]:
                both = f"{config[key]!r} in {first} and {other[key]!r} in {second}"
                raise UserError(f"{key} is {both}: these are no seeds of one experiment")


def _draw(curve: Mapping[float, Numbers], path: Path, title: str, clean: Numbers | None) -> None:
    """A line for each seed; their mean with its interval."""
    scales = list(curve)
    with drawing(path, (7.5, 4.4), {}, xlabel="scale of the noise", ylabel=ACCURACY, title=title) as axes:
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
    parser = Parser("python -m experiments.across_seeds", __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("directories", type=Path, nargs="+", help="one noise experiment for each seed")
    arguments = parser.parse_args(given)
    get_logger().info(table(write_results(arguments.directories, arguments.out)))


if __name__ == "__main__":
    main()
