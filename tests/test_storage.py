"""Directories that are there whole or not at all, manifests, pruning, the lock of a run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_json

from systems import storage
from systems.files import Facts, TrainingState
from systems.storage import CheckpointError, complete_checkpoints, newest_whole, remove_old, write_directory
from utils import UserError, entry_point

IDS = {"start_latent_id": 5, "end_latent_id": 6, "latent_token_id": 7, "eos_token_id": 0}
FACTS = asdict(Facts("coconut", 1, 2, 3, True, 4, 0.5, **IDS))
RANDOM = {"python": (3, (1, 2), None), "numpy": ("MT19937", [1], 0, 0, 0.0), "torch": torch.zeros(2), "cuda": None}
SAVED = {"state": asdict(TrainingState(epoch=4)), "rng": [RANDOM], "optimizer": None, "adapter": None}


def fill(directory: Path) -> None:
    write_json(directory / "coconut.json", FACTS)
    torch.save(SAVED, directory / "training_state.pt")
    (directory / "model.safetensors").write_text(f"model.safetensors of {directory.name}")


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    """Three checkpoints, the last in the middle of epoch 10: names do not sort as text."""
    for name in ("checkpoint_9", "checkpoint_10", "checkpoint_10_step30"):
        write_directory(tmp_path / "run" / name, fill)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changes",
    [{"method": "mine"}, {"thought_map": "mine"}, {"thought_map": "not-mine"}, {"thought_map": {"name": "mine", "share": 0.5}}],
)
def test_rows_of_other_tables_are_no_damage(save_dir: Path, changes: dict[str, Any]) -> None:
    """A checkpoint whose method or map a file of the user's own adds is whole: nobody must be told to remove it."""

    def own(directory: Path) -> None:
        fill(directory)
        write_json(directory / "coconut.json", FACTS | changes)

    write_directory(save_dir / "checkpoint_11", own)
    with pytest.raises(UserError, match="mine is not known here; COCONUT_EXTENSIONS=MODULE imports") as error:
        newest_whole(save_dir)
    assert "damaged" not in str(error.value)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model.safetensors", cut, "model.safetensors has 47 bytes; manifest.json says 50"),
    ("model.safetensors", flip_a_bit, "model.safetensors is damaged: its SHA-256 is"),
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("training_state.pt", Path.unlink, "training_state.pt is missing"),
    ("coconut.json", cut, "coconut.json has"),
    ("manifest.json", cut, "manifest.json: damaged or of another version: Invalid JSON"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    save_dir: Path, name: str, damage: Callable[[Path], Any], message: str, capsys: Any
) -> None:
    damage(save_dir / "checkpoint_10_step30" / name)
    assert newest_whole(save_dir) == save_dir / "checkpoint_10"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{save_dir / 'checkpoint_10_step30'} is passed over: {message}")


def test_with_damaged_checkpoints_alone_nothing_starts_over(save_dir: Path) -> None:
    for path in complete_checkpoints(save_dir):
        cut(path / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"no whole checkpoint is left \(checkpoint_10_step30: model.safetensors has .*checkpoint_9.*put back",
    ):
        newest_whole(save_dir)
    assert newest_whole(save_dir / "nowhere") is None


def test_a_checkpoint_without_a_manifest_counts_only_where_none_has_one(save_dir: Path, capsys: Any) -> None:
    """The newest one may be a copy that was cut short; versions before 0.2 wrote no manifests at all."""
    (save_dir / "checkpoint_10_step30" / "manifest.json").unlink()
    assert newest_whole(save_dir) == save_dir / "checkpoint_10"
    assert "checkpoint_10_step30 is passed over: manifest.json is missing" in capsys.readouterr().out
    for name in ("checkpoint_9", "checkpoint_10"):
        (save_dir / name / "manifest.json").unlink()
    assert newest_whole(save_dir) == save_dir / "checkpoint_10_step30"


