"""Paired tests of any two conditions of a noise experiment: `python -m experiments.compare DIRECTORY FIRST SECOND`.

DIRECTORY is that of the experiment (results/NAME, or a copy that scripts/keep_records.sh made), FIRST and SECOND are keys of
conditions as in its tables: greedy, clean, gaussian@0.5, zero/all. Without keys they are listed. McNemar's exact test and the
bootstrap interval of the difference.
"""

from __future__ import annotations

from pathlib import Path

from experiments.noise.progress import finished_records
from experiments.noise.summary import compare, condition_keys
from systems.arguments import Parser
from utils import UserError, entry_point, get_logger


def report(directory: Path, keys: list[str]) -> str:
    """One line. Raises UserError if there is no such experiment or condition."""
    records = finished_records(directory)
    known = condition_keys(records)
    for key in keys:
        if key not in known:
            raise UserError(f"{directory}: no condition {key!r}; there are {', '.join(known)}")
    if len(keys) != 2:
        return "\n".join(known)
    first, second = keys
    found = compare(records, first, second)
    return (
        f"{second} minus {first}: {found['difference']:+.1f} points (95% {found['low']:+.1f} to {found['high']:+.1f}), "
        f"right only in the first {found['only_first']}, only in the second {found['only_second']} of {found['questions']} "
        f"questions, McNemar p = {found['p_value']:.2g}"
    )


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.compare", __doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("keys", nargs="*", help="two conditions")
    arguments = parser.parse_args(given)
    get_logger().info(report(arguments.directory, arguments.keys))


if __name__ == "__main__":
    main()
