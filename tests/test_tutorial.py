"""The tutorial's notebook, which holds every command of docs/TUTORIAL.md, run on a small model. Scripts, which install and train,
have tests of their own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from test_run import start

from experiments import notebook_page


@pytest.fixture
def quick_start(run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands look for, from a few steps of training: both runs, the test file, the configurations."""
    monkeypatch.chdir(tmp_path)
    start(run_arguments, "num_epochs=3", "name=quick-coconut")
    start(run_arguments, "num_epochs=1", "name=quick-no-cot", "method=no_cot")
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    (tmp_path / "data").mkdir(exist_ok=True)
    shutil.copyfile(data, tmp_path / "data" / "prosqa_quick_test.json")
    for name in ("args", "test.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_notebook_is_made_from_the_page() -> None:
    """Made anew by `python -m experiments.notebook_page`."""
    assert (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8") == notebook_page.notebook()


def test_every_command_works(quick_start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.reads(notebook_page.notebook(), as_version=4)
    nbformat.validate(notebook)
    notebook.cells = [cell for cell in notebook.cells if not cell.metadata.get("tags")]
    assert sum(cell.source.startswith("%%bash") for cell in notebook.cells) == 8
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()  # raises where a command fails
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(shown) == 2
    assert "forced" in (quick_start / "results" / "tutorial" / "probes.md").read_text()
    assert "data:image/png" in (quick_start / "report.html").read_text()
