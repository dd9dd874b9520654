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


def test_bfloat16_on_a_processor_without_it_is_said(
    run_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine.has_bfloat16("cuda")
    for has, lines in ((True, 0), (False, 1)):
        monkeypatch.setattr(machine, "has_bfloat16", lambda device, has=has: has)
        machine.warn_of_slow_bfloat16("bf16: True", "bf16=false", torch.device("cpu"))
        assert (
            capsys.readouterr().out.count("bf16: True: on this processor torch takes several times as long with bfloat16")
            == lines
        )
    start([*run_arguments, "bf16=true", "num_epochs=1", "debug=true"])
    assert "take bf16=false" in capsys.readouterr().out


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_avx512_alone_is_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN says yes to a Xeon with AVX-512 that lacks AVX512_BF16, where bfloat16 took 4.5 times as long."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    both = "flags : avx512bw avx512_bf16"
    for architecture, flags, expected in (("x86_64", "flags : avx512bw", False), ("x86_64", both, True), ("aarch64", "", True)):
        monkeypatch.setattr(machine.platform, "machine", lambda named=architecture: named)
        monkeypatch.setattr(machine, "_cpuinfo", lambda listing=flags: listing)
        assert machine.has_bfloat16() == expected
