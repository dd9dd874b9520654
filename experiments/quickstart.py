"""The quick start's summary: `python -m experiments.quickstart SAVE_PATH TEST_FILE OUT --seconds TOTAL`.

Reads what run.py left in SAVE_PATH/quick-{coconut,no-cot}, of training and, in eval/, of the evaluation.
Writes OUT/summary.json, figures, and copies of the metrics and predictions.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from rich.table import Table

from dataset import load_records
from evaluation import interval
from experiments.plots import epoch_curves, grouped
from files import read_typed_lines
from preprocessing.prosqa_shortcuts import depth_shortcut, shortcuts
from reporting import METRICS, show
from utils import UserError, entry_point, write_json

METHODS = {"coconut": "quick-coconut", "no_cot": "quick-no-cot"}
CHANCE = 0.5  # two options


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in a run's metrics.jsonl. Raises UserError if there are none."""
    chosen = [row for row in read_typed_lines(run / METRICS, dict[str, Any]) if row.get("kind") == kind]
    if not chosen:
        raise UserError(f"{run / METRICS}: no row of kind {kind!r}")
    return chosen


def evaluation_of(run: Path) -> Path:
    """Where the newest evaluation of a run is. Raises UserError if there is none."""
    found = sorted((run / "eval").glob(f"*/{METRICS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{run / 'eval'}: no evaluation there; run.py with only_eval=true makes one")
    return found[-1].parent


def summarise(save_path: Path, test_file: Path, seconds_total: float) -> dict[str, Any]:
    """The content of summary.json; accuracies are fractions, low and high their 95% Wilson interval."""
    records = load_records(test_file)
    summary: dict[str, Any] = {}
    for method, name in METHODS.items():
        result = read_metrics(evaluation_of(save_path / name), "evaluation")[-1]
        summary[method] = {key: result[key] for key in ("accuracy", "low", "high", "questions", "stage")}
        epochs = read_metrics(save_path / name, "epoch")
        summary[method] |= {"examples": epochs[-1]["examples"], "seconds_training": sum(row["seconds"] for row in epochs)}
    summary["depth_shortcut"] = sum(depth_shortcut(record) for record in records) / len(records)
    summary["first_option"] = sum(shortcuts(record)["first option"] for record in records) / len(records)
    summary["chance"] = CHANCE
    summary["seconds_total"] = seconds_total
    summary["seconds_training"] = sum(summary[method]["seconds_training"] for method in METHODS)
    return summary


def summary_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"Quick start: {summary['coconut']['questions']} test questions", title_justify="left")
    for column in ("", "accuracy", "95% interval", "training examples", "training minutes"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"coconut": f"Coconut, stage {summary['coconut']['stage']} (all steps latent)", "no_cot": "no-CoT control"}
    for method, name in names.items():
        row = summary[method]
        bounds = f"{row['low']:.1%} to {row['high']:.1%}"
        table.add_row(name, f"{row['accuracy']:.1%}", bounds, f"{row['examples']:,}", f"{row['seconds_training'] / 60:.1f}")
    table.add_row("depth shortcut", f"{summary['depth_shortcut']:.1%}", "", "", "")
    table.add_row("always the first option", f"{summary['first_option']:.1%}", "", "", "")
    table.add_row("chance", f"{summary['chance']:.1%}", "", "", "")
    return table


def write_results(summary: dict[str, Any], save_path: Path, test_file: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    curves = {method: read_metrics(save_path / name, "epoch") for method, name in METHODS.items()}
    epoch_curves(curves, out / "curves.png", "Quick start: small ProsQA, from scratch")
    shortcut, total = summary["depth_shortcut"], len(load_records(test_file))
    low, high = interval(round(shortcut * total), total)
    bars = {
        **{method: summary[method] for method in METHODS},
        "depth shortcut": {"accuracy": shortcut, "low": low, "high": high},
    }
    drawn = {name: {key: 100 * bar[key] for key in ("accuracy", "low", "high")} for name, bar in bars.items()}
    title = "Quick start: test questions of 2 to 3 hops"
    grouped({"test questions": drawn}, out / "accuracy.png", title, chance=100 * CHANCE)
    for method, name in METHODS.items():
        shutil.copyfile(save_path / name / METRICS, out / f"metrics_{method}.jsonl")
        newest = max(evaluation_of(save_path / name).glob("predictions_*.jsonl"), key=lambda path: path.stat().st_mtime)
        shutil.copyfile(newest, out / f"predictions_{method}.jsonl")
    write_json(out / "summary.json", summary)


@entry_point
def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart", description=__doc__)
    parser.add_argument("save_path", type=Path)
    parser.add_argument("test_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="duration of the quick start without installation")
    arguments = parser.parse_args(given)
    summary = summarise(arguments.save_path, arguments.test_file, arguments.seconds)
    write_results(summary, arguments.save_path, arguments.test_file, arguments.out)
    show(summary_table(summary))


if __name__ == "__main__":
    main()
