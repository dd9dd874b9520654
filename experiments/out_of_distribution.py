"""What a run answers on several test files: `python -m experiments.out_of_distribution RUN FILE ...`, one table.

scripts/out_of_distribution.sh makes the files of ProsQA and evaluates the run on each. Where a file asks about each graph
twice, the last column says for how many graphs both answers are right; a guess has 25% there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset import load_records
from experiments.quickstart import read_evaluation, read_predictions
from experiments.tables import markdown, text
from systems.arguments import Parser
from utils import entry_point, get_logger

COLUMNS = ("test file", "questions", "gold thoughts, 95%", "fixed thoughts, 95%", "at once", "both of a graph, gold thoughts")


def pairs_right(records: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> float | None:
    """The share of graphs for which both questions are answered right; None if the records do not ask in pairs."""
    graphs = [(record.get("idx_to_symbol"), record.get("edges")) for record in records]
    if graphs[0] == (None, None) or graphs[::2] != graphs[1::2]:
        return None
    right = [one["correct"] for one in predictions]
    return sum(one and other for one, other in zip(right[::2], right[1::2], strict=True)) / (len(right) // 2)


def table(run: Path, files: Sequence[Path]) -> str:
    rows = []
    for file in files:
        row = read_evaluation(run, None, file.stem)
        both = pairs_right(load_records(file), read_predictions(run, None, file.stem))
        scores = [
            f"{row[f'accuracy{which}']:.1%} ({row[f'low{which}']:.1%} to {row[f'high{which}']:.1%})" for which in ("", "_fixed")
        ]
        rows.append((str(file), f"{row['questions']:,}", *scores, f"{1 - row['wrote_steps']:.1%}", text(both, "{:.1%}")))
    return markdown(COLUMNS, rows)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.out_of_distribution", __doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args(given)
    get_logger().info(table(arguments.run, arguments.files))


if __name__ == "__main__":
    main()
