"""Files that are read against types."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_json
from test_storage import WRONG, save_dir  # noqa: F401

from systems import storage
from systems.files import read_typed_lines
from systems.storage import newest_whole


@pytest.mark.parametrize(("name", "content", "reason"), WRONG)
def test_files_of_another_shape_are_named_and_the_checkpoint_before_is_taken(
    save_dir: Path, name: str, content: Any, reason: str, capsys: Any
) -> None:
    """Whole as its manifest says, but not what this version writes."""
    path = save_dir / "checkpoint_10_step30" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "training_state.pt":
        torch.save(content, path)
    else:
        write_json(path, content)
    if name != "manifest.json":
        (path.parent / "manifest.json").unlink()
        storage.write_manifest(path.parent)
    assert newest_whole(save_dir) == save_dir / "checkpoint_10"
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(f"checkpoint_10_step30 is passed over: {name}: damaged or of another version: ({reason})", line)


def test_a_bad_line_costs_itself_alone(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "part-0.jsonl"
    path.write_bytes(b'{"index": 1}\n\n\xff\n[]\n{"index": 2}\n{"ind')
    assert read_typed_lines(path, dict[str, int]) == [{"index": 1}, {"index": 2}]
    lines = capsys.readouterr().out.splitlines()
    assert [line[-18:] for line in lines] == [f"line {number} is left out" for number in (2, 3, 4)]
    assert all(line.startswith(f"{path}: damaged or of another version: ") for line in lines)