def test_a_checkpoint_that_cannot_be_entered_is_passed_over(save_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "checkpoint_10_step30":
            raise PermissionError(errno.EACCES, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert newest_whole(save_dir) == save_dir / "checkpoint_10"


WRONG: list[tuple[str, Any, str]] = [
    ("coconut.json", {**FACTS, "stage": -3}, "stage: Input should be greater than or equal to 0, got -3"),
    ("coconut.json", {**FACTS, "method": 7}, "method: Input should be a valid string"),
    ("coconut.json", {**FACTS, "format": 99}, "format: Input should be 1, got 99"),
    ("coconut.json", {**FACTS, "new": 1}, "new: "),
    ("coconut.json", {**FACTS, "accuracy": "many"}, "accuracy: "),
    ("coconut.json", [], "Input should be "),
    ("manifest.json", b'{"format": 1, "files": {"a": {"size": Infinity, "sha256": ""}}}', "files.a.size: "),
    ("manifest.json", b"[" * 100_000, "Invalid JSON: recursion limit"),
    ("manifest.json", {"format": 2, "files": {}}, "format: Input should be 1, got 2"),
    ("training_state.pt", b"", "not whole, or not written by torch.save"),
    ("training_state.pt", torch.zeros(2), "Input should be "),
    ("training_state.pt", {**SAVED, "state": {"epoch": 4, "from_the_future": 1}}, "state.from_the_future: "),
    ("training_state.pt", {**SAVED, "state": {"epoch": -4}}, "state.epoch: "),
    ("training_state.pt", {**SAVED, "rng": []}, "rng: "),
    ("training_state.pt", {"state": {}}, "rng: "),
    ("training_state.pt", {**SAVED, "adapter": torch.zeros(50, 50)}, "adapter: .*, got Tensor$"),
]


def test_the_manifest_knows_every_file_in_subdirectories_too(tmp_path: Path) -> None:
    def nested(directory: Path) -> None:
        (directory / "templates").mkdir()
        (directory / "templates" / "a.jinja").write_text("abc")

    write_directory(tmp_path / "x", nested)
    entry = {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["files"] == {"templates/a.jinja": entry}
    (tmp_path / "x" / "templates" / "a.jinja").write_text("abd")
    assert "a.jinja is damaged" in str(storage.manifest_problem(tmp_path / "x", hashes=True))
    assert storage.manifest_problem(tmp_path / "x", hashes=False) is None


@pytest.mark.parametrize(
    ("newest", "keep_last", "best", "left"),
    [
        ("checkpoint_10_step30", None, None, ["checkpoint_9", "checkpoint_10", "checkpoint_10_step30"]),
        ("checkpoint_10_step30", 1, None, ["checkpoint_10_step30"]),
        ("checkpoint_10_step30", 1, "checkpoint_9", ["checkpoint_9", "checkpoint_10_step30"]),
        ("checkpoint_10_step30", 2, None, ["checkpoint_10", "checkpoint_10_step30"]),
        # checkpoint_10_step30 was found to be damaged, and training went on from checkpoint_10
        ("checkpoint_10", 1, None, ["checkpoint_10", "checkpoint_10_step30"]),
    ],
)
def test_what_keep_last_keeps(save_dir: Path, newest: str, keep_last: int | None, best: str | None, left: list[str]) -> None:
    remove_old(save_dir / newest, keep_last, best)
    assert names(complete_checkpoints(save_dir)) == left


def test_steps_inside_a_finished_epoch_go(save_dir: Path) -> None:
    write_directory(save_dir / "checkpoint_11", fill)
    remove_old(save_dir / "checkpoint_11", None, None)
    assert names(complete_checkpoints(save_dir)) == ["checkpoint_9", "checkpoint_10", "checkpoint_11"]


def test_what_a_killed_run_left_is_removed_and_nothing_else(save_dir: Path) -> None:
    (save_dir / ".checkpoint_12.partial").mkdir()
    (save_dir / ".checkpoint_9.removed").mkdir()
    (save_dir / ".metrics.jsonl.partial").write_text("half")
    (save_dir / "notes.partial").write_text("mine")
    storage.remove_leftovers(save_dir)
    kept = {"checkpoint_9", "checkpoint_10", "checkpoint_10_step30", "notes.partial"}
    assert {path.name for path in save_dir.iterdir()} == kept


# --- single files ---


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 100 bytes. Not for a whole test: pytest's own output may go to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.json: no such\n file"), 2, "error: a.json: no such file"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.bin"),
            2,
            "error: x.bin: cannot be written: No space left on device",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_entry_points_end_with_one_line(error: BaseException, code: int, line: str, capsys: Any) -> None:
    @entry_point
    def main(arguments: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code
    assert capsys.readouterr().err == line + "\n"


# --- one run at a time ---

HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+b", buffering=0)
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(b"process 7 on node9")
if os.fork() == 0:  # as data workers do; it outlives its parent
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(storage.lock_file(directory))], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            pytest.raises(UserError, match=r"run: another run is writing there \(process 7 on node9\): wait for it"),
            storage.alone(directory),
        ):
            pass
        assert storage.lock_file(directory).exists()
        holder.kill()
        holder.wait()
        with storage.alone(directory):  # the forked process is still there
            assert f"process {os.getpid()} on " in storage.lock_file(directory).read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Its target would be emptied and written over."""
    other = tmp_path / "other"
    other.write_text("keep me")
    storage.lock_file(tmp_path / "run").symlink_to(other)
    with pytest.raises(UserError, match="run: cannot be written to: "), storage.alone(tmp_path / "run"):
        pass
    assert other.read_text() == "keep me"


@pytest.mark.parametrize("link", [False, True])
def test_a_directory_that_is_moved_lets_no_second_run_in(tmp_path: Path, link: bool) -> None:
    """The first run goes on to write under the old name, so that name is what is held; a link to it has the same lock."""
    directory = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(storage.lock_file(directory))], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        directory.mkdir()
        if link:
            (tmp_path / "linked").symlink_to(directory)
        else:
            directory.rename(tmp_path / "moved")
        again = tmp_path / "linked" if link else directory
        with pytest.raises(UserError, match="another run is writing there"), storage.alone(again):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_directory_that_stays_empty_is_removed_again(tmp_path: Path) -> None:
    with storage.alone(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / ".b.lock").exists()
    assert not (tmp_path / "a").exists()
    with storage.alone(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "metrics.jsonl").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["metrics.jsonl"]


def test_a_lock_file_that_its_holder_removes_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened, then its last holder removes it, then the lock is taken: on a file that no one else will see."""
    original = storage.fcntl.lockf
    calls = []

    def lockf(file: Any, flags: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            storage.lock_file(tmp_path).unlink()
        original(file, flags)

    monkeypatch.setattr(storage.fcntl, "lockf", lockf)
    with storage.alone(tmp_path):
        assert storage.lock_file(tmp_path).exists()
    assert len(calls) == 2


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def lockf(file: Any, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "lockf", lockf)
    with storage.alone(tmp_path):
        pass
    assert "this file system has no locks (No locks available): nothing keeps a second run out" in capsys.readouterr().out


def test_where_nothing_can_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written to: Not a directory; choose another save_path"),
        storage.alone(tmp_path / "file" / "run"),
    ):
        pass
    if Path("/sys").is_mount():  # read-only for root too
        with (
            pytest.raises(UserError, match=r"/sys/run: cannot be written to: .*; choose another save_path"),
            storage.alone(Path("/sys/run")),
        ):
            pass
