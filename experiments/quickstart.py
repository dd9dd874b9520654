"""The quick start's summary: `python -m experiments.quickstart SAVE_PATH TEST_FILE OUT --seconds TOTAL`.

Reads what run.py left in SAVE_PATH/quick-{cot,coconut,no-cot}, of training and, in eval/, of the evaluation.
Writes OUT/summary.json, figures, and copies of the metrics and predictions.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from dataset import load_records
from evaluation import interval
from experiments.plots import epoch_curves, grouped
from experiments.tables import terminal, text
from preprocessing.prosqa_shortcuts import depth_shortcut, shortcuts
from systems.arguments import Parser
from systems.files import read_typed_lines
from systems.metrics import METRICS, show
from systems.writing import write_json
from utils import UserError, entry_point

# Of each method its runs in their order: Coconut goes on from chain of thought. The last one is evaluated.
METHODS = {"coconut": ("quick-cot", "quick-coconut"), "cot": ("quick-cot",), "no_cot": ("quick-no-cot",)}
ROWS = (
    ("Coconut, gold thoughts", "coconut", ""),
    ("Coconut, fixed thoughts", "coconut", "_fixed"),
    ("chain of thought", "cot", ""),
    ("no-CoT control", "no_cot", ""),
)
MEANING = (
    "Gold: as many thoughts as the question's own steps ask for, which a user does not know beforehand. "
    "Fixed: as many for every question. At once: answers before which no steps were written."
)
SIMPLE = {"depth shortcut": "depth_shortcut", "always the first option": "first_option", "chance": "chance"}
CHANCE = 0.5  # two options
SCORES = ("accuracy", "low", "high", "wrote_steps", "accuracy_at_once")


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in a run's metrics.jsonl. Raises UserError if there are none."""
    chosen = [row for row in read_typed_lines(run / METRICS, dict[str, Any]) if row.get("kind") == kind]
    if not chosen:
        raise UserError(f"{run / METRICS}: no row of kind {kind!r}")
    return chosen


def evaluation_of(run: Path, latents: int | str | None = "gold", data: str = "*") -> Path:
    """Where a run's newest evaluation with these `eval_latents` (None: any), on a file of this stem, is. UserError: nowhere."""
    places = sorted((run / "eval").glob(f"{data}-*/{METRICS}"), key=lambda path: path.stat().st_mtime)
    rows = {path: read_metrics(path.parent, "evaluation")[-1] for path in places}
    found = [path for path, row in rows.items() if latents in (None, row.get("eval_latents", "gold")) and _is_of(row, run)]
    if not found:
        on = "" if data == "*" else f" of {data}"
        thoughts = "" if latents is None else f" with {latents} thoughts"
        raise UserError(f"{run / 'eval'}: no evaluation{on}{thoughts}; run.py with only_eval=true makes one")
    return found[-1].parent


def _is_of(row: dict[str, Any], run: Path) -> bool:
    """Whether an evaluation is of this run, not of another one with its configuration. What was not trained has no other."""
    if "model" not in row or not (run / METRICS).exists():
        return True
    model = Path(row["model"]).parent
    return model.resolve() == run.resolve() or (model.name == run.name and not model.exists())  # else it was moved


def read_evaluation(run: Path, latents: int | str | None = "gold", data: str = "*") -> dict[str, Any]:
    """The numbers of an evaluation; see `evaluation_of`. UserError also if it was made by an earlier version."""
    directory = evaluation_of(run, latents, data)
    row = read_metrics(directory, "evaluation")[-1]
    if "accuracy_fixed" not in row:
        raise UserError(f"{directory}: evaluated by an earlier version; remove it and evaluate again")
    return row


def read_predictions(run: Path, latents: int | str | None = "gold", data: str = "*") -> list[dict[str, Any]]:
    """The answers of an evaluation, in the order of the questions; see `evaluation_of`."""
    files = evaluation_of(run, latents, data).glob("predictions_*.jsonl")
    return read_typed_lines(max(files, key=lambda path: path.stat().st_mtime), dict[str, Any])


