"""Commands import without the garbage collector, and only commands do."""

from __future__ import annotations

import gc
import importlib
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import experiments
from systems import startup
from thoughts import THOUGHT_MAPS
from utils import entry_point

COMMANDS = ("run.py", "test.py", "run_noisy_experiment.py", "quick_test.py", "quick_branch_test.py", "full_test.py")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the garbage collector, which itself stays as it is."""
    done: list[str] = []
    for name in ("disable", "freeze", "enable"):
        monkeypatch.setattr(gc, name, lambda name=name: done.append(name))
    monkeypatch.setattr(gc, "isenabled", lambda: done[-1:] != ["disable"])
    monkeypatch.delitem(sys.modules, "systems.startup")
    return done


def test_a_command_imports_what_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adds_a_map.py").write_text("from thoughts import THOUGHT_MAPS\nTHOUGHT_MAPS['added'] = THOUGHT_MAPS['norm']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(THOUGHT_MAPS, "added", None)  # which is undone at the end
    monkeypatch.setenv(startup.EXTENSIONS, "adds_a_map")
    given: list[str] = []
    entry_point(given.extend)(["x"])
    assert given == ["x"]
    assert THOUGHT_MAPS["added"] is THOUGHT_MAPS["norm"]
    monkeypatch.setenv(startup.EXTENSIONS, "adds_a_map,no_such_module")
    with pytest.raises(SystemExit) as ended:
        entry_point(given.extend)([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: COCONUT_EXTENSIONS: no_such_module: No module named 'no_such_module'\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_turns_it_off_first_and_on_again_when_all_is_imported(
    name: str, collector: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "no_such_key=1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert ended.value.code == 2
    assert "no_such_key" in capsys.readouterr().err
    assert collector == ["disable", "freeze", "enable"]


@pytest.mark.parametrize("name", COMMANDS)
def test_importing_a_command_leaves_it_alone(name: str, collector: list[str]) -> None:
    runpy.run_path(str(ROOT / name), run_name="imported")
    assert collector == []


def test_python_m_turns_it_off_and_an_import_does_not(collector: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.reload(experiments)
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mine.own"])  # whose package imports experiments
    importlib.reload(experiments)
    assert collector == []
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.chat"])
    importlib.reload(experiments)
    assert collector == ["disable"]


def test_a_collector_that_was_never_off_freezes_nothing(collector: list[str]) -> None:
    startup.imported()
    assert collector == []
