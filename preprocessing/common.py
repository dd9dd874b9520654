"""Shared by the preprocessing scripts: records in and out, and what they print.

A script that also runs as `python preprocessing/NAME.py` puts the repository's root on `sys.path` before it imports this.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from systems.writing import write_text, writing
from utils import UserError, parse_json, printable, read_text, telling

Record = dict[str, Any]
SPLITS = ("train", "valid", "test")
Row = TypeVar("Row")


def keep_inputs(inputs: Iterable[Path | None], outputs: Iterable[Path]) -> None:
    """UserError where an output is one of the inputs, under whatever name."""
    given = [path for path in inputs if path and path.exists()]
    for out in outputs:
        if out.exists() and any(out.samefile(path) for path in given):
            raise UserError(f"{out} would overwrite the input; choose another name for the output")


def prepare_directory(directory: Path) -> None:
    """Makes the directory and writes a file there once, so that a full disk or a lacking right shows before the work."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def write_records(path: Path, records: Iterable[Record]) -> None:
    """A JSON list with one record per line, whole, or the file before. Raises UserError if it cannot be written."""
    lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in records)
    write_text(path, f"[\n{lines}\n]\n")


def write_splits(prefix: Path, splits: Mapping[str, Sequence[Record]], inputs: Iterable[Path | None] = ()) -> None:
    """PREFIX_train.json and so on. UserError: one of them is an input, or cannot be written."""
    paths = {split: prefix.with_name(f"{prefix.name}_{split}.json") for split in splits}
    keep_inputs(inputs, paths.values())
    prepare_directory(prefix.parent)
    for split, path in paths.items():
        write_records(path, splits[split])


def parse_rows(source: object, unit: str, rows: Iterable[Row], parse: Callable[[Row], Record]) -> list[Record]:
    """`parse` of each row. UserError: one fails with a ValueError (`source: unit number: reason`), or there is none."""
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            records.append(parse(row))
        except ValueError as error:
            raise UserError(f"{source}: {unit} {number}: {error}") from None
    if not records:
        raise UserError(f"{source}: nothing in it; expected at least one {unit}")
    return records


def read_rows(path: Path) -> list[Any]:
    """The values of a JSON list, or of a text with one a line. UserError: the file cannot be read, or what is no JSON."""
    text = read_text(path).removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        return parse_json(text, path)
    # Not splitlines: it also cuts at characters that stand inside a question.
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(line, f"{path}: line {number}") for number, line in lines if line.strip()]


def text_field(row: Any, name: str, hint: str = "") -> str:
    """A field's text. ValueError, which ends in the hint: it is missing, blank or no string."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the field {name!r}")
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise ValueError(f"field {name!r} is missing, blank or no string{hint}")
    return row[name]


def print_table(names: Iterable[str], rows: Mapping[str, Iterable[str]]) -> None:
    """Cells side by side, one column per data set."""
    with telling():
        for name, cells in {"": names, **rows}.items():
            print(f"{name:30}" + "".join(f"{printable(cell):>16}" for cell in cells))


def print_steps(columns: Mapping[str, Sequence[Record]], more: Mapping[str, Sequence[int]] | None = None) -> None:
    """Records and numbers of steps; `more`: rows of further counts."""
    steps = [Counter(len(record["steps"]) for record in records) for records in columns.values()]
    counts = {"records": [count.total() for count in steps], **(more or {})}
    counts |= {f"{number} steps": [count[number] for count in steps] for number in sorted(set().union(*steps))}
    rows = {name: [f"{number:,}" for number in numbers] for name, numbers in counts.items()}
    means = (sum(number * n for number, n in count.items()) / max(count.total(), 1) for count in steps)
    print_table(columns, rows | {"mean steps": [f"{mean:.2f}" for mean in means]})
