"""What a noise experiment has done so far: one line a question, a file for each process, so that nothing is done twice.

directory/progress/settings.json holds what was asked for, part-<rank>.jsonl the finished questions; `finished` says that they
are all. A line that a kill tore apart is dropped; everything else stays.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import distributed
from utils import UserError, append_jsonl, get_logger, read_text, write_jsonl

Record = dict[str, Any]
FOLDER, SETTINGS, FINISHED = "progress", "settings.json", "finished"
TIMESTAMP = "%Y%m%d-%H%M%S"  # of files, UTC


@dataclass
class Progress:
    """directory: of the experiment. timestamp: of its beginning, which the names of its files carry."""

    directory: Path
    timestamp: str

    @property
    def folder(self) -> Path:
        return self.directory / FOLDER

    def finish(self) -> None:
        """All is done: the next experiment of this name may be another one."""
        (self.folder / FINISHED).touch()

    def append(self, records: Iterable[Record]) -> None:
        for record in records:
            append_jsonl(self.folder / f"part-{distributed.rank()}.jsonl", record)

    def records(self) -> list[Record]:
        """Of all processes, in the order of the questions; of a question that failed first, what came of it later."""
        found: dict[int, Record] = {}
        for path in sorted([*self.folder.glob("part-*.jsonl"), *self.folder.glob("part-*.jsonl.gz")]):
            for record in _whole_lines(path):
                if record["error"] is None or record["index"] not in found:
                    found[record["index"]] = record
        return [found[index] for index in sorted(found)]


def open_progress(directory: Path, settings: dict[str, Any], fresh: bool) -> Progress:
    """Begin, or go on with, the experiment in a directory; called by all processes, done by rank 0.

    settings: everything that the answers depend on. Raises UserError if the directory holds another one that is not finished;
    a finished one keeps its result files, and this one begins beside them.
    """
    return distributed.run_on_main(lambda: _open(directory, settings, fresh))


def _open(directory: Path, settings: dict[str, Any], fresh: bool) -> Progress:
    folder = directory / FOLDER
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if not (folder / SETTINGS).is_file():
            return _begin(directory, settings)
        timestamp, problem = _saved(folder / SETTINGS, settings)
        if problem is None:
            progress = Progress(directory, timestamp)
            _gather_parts(progress)
        elif (folder / FINISHED).exists():
            shutil.rmtree(folder)
            progress = _begin(directory, settings)
        else:
            raise UserError(f"{folder / SETTINGS}: {problem}: choose another name, or set fresh: true to start over")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error}") from None
    return progress


def _begin(directory: Path, settings: dict[str, Any]) -> Progress:
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    timestamp = datetime.now(timezone.utc).strftime(TIMESTAMP)
    partial = folder / f".{SETTINGS}.partial"
    partial.write_text(json.dumps({"timestamp": timestamp, "settings": settings}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / SETTINGS)
    return Progress(directory, timestamp)


def _saved(path: Path, settings: dict[str, Any]) -> tuple[str, str | None]:
    """The timestamp of the experiment that is there, and why it is another one, if it is."""
    try:
        saved = json.loads(read_text(path))
        timestamp, known = str(saved["timestamp"]), saved["settings"]
    except (ValueError, KeyError, TypeError):
        return "", "not the settings of an experiment"
    current = json.loads(json.dumps(settings))
    for key in [*current, *known]:
        if current.get(key) != known.get(key):
            return timestamp, f"the experiment there has {key} {known.get(key)!r}, this one {current.get(key)!r}"
    return timestamp, None


def _gather_parts(progress: Progress) -> None:
    """One file instead of several, without torn lines; questions that failed are left out, to be tried again."""
    done = [record for record in progress.records() if record["error"] is None]
    write_jsonl(progress.folder / "part-0.jsonl", done)
    for path in progress.folder.glob("part-*.jsonl"):
        if path.name != "part-0.jsonl":
            path.unlink()
    if done:
        get_logger().info(f"going on after {len(done)} questions of an earlier run in {progress.directory}")


def finished_records(directory: Path) -> list[Record]:
    """The questions of an experiment, also where scripts/keep_records.sh put them. UserError: there are none."""
    records = Progress(directory, "").records()
    if not records:
        tables = any(directory.glob("summary_*.json"))
        there = "only its tables are kept; run its command for the answers" if tables else "no questions of an experiment there"
        raise UserError(f"{directory}: {there} ({FOLDER}/part-*.jsonl or part-*.jsonl.gz)")
    return records


def _whole_lines(path: Path) -> list[Record]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    lines = text.split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line break was torn apart by a kill
