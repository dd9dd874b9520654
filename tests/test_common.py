"""What the preprocessing scripts share: records in files, two ways to start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from preprocessing import common
from utils import UserError


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_records_come_back_one_per_line(tmp_path):
    records = [{"question": "é?", "answer": "1", "steps": []}, {"question": "b\n", "answer": "2", "steps": ["x"]}]
    common.write_records(tmp_path / "a.json", records)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == records
    assert len(text.splitlines()) == 4
    assert names(tmp_path) == ["a.json"]


def test_prepare_directory_makes_it_and_leaves_nothing_in_it(tmp_path):
    common.prepare_directory(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        common.prepare_directory(tmp_path / "file" / "below")


def test_splits_take_no_input_s_place(tmp_path):
    splits = {"train": [{"question": "a"}], "test": [{"question": "b"}, {"question": "c"}]}
    common.write_splits(tmp_path / "new" / "x", splits)
    assert sorted(names(tmp_path / "new")) == ["x_test.json", "x_train.json"]
    assert len(json.loads((tmp_path / "new" / "x_test.json").read_text())) == 2
    with pytest.raises(UserError, match="would overwrite the input"):
        common.write_splits(tmp_path / "new" / "x", {"train": []}, [None, tmp_path / "new" / "x_train.json"])
    assert len(json.loads((tmp_path / "new" / "x_train.json").read_text())) == 1


SCRIPTS = [path for path in sorted((ROOT / "preprocessing").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_from_any_directory(path: Path, tmp_path):
    done = subprocess.run([sys.executable, path, "--no-such-option"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unrecognized arguments: --no-such-option\n" or "required" in done.stderr
    assert len(done.stderr.splitlines()) == 1
