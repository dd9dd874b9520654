"""Shared by the preprocessing scripts: errors of one line, files that appear whole or not at all.

A script that also runs as `python preprocessing/NAME.py` puts the repository's root on `sys.path` before it imports this.
"""

import argparse
import codecs
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Record = dict[str, Any]
SPLITS = ("train", "valid", "test")
Row = TypeVar("Row")


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line and exit code 2. The help begins with the first line of `doc`, which `python -OO` leaves out, and
    ends with `examples`: the arguments of two calls."""

    def __init__(self, program: str, doc: str | None, examples: Sequence[str] = ()) -> None:
        super().__init__(
            prog=program, description=(doc or "").partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
        )
        calls = "".join(f"  python preprocessing/{program} {example}\n" for example in examples)
        self.epilog = f"examples:\n{calls}" if calls else None

    def error(self, message: str) -> NoReturn:
        exit_with(self.prog, message)


def exit_with(program: str, message: str) -> NoReturn:
    """One line on standard error, `program: error: message`, and exit code 2."""
    print(f"{program}: error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def printable(text: str) -> str:
    """Control characters as escapes: what stands in a file must not steer the terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def keep_inputs(program: str, inputs: Iterable[Path | None], outputs: Iterable[Path]) -> None:
    """Exit code 2 where an output is one of the inputs, under whatever name."""
    given = [path for path in inputs if path and path.exists()]
    for out in outputs:
        if out.exists() and any(out.samefile(path) for path in given):
            exit_with(program, f"{out} would overwrite the input; choose another name for the output")


def prepare_directory(directory: Path) -> None:
    """Makes the directory and writes a file there once, so that a full disk or a lacking right shows before the work.

    OSError: it cannot be made or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all. OSError: it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """A JSON list with one record per line; the file appears whole or not at all. OSError: it cannot be written."""
    lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in records)
    write_text(path, f"[\n{lines}\n]\n")


def parse_rows(source: object, unit: str, rows: Iterable[Row], parse: Callable[[Row], Record]) -> list[Record]:
    """`parse` of each row. ValueError: one fails with a ValueError (`source: unit number: reason`), or there is none."""
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            records.append(parse(row))
        except ValueError as error:
            raise ValueError(f"{source}: {unit} {number}: {error}") from None
    if not records:
        raise ValueError(f"{source}: nothing in it; expected at least one {unit}")
    return records


def parse_lines(path: Path, parse: Callable[[str], Record]) -> list[Record]:
    """`parse` of each line of a UTF-8 text. OSError: it cannot be read. ValueError: as `parse_rows`, or a line is not UTF-8."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8).rstrip()
    # Not splitlines: it also cuts at characters that stand inside a question.
    return parse_rows(path, "line", content.split(b"\n") if content else [], lambda line: parse(_decoded(line)))


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}") from None


def print_steps(columns: Mapping[str, Sequence[Record]], more: Mapping[str, Sequence[int]] | None = None) -> None:
    """Records and numbers of steps side by side, one column per data set; `more`: rows of further counts."""
    steps = [Counter(len(record["steps"]) for record in records) for records in columns.values()]
    rows = {"records": [count.total() for count in steps], **(more or {})}
    rows |= {f"{number} steps": [count[number] for count in steps] for number in sorted(set().union(*steps))}
    print(f"{'':24}" + "".join(f"{printable(name):>12}" for name in columns))
    for name, counts in rows.items():
        print(f"{name:24}" + "".join(f"{count:>12,}" for count in counts))
    means = (sum(number * n for number, n in count.items()) / max(count.total(), 1) for count in steps)
    print(f"{'mean steps':24}" + "".join(f"{mean:>12.2f}" for mean in means))
