"""Writing files: whole or not at all, and a full disk is one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from utils import MEBIBYTE, Config, UserError, check_regular, parse_yaml, read_text


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(config.model_dump(), sort_keys=False))


def config_changes(config: Config, path: Path) -> list[str]:
    """Keys that differ from a saved configuration, each with both values; none where that cannot be read."""
    try:
        before = parse_yaml(read_text(path), str(path))
    except UserError:
        return []
    now = config.model_dump()
    both = now.keys() & before.keys() if isinstance(before, dict) else set()
    return [f"{key} {now[key]!r}, was {before[key]!r}" for key in now if key in both and now[key] != before[key]]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside, such as a full disk, becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {disk_problem(error, path.parent)}") from None


def disk_problem(error: Exception, directory: Path) -> str:
    """Why something could not be written there. Libraries may fail in other words, or in none, when the disk is full."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().split("\n")[0]
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return reason
    full = free < MEBIBYTE and os.strerror(errno.ENOSPC) not in reason
    return f"{reason} ({os.strerror(errno.ENOSPC)})" if full else reason


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, which takes the place of `path` at the end; after an error `path` is what it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            yield partial
            fsync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's entries, outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave the one before. Raises UserError if it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write one value as JSON, whole, or leave the file before. ValueError: it holds a number that is not finite."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, or nothing. Raises UserError if they cannot be written."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one row, or nothing. Raises UserError if it cannot be written."""
    line = (json.dumps(row) + "\n").encode()
    check_regular(path)
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(line) < len(line):  # the disk took a part of it
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
