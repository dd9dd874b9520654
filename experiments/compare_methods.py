"""All methods side by side: `python -m experiments.compare_methods SAVE_PATH TEST_FILE OUT --seeds 0 1 2`.

Reads what scripts/compare_methods.sh left in SAVE_PATH: METHOD-seedSEED (training, and in eval/ the evaluations on
TEST_FILE and on those of --further) and METHOD-seedSEED-single of one seed (evaluation, one question at a time), and in
OUT/METHOD-seedSEED the noise experiment with another question's thoughts. A METHOD is the name of its runs, such as pccot;
the method itself stands in their config.yaml. Writes to OUT: summary.json, table.md, accuracy.png, learning_curves.png and
metrics/RUN.jsonl.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from config import RunConfig
from dataset import load_records
from experiments.across_seeds import numbers
from experiments.noise.progress import finished_records
from experiments.noise.summary import JUDGE
from experiments.plots import learning_curves, method_bars
from experiments.quickstart import CHANCE, evaluation_of, read_evaluation, read_metrics, read_predictions
from experiments.tables import markdown, text, with_interval
from methods import LATENT, METHODS, scheduled_stage, stage_shape
from preprocessing.prosqa_shortcuts import depth_shortcut
from systems.arguments import Parser
from systems.metrics import METRICS
from systems.writing import write_json, write_text
from utils import entry_point, get_logger, load_config

TIMED = "-single"  # suffix of the runs that answer one question at a time


def summarise(
    save_path: Path, out: Path, test_file: Path, seeds: Sequence[int], methods: Sequence[str], further: Sequence[Path] = ()
) -> dict[str, Any]:
    """The content of summary.json. Accuracies are fractions; deviations are those of a sample (n - 1), None of one seed.

    zero_thoughts: accuracies where the same model is given no thoughts; others_thoughts: where it is given another question's.
    Both are None where a method has none. over_seeds: accuracy in percent with its interval over seeds and questions;
    minus_first: the same of the difference to the first method, paired by seed and question. further: accuracies on other test
    files, by their stems. passes: of the model, one after the other, for an answer. question_cosine: of the same thought of two
    questions, at the end of training (`thoughts.thought_health`).
    """
    records, stem = load_records(test_file), test_file.stem
    found, right = {}, {}
    for method in methods:
        runs = [save_path / f"{method}-seed{seed}" for seed in seeds]
        right[method] = np.array([[one["correct"] for one in read_predictions(run, data=stem)] for run in runs], float)
        found[method] = {
            **summarise_method(runs, out, records, stem),
            "further": {file.stem: [read_evaluation(run, data=file.stem)["accuracy"] for run in runs] for file in further},
            "over_seeds": numbers(right[method]),
            "minus_first": None if method == methods[0] else numbers(right[method] - right[methods[0]]),
        }
    return {
        "methods": found,
        "seeds": list(seeds),
        "questions": len(records),
        "depth_shortcut": mean(depth_shortcut(record) for record in records),
        "chance": CHANCE,
    }


def summarise_method(runs: Sequence[Path], out: Path, records: list[dict[str, Any]], data: str) -> dict[str, Any]:
    results = [read_evaluation(run, data=data) for run in runs]
    epochs = [read_metrics(run, "epoch") for run in runs]
    timed = next((run for run in (one.with_name(one.name + TIMED) for one in runs) if run.is_dir()), None)
    accuracies = [result["accuracy"] for result in results]
    config = load_config(RunConfig, [str(runs[0] / "config.yaml")])
    method = METHODS[str(config.method)]
    without = [read_evaluation(run, 0, data) for run in runs] if method.markers else []
    new_tokens = mean(result["new_tokens"] for result in results)
    own_thoughts = thoughts(config, records)
    alike = [rows[-1]["question_cosine"] for rows in epochs if "question_cosine" in rows[-1]]
    return {
        "label": method.label + (" + Jacobi" if config.latent_mode == "jacobi" else ""),
        "accuracies": accuracies,
        "accuracy": mean(accuracies),
        "deviation": stdev(accuracies) if len(accuracies) > 1 else None,
        "zero_thoughts": [row["accuracy"] for row in without] or None,
        "zero_thoughts_wrote_steps": mean(row["wrote_steps"] for row in without) if without else None,
        "others_thoughts": [with_others(out / run.name) for run in runs] if LATENT in method.markers else None,
        "wrote_steps": mean(result["wrote_steps"] for result in results),
        "new_tokens": new_tokens,
        "thoughts": own_thoughts,
        "passes": passes(config, own_thoughts) + new_tokens - 1,
        "question_cosine": mean(alike) if alike else None,
        "seconds_per_question": read_evaluation(timed)["seconds_per_question"] if timed else None,
        "training_minutes": mean(sum(row["seconds"] for row in rows) for rows in epochs) / 60,
        "examples": [rows[-1]["examples"] for rows in epochs],
        "machine": results[0].get("machine"),
    }


def with_others(directory: Path) -> float:
    """Accuracy with all thoughts of another question, from a noise experiment with the control `other`."""
    outcomes = [record["conditions"]["other/all"] for record in finished_records(directory) if record["error"] is None]
    return mean(bool(outcome[JUDGE]["correct"]) for outcome in outcomes)


def passes(config: RunConfig, own_thoughts: float) -> float:
    """Of the model, one after the other, until the first token of an answer."""
    if not METHODS[str(config.method)].feeds_back:
        return 1
    return 1 + (own_thoughts if config.latent_mode == "sequential" else 1 + config.jacobi_iterations)


def thoughts(config: RunConfig, records: list[dict[str, Any]]) -> float:
    """Mean number of latents (or pauses) of a question in the last epoch."""
    stage = scheduled_stage(config.curriculum, config.num_epochs - 1)
    return mean(stage_shape(config.curriculum, stage, len(record["steps"])).thoughts for record in records)


def table(summary: dict[str, Any]) -> str:
    """Markdown."""
    further = list(next(iter(summary["methods"].values()))["further"])
    columns = [
        "accuracy, 95% over seeds and questions",
        f"minus {next(iter(summary['methods'].values()))['label']}",
        "each seed",
        *further,
        "zero thoughts (wrote steps)",
        "another question's thoughts",
        "wrote steps",
        "tokens written",
        "thoughts",
        "passes",
        "cosine of two questions' thoughts",
        "seconds a question",
        "examples, thousands",
        "training minutes",
    ]
    rows = [
        [
            f"{row['label']} (`{method}`)",
            with_interval(row["over_seeds"]),
            with_interval(row["minus_first"], sign="+"),
            ", ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracies"]),
            *(_mean(row["further"][stem]) for stem in further),
            _mean(row["zero_thoughts"]) + text(row["zero_thoughts_wrote_steps"], " ({:.0%})"),
            _mean(row["others_thoughts"]),
            f"{100 * row['wrote_steps']:.1f}%",
            f"{row['new_tokens']:.1f}",
            text(row["thoughts"] or None, "{:.1f}"),
            f"{row['passes']:.1f}",
            text(row["question_cosine"], "{:.2f}"),
            text(row["seconds_per_question"], "{:.4f}"),
            f"{min(row['examples']) / 1000:.0f} to {max(row['examples']) / 1000:.0f}",
            f"{row['training_minutes']:.1f}",
        ]
        for method, row in summary["methods"].items()
    ]
    for key in ("depth_shortcut", "chance"):
        rows.append([key.replace("_", " "), f"{100 * summary[key]:.1f}", *[""] * (len(columns) - 1)])
    return markdown(["", *columns], rows) + "\n"


def _mean(accuracies: Sequence[float] | None) -> str:
    return f"{100 * mean(accuracies):.1f}" if accuracies else ""


def write_results(summary: dict[str, Any], save_path: Path, out: Path, title: str, data: str) -> None:
    (out / "metrics").mkdir(parents=True, exist_ok=True)
    bars = {row["label"]: row["accuracies"] for row in summary["methods"].values()}
    title = f"{title}: {summary['questions']:,} test questions, {len(summary['seeds'])} seeds"
    method_bars(bars, summary["chance"], out / "accuracy.png", title)
    curves = {
        row["label"]: [read_metrics(save_path / f"{method}-seed{seed}", "epoch") for seed in summary["seeds"]]
        for method, row in summary["methods"].items()
    }
    learning_curves(curves, summary["chance"], out / "learning_curves.png", title)
    for method in summary["methods"]:
        for seed in summary["seeds"]:
            name = f"{method}-seed{seed}"
            shutil.copyfile(save_path / name / METRICS, out / "metrics" / f"{name}.jsonl")
            shutil.copyfile(evaluation_of(save_path / name, data=data) / METRICS, out / "metrics" / f"{name}-test.jsonl")
    write_text(out / "table.md", table(summary))
    write_json(out / "summary.json", summary)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.compare_methods", __doc__)
    parser.add_argument("save_path", type=Path)
    parser.add_argument("test_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--further", type=Path, nargs="+", default=[], help="other test files that the runs were evaluated on")
    parser.add_argument("--title", default="Small ProsQA from scratch", help="of the figures")
    arguments = parser.parse_args(given)
    save_path, test_file, out = arguments.save_path, arguments.test_file, arguments.out
    summary = summarise(save_path, out, test_file, arguments.seeds, arguments.methods, arguments.further)
    write_results(summary, save_path, out, arguments.title, test_file.stem)
    get_logger().info(f"{table(summary)}\ntable, figure and metrics: {out}")


if __name__ == "__main__":
    main()
