"""What a result says of where it was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import read_rows
from test_run import start

from systems import machine


def test_a_machine_is_named_by_processor_threads_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "git_commit", lambda: "0123456789")
    found = machine.machine()
    assert json.loads(json.dumps(found)) == found
    assert (found["threads"], found["processes"]) == (torch.get_num_threads(), 1)
    assert found["versions"]["torch"] == torch.__version__
    assert machine.described(found).endswith("commit 0123456")
    assert machine.described({**found, "processes": 2, "threads": 1}).startswith(f"{found['device']}, 2 processes of 1 thread;")


def test_epochs_and_evaluations_say_where_they_were_made(run_arguments: list[str], tmp_path: Path) -> None:
    start(run_arguments)
    assert [row["machine"] for row in read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "epoch")] == [
        machine.machine()
    ] * 3
