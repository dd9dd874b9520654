"""Paired tests of any two conditions of a noise experiment: `python -m experiments.compare DIRECTORY FIRST SECOND`.

With --other DIRECTORY the second condition is one of another experiment, which asked the same questions.

DIRECTORY is that of the experiment (results/NAME, or a copy that scripts/keep_records.sh made), FIRST and SECOND are keys of
conditions as in its tables: greedy, clean, gaussian@0.5, zero/all. Without keys they are listed. McNemar's exact test and the
bootstrap interval of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.noise.progress import Record, finished_records
from experiments.noise.summary import compare, condition_keys
from systems.arguments import Parser
from utils import UserError, entry_point, get_logger


def report(directory: Path, keys: list[str], other: Path | None = None) -> str:
    """One line. Raises UserError if there is no such experiment or condition, or the other one asked something else."""
    places = (directory, other or directory)
    both = [finished_records(place) for place in places]
    if len(keys) != 2:
        return "\n".join(condition_keys(both[0]))
    for place, key, records in zip(places, keys, both, strict=True):
        if key not in (known := condition_keys(records)):
            raise UserError(f"{place}: no condition {key!r}; there are {', '.join(known)}")
    first, second = keys if other is None else (f"{place} {key}" for place, key in zip(places, keys, strict=True))
    names = (f"1 {keys[0]}", f"2 {keys[1]}")  # not those with places, whose "@" would look like noise
    found = compare(paired(both, keys, names), *names)
    if not found["questions"]:
        raise UserError(f"{first}, {second}: noise reached no question in both")
    return (
        f"{second} minus {first}: {found['difference']:+.1f} points (95% {found['low']:+.1f} to {found['high']:+.1f}), "
        f"right only in the first {found['only_first']}, only in the second {found['only_second']} of {found['questions']} "
        f"questions, McNemar p = {found['p_value']:.2g}"
    )


def paired(experiments: Sequence[list[Record]], keys: Sequence[str], names: Sequence[str]) -> list[Record]:
    """The questions that both experiments answered; the condition `keys` of each under another name."""
    answered = [{record["index"]: record for record in records if record["error"] is None} for records in experiments]
    pairs = [(record, answered[1][index]) for index, record in answered[0].items() if index in answered[1]]
    if not pairs or any(one.get("gold") != other.get("gold") for one, other in pairs):
        raise UserError("the two experiments did not ask the same questions")
    return [
        {**pair[0], "conditions": {name: one["conditions"][key] for name, one, key in zip(names, pair, keys, strict=True)}}
        for pair in pairs
    ]


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.compare", __doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("keys", nargs="*", help="two conditions")
    parser.add_argument("--other", type=Path, metavar="DIRECTORY", help="of the experiment that the second condition is in")
    arguments = parser.parse_args(given)
    get_logger().info(report(arguments.directory, arguments.keys, arguments.other))


if __name__ == "__main__":
    main()