def summarise(save_path: Path, test_file: Path, seconds_total: float) -> dict[str, Any]:
    """The content of summary.json; accuracies are fractions, low and high their 95% Wilson interval.

    accuracy is with as many thoughts as the gold steps ask for, accuracy_fixed with as many for every question.
    """
    records = load_records(test_file)
    summary: dict[str, Any] = {}
    for method, runs in METHODS.items():
        result = read_evaluation(save_path / runs[-1])
        summary[method] = {key: result[key] for key in ("questions", "stage", *SCORES, *(f"{key}_fixed" for key in SCORES))}
        epochs = [read_metrics(save_path / run, "epoch") for run in runs]
        summary[method]["examples"] = sum(rows[-1]["examples"] for rows in epochs)
        summary[method]["seconds_training"] = sum(row["seconds"] for rows in epochs for row in rows)
        summary[method]["epochs_by_stage"] = Counter(row["stage"] for row in itertools.chain(*epochs))
        summary["machine"] = result.get("machine")
    summary["depth_shortcut"] = sum(depth_shortcut(record) for record in records) / len(records)
    summary["first_option"] = sum(shortcuts(record)["first option"] for record in records) / len(records)
    summary["chance"] = CHANCE
    summary["seconds_total"] = seconds_total
    summary["seconds_training"] = sum(summary[method]["seconds_training"] for method in ("coconut", "no_cot"))
    return summary


def summary_table(summary: dict[str, Any]) -> Table:
    title = f"Quick start: {summary['coconut']['questions']} test questions, Coconut at stage {summary['coconut']['stage']}"
    columns = ("", "accuracy", "95% interval", "at once", "right of these", "examples", "minutes")
    rows: list[tuple[str, ...]] = []
    for name, method, which in ROWS:
        row = summary[method]
        accuracy, low, high, wrote, right = (row[key + which] for key in SCORES)
        answers = (f"{accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{1 - wrote:.1%}", text(right, "{:.1%}"))
        rows.append((name, *answers, f"{row['examples']:,}", f"{row['seconds_training'] / 60:.1f}"))
    rows += [(name, f"{summary[key]:.1%}") for name, key in SIMPLE.items()]
    return terminal(title, columns, rows, MEANING)


def write_results(summary: dict[str, Any], save_path: Path, test_file: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    curves = {
        method: [row for run in METHODS[method] for row in read_metrics(save_path / run, "epoch")]
        for method in ("coconut", "no_cot")
    }
    epoch_curves(curves, out / "curves.png", "Quick start: small ProsQA, from scratch", 100 * CHANCE)
    shortcut, total = summary["depth_shortcut"], len(load_records(test_file))
    low, high = interval(round(shortcut * total), total)
    bars = {name: [summary[method][key + which] for key in SCORES[:3]] for name, method, which in ROWS}
    bars["depth shortcut"] = [shortcut, low, high]
    drawn = {name: {key: 100 * value for key, value in zip(SCORES, bar, strict=False)} for name, bar in bars.items()}
    title = "Quick start: test questions of 2 to 3 hops"
    grouped({"test questions": drawn}, out / "accuracy.png", title, lines={"chance": 100 * CHANCE})
    for method, runs in METHODS.items():
        shutil.copyfile(save_path / runs[-1] / METRICS, out / f"metrics_{method}.jsonl")
        predictions = evaluation_of(save_path / runs[-1]).glob("*predictions_*.jsonl")
        for path in sorted(predictions, key=lambda path: path.stat().st_mtime):  # the newest of a kind stays
            shutil.copyfile(path, out / f"{path.stem.rpartition('_')[0]}_{method}.jsonl")
    write_json(out / "summary.json", summary)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.quickstart", __doc__)
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
