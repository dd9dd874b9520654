"""What a noise experiment has done so far: one line a question, a file for each process, so that nothing is done twice.

directory/progress/settings.json holds what was asked for, part-<rank>.jsonl the finished questions. A line that cannot be read
costs its question alone, which is answered again. Each record carries the hash of the settings and the commit of the code that
made it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from noise import noise_types
from systems import distributed
from systems.files import read_typed, read_typed_lines
from systems.machine import git_commit
from systems.writing import append_jsonl, write_json, write_jsonl
from utils import UserError, get_logger

Record = dict[str, Any]
FOLDER, SETTINGS = "progress", "settings.json"
FIGURES = (*noise_types(), "targeted-*", "coverage_*", "noise_types", "diversity", "controls")
RESULTS = (f"*_{'[0-9]' * 8}-{'[0-9]' * 6}.json", *(f"{name}.png" for name in FIGURES), "table.txt", "config.yaml")
TIMESTAMP = "%Y%m%d-%H%M%S"  # of files, UTC


class Saved(BaseModel):
    """settings.json."""

    timestamp: str
    settings: dict[str, Any]


class _Line(BaseModel):
    """What every record has, and what every answered one has; the rest is the experiment's own."""

    model_config = ConfigDict(extra="allow")

    index: int
    error: str | None

    @model_validator(mode="after")
    def _whole(self) -> _Line:
        missing = {"conditions", "n_latents", "seconds"} - (self.model_extra or {}).keys()
        if self.error is None and missing:
            raise ValueError(f"an answered question without {', '.join(sorted(missing))}")
        return self


@dataclass
class Progress:
    """directory: of the experiment. timestamp: of its beginning, which the names of its files carry.

    settings: the hash that its records carry; None takes records of any. commit: of the code that runs now.
    """

    directory: Path
    timestamp: str
    settings: str | None = None
    commit: str | None = None

    @property
    def folder(self) -> Path:
        return self.directory / FOLDER

    def append(self, records: Iterable[Record]) -> None:
        for record in records:
            mark = {"settings_sha256": self.settings, "git_commit": self.commit}
            append_jsonl(self.folder / f"part-{distributed.rank()}.jsonl", {**record, **mark})

    def records(self) -> list[Record]:
        """Of all processes, in the order of the questions; of a question that failed first, what came of it later.

        Records of other settings are left out; those of version 0.1 do not say which settings they had.
        """
        found: dict[int, Record] = {}
        for path in sorted([*self.folder.glob("part-*.jsonl"), *self.folder.glob("part-*.jsonl.gz")]):
            for line in read_typed_lines(path, _Line):
                record = line.model_dump()
                own = self.settings in (None, record.setdefault("settings_sha256", self.settings))
                if own and (record["error"] is None or record["index"] not in found):
                    found[record["index"]] = record
        return [found[index] for index in sorted(found)]


def open_progress(directory: Path, settings: dict[str, Any], fresh: bool, defaults: dict[str, Any] | None = None) -> Progress:
    """Begin, or go on with, the experiment in a directory; called by all processes, done by rank 0.

    settings: everything that the answers depend on. defaults: of settings that an older version did not have.
    fresh: forget the experiment that is there, with its results. Raises UserError if the directory holds another one.
    """
    return distributed.run_on_main(lambda: _open(directory, settings, fresh, defaults or {}))


def _open(directory: Path, settings: dict[str, Any], fresh: bool, defaults: dict[str, Any]) -> Progress:
    folder = directory / FOLDER
    try:
        if fresh:
            _forget(directory)
        if not (folder / SETTINGS).is_file():
            return _begin(directory, settings)
        saved = read_typed(folder / SETTINGS, Saved)
        progress = Progress(directory, saved.timestamp, _digest(saved.settings), git_commit())
        if problem := _difference({**defaults, **saved.settings}, json.loads(json.dumps(settings))):
            if any(record["error"] is None for record in progress.records()):
                raise UserError(f"{folder / SETTINGS}: {problem}: choose another name, or set fresh: true to start over")
            _forget(directory)  # nothing was answered
            return _begin(directory, settings)
        _gather_parts(progress)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error}") from None
    return progress


def _begin(directory: Path, settings: dict[str, Any]) -> Progress:
    timestamp = datetime.now(timezone.utc).strftime(TIMESTAMP)
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(directory / FOLDER / SETTINGS, {"timestamp": timestamp, "settings": settings})
    return Progress(directory, timestamp, _digest(settings), git_commit())


def _digest(settings: dict[str, Any]) -> str:
    """Of all but the name: a directory may be copied under another one."""
    named = {key: value for key, value in settings.items() if key != "name"}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def _forget(directory: Path) -> None:
    """Remove an experiment's progress and result files; what else is in its directory stays."""
    if not (directory / FOLDER).is_dir():
        return
    shutil.rmtree(directory / FOLDER)
    for pattern in RESULTS:
        for path in directory.glob(pattern):
            path.unlink()


def _difference(known: dict[str, Any], current: dict[str, Any]) -> str | None:
    """The first setting in which two experiments differ, with both values."""
    for key in [*current, *known]:
        if key != "name" and current.get(key) != known.get(key):
            return f"the experiment there has {key} {known.get(key)!r}, this one {current.get(key)!r}"
    return None


def _gather_parts(progress: Progress) -> None:
    """One file instead of several, without torn lines; questions that failed are left out, to be tried again."""
    done = [record for record in progress.records() if record["error"] is None]
    write_jsonl(progress.folder / "part-0.jsonl", done)
    for path in progress.folder.glob("part-*.jsonl"):
        if path.name != "part-0.jsonl":
            path.unlink()
    if done:
        get_logger().info(f"going on after {len(done)} questions of an earlier run in {progress.directory}")
    others = {record.get("git_commit") for record in done} - {progress.commit}  # version 0.1 did not say
    if others:
        commits = ", ".join(sorted(one or "a commit that is not known" for one in others))
        get_logger().warning(f"{progress.directory}: questions answered by other code: {commits}; now {progress.commit}")


def finished_records(directory: Path) -> list[Record]:
    """The questions of an experiment, also where scripts/keep_records.sh put them. UserError: there are none."""
    records = Progress(directory, "").records()
    if not records:
        tables = any(directory.glob("summary_*.json"))
        there = "only its tables are kept; run its command for the answers" if tables else "no questions of an experiment there"
        raise UserError(f"{directory}: {there} ({FOLDER}/part-*.jsonl or part-*.jsonl.gz)")
    return records
