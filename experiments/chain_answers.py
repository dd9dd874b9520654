"""How far along its chain a run's answers are: `python -m experiments.chain_answers TEST_FILE RUN [RUN ...]`.

TEST_FILE is one of preprocessing/prosqa.py --shape chains, on which the runs were evaluated (run.py, only_eval=true). An answer
may name the concept that step 1, 2, ... of the question finds, or one of the other option's chain. So a model that is asked for
more steps than it was trained on shows how many it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset import load_records
from experiments.answers.extraction import last_word
from experiments.quickstart import read_predictions
from experiments.tables import markdown
from systems.arguments import Parser
from utils import entry_point, get_logger

OTHER, ELSE = "the other chain", "anything else"


def places(record: dict[str, Any]) -> dict[str, str]:
    """Of each concept of a question the step that finds it, counted from 1, or OTHER."""
    own = [last_word(step) for step in record["steps"]]
    names = dict.fromkeys(record["idx_to_symbol"], OTHER)
    return names | {name: str(step) for step, name in enumerate(own, start=1)}


def shares(records: Sequence[dict[str, Any]], run: Path, data: str, latents: int | str = "gold") -> dict[str, float]:
    """Of the answers of a run's newest evaluation, by the place of what they name."""
    predictions = read_predictions(run, latents, data)
    found = Counter(places(records[one["idx"]]).get(last_word(one["answer"]), ELSE) for one in predictions)
    steps = [str(step) for step in range(1, 1 + max(len(record["steps"]) for record in records))]
    return {place: found[place] / len(predictions) for place in (*steps, OTHER, ELSE)}


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.chain_answers", __doc__)
    parser.add_argument("test_file", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--latents", type=int, help="of evaluations with so many thoughts (eval_latents)")
    arguments = parser.parse_args(given)
    records = load_records(arguments.test_file)
    latents = "gold" if arguments.latents is None else arguments.latents
    rows = {str(run): shares(records, run, arguments.test_file.stem, latents) for run in arguments.runs}
    header = [f"step {place}" if place.isdigit() else place for place in next(iter(rows.values()))]
    table = [[name, *(f"{100 * share:.1f}" for share in row.values())] for name, row in rows.items()]
    get_logger().info(markdown(["answers in %", *header], table))


if __name__ == "__main__":
    main()
