"""Do thoughts carry the answer? `python -m experiments.transfer DIRECTORY` reads a noise experiment with the control `other`.

Where a question got another question's thoughts: how often does it give the other's answer, and how often its own? Answers are
compared by their last word, as thoughts need not know whom a question is about ("Tom is a lempus.", "Sally is a lempus.").
Only questions count whose own gold answer ends in another word than that of the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation import interval
from experiments.answers.extraction import last_word
from experiments.noise.progress import Record, finished_records
from experiments.tables import with_interval
from systems.arguments import Parser
from systems.writing import write_json
from utils import UserError, entry_point, get_logger

SHARES = ("answer_of_the_other", "own_answer")


def transfer(records: list[Record]) -> dict[str, dict[str, Any]]:
    """For each place of the control: questions, and in percent with 95% intervals the answers of the other and of its own."""
    found: dict[str, dict[str, Any]] = {}
    for place, counted in sorted(transferred(records).items()):
        found[place] = {"questions": len(counted), **dict.fromkeys(SHARES)}
        for name, which in zip(SHARES, zip(*counted.values(), strict=True), strict=False):
            low, high = interval(sum(which), len(which))
            found[place][name] = {"percent": 100 * sum(which) / len(which), "low": 100 * low, "high": 100 * high}
    return found


def transferred(records: list[Record]) -> dict[str, dict[int, tuple[bool, bool]]]:
    """By place of the control and index of the question: whether the answer is the other question's, and whether its own."""
    known = {record["index"]: record for record in records if record["error"] is None}
    found: dict[str, dict[int, tuple[bool, bool]]] = {}
    for record in known.values():
        for key, outcome in record["conditions"].items():
            if "displaced_by" in outcome:
                counted = found.setdefault(key, {})
                other = known.get(outcome["displaced_by"], record)  # one that failed is left out as one with the same gold
                said = outcome["branches"][0]["answer"]
                said, theirs, own = map(last_word, (said, other["gold"], record["gold"]))
                if theirs != own:
                    counted[record["index"]] = (said == theirs, said == own)
    return found


def report(directory: Path) -> str:
    """Write transfer.json into the experiment's directory; one line for each place. UserError: there is nothing to look at."""
    found = transfer(finished_records(directory))
    if not found:
        raise UserError(f"{directory}: no experiment with the control `other` there (controls=[other])")
    write_json(directory / "transfer.json", found)
    lines = []
    for place, one in found.items():
        said = [f"{name.replace('_', ' ')} {with_interval(one[name], 'percent', unit='%') or '-'}" for name in SHARES]
        lines.append(f"{place}: {one['questions']} questions, {', '.join(said)}")
    return "\n".join(lines)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.transfer", __doc__)
    parser.add_argument("directory", type=Path)
    get_logger().info(report(parser.parse_args(given).directory))


if __name__ == "__main__":
    main()
