"""Shared by the preprocessing scripts: errors of one line, files that appear whole or not at all.

A script that also runs as `python preprocessing/NAME.py` puts the repository's root on `sys.path` before it imports this.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

Record = dict[str, Any]
SPLITS = ("train", "valid", "test")


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        exit_with(self.prog, message)


def exit_with(program: str, message: str) -> NoReturn:
    """One line on standard error, `program: error: message`, and exit code 2."""
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


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
