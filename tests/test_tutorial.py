"""Every command of docs/TUTORIAL.md on a small model. Scripts, which install and train, have tests of their own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_run import start

COMMANDS = [
    line.strip()
    for line in (ROOT / "docs" / "TUTORIAL.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("    ") and line.split()[0] == "python"
]


@pytest.fixture
def quick_start(run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands look for, from a few steps of training: both runs, the test file, the configurations."""
    monkeypatch.chdir(tmp_path)
    start(run_arguments, "num_epochs=3", "name=quick-coconut")
    start(run_arguments, "num_epochs=1", "name=quick-no-cot", "method=no_cot")
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    (tmp_path / "data").mkdir(exist_ok=True)
    shutil.copyfile(data, tmp_path / "data" / "prosqa_quick_test.json")
    (tmp_path / "args").symlink_to(ROOT / "args")
    return tmp_path


def test_every_command_works(quick_start: Path) -> None:
    assert len(COMMANDS) == 9
    for command in COMMANDS:
        words = shlex.split(command.replace("python test.py", f"python {ROOT / 'test.py'}"))
        result = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=quick_start,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            input="random compare\nk=2 random\nnoise=2 random\n\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, (command, result.stderr[-2000:])
    assert "forced" in (quick_start / "results" / "tutorial" / "probes.md").read_text()
    assert "data:image/png" in (quick_start / "report.html").read_text()
    assert "gaussian_scaled@2.0" in (quick_start / "results" / "mine" / "across_seeds.md").read_text()
