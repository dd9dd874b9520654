"""Do thoughts carry the answer? `python -m experiments.transfer DIRECTORY` reads a noise experiment with the control `other`.

Where a question got another question's thoughts: how often does it give the other's answer, and how often its own? Answers are
compared by their last word, as thoughts need not know whom a question is about ("Tom is a lempus.", "Sally is a lempus.").
Only questions count whose own gold answer ends in another word than that of the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evaluation import interval
from experiments.noise.progress import Record, finished_records
from systems.writing import write_json
from utils import UserError, entry_point, get_logger

FILE = "transfer.json"


def transfer(records: list[Record]) -> dict[str, dict[str, Any]]:
    """For each place of the control: questions, and in percent with 95% intervals the answers of the other and of its own."""
    known = {record["index"]: record for record in records if record["error"] is None}
    places = sorted({key for record in known.values() for key in record["conditions"] if key.startswith("other/")})
    return {place: _place(known, place) for place in places}


def _place(known: dict[int, Record], place: str) -> dict[str, Any]:
    others, own = [], []
    for record in known.values():
        outcome = record["conditions"].get(place)
        if outcome is None or outcome["displaced_by"] not in known:
            continue
        golds = [_last_word(known[index]["gold"]) for index in (outcome["displaced_by"], record["index"])]
        if golds[0] != golds[1]:
            said = _last_word(outcome["branches"][0]["answer"])
            others.append(said == golds[0])
            own.append(said == golds[1])
    return {"questions": len(own), "answer_of_the_other": _percent(others), "own_answer": _percent(own)}


def _last_word(answer: str) -> str:
    return answer.rstrip(".").rsplit(" ", 1)[-1]


def _percent(which: list[bool]) -> dict[str, float] | None:
    if not which:
        return None
    low, high = interval(sum(which), len(which))
    return {"percent": 100 * sum(which) / len(which), "low": 100 * low, "high": 100 * high}


def report(directory: Path) -> str:
    """Write transfer.json into the experiment's directory; one line for each place. UserError: there is nothing to look at."""
    found = transfer(finished_records(directory))
    if not found:
        raise UserError(f"{directory}: no experiment with the control `other` there (controls=[other])")
    write_json(directory / FILE, found)
    lines = []
    for place, one in found.items():
        parts = [f"{name.replace('_', ' ')} {_text(one[name])}" for name in ("answer_of_the_other", "own_answer")]
        lines.append(f"{place}: {one['questions']} questions, {', '.join(parts)}")
    return "\n".join(lines)


def _text(share: dict[str, float] | None) -> str:
    return "-" if share is None else f"{share['percent']:.1f}% ({share['low']:.1f} to {share['high']:.1f})"


@entry_point
def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.transfer", description=__doc__)
    parser.add_argument("directory", type=Path)
    get_logger().info(report(parser.parse_args(given).directory))


if __name__ == "__main__":
    main()
