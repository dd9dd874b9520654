"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from test_storage import save_dir, small_files  # noqa: F401

from systems import writing
from systems.storage import CheckpointError, newest_whole, write_directory
from systems.writing import append_jsonl, write_text
from utils import UserError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "before")
    with small_files(), pytest.raises(UserError, match=r"config.yaml: cannot be written: File too large"):
        write_text(path, "x" * 200)
    assert [one.name for one in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "before"


def test_a_row_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"text": "x" * 60})
    with small_files(), pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        append_jsonl(path, {"text": "x" * 60})  # 27 of its 73 bytes fit
    assert path.read_text() == json.dumps({"text": "x" * 60}) + "\n"


def test_a_full_disk_is_named_where_a_library_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writing.disk_problem(RuntimeError("unexpected pos 576 vs 534\nmore"), tmp_path) == "unexpected pos 576 vs 534"
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert writing.disk_problem(RuntimeError("unexpected pos"), tmp_path) == "unexpected pos (No space left on device)"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("torch"), SafetensorError("x")]
)
def test_what_cannot_be_written_leaves_what_was_there(save_dir: Path, error: Exception) -> None:
    def failing(directory: Path) -> None:
        (directory / "model.safetensors").write_text("half")
        raise error

    before = sorted(path.name for path in save_dir.iterdir())
    with pytest.raises(CheckpointError, match="the checkpoint could not be written: .*the checkpoints before it are untouched"):
        write_directory(save_dir / "checkpoint_11", failing)
    with pytest.raises(CheckpointError, match="could not be written"):
        write_directory(save_dir / "checkpoint_10", failing)
    assert sorted(path.name for path in save_dir.iterdir()) == before
    assert newest_whole(save_dir) == save_dir / "checkpoint_10_step30"
