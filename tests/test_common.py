"""What the preprocessing scripts share: atomic files, errors of one line, two ways to start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from preprocessing import common


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_records_come_back_one_per_line(tmp_path):
    records = [{"question": "é?", "answer": "1", "steps": []}, {"question": "b\n", "answer": "2", "steps": ["x"]}]
    common.write_records(tmp_path / "a.json", records)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == records
    assert len(text.splitlines()) == 4
    assert names(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_nothing_and_the_old_file_stays(tmp_path):
    common.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        common.write_text(tmp_path / "a.txt", "new \udc80")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_prepare_directory_makes_it_and_leaves_nothing_in_it(tmp_path):
    common.prepare_directory(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        common.prepare_directory(tmp_path / "file" / "below")


def test_a_bad_option_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        common.OneLineParser("x.py", None).parse_args(["--no-such-option"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "x.py: error: unrecognized arguments: --no-such-option\n"


SCRIPTS = [path for path in sorted((ROOT / "preprocessing").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_from_any_directory(path: Path, tmp_path):
    done = subprocess.run([sys.executable, path, "--no-such-option"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{path.name}: error: ")
    assert len(done.stderr.splitlines()) == 1
