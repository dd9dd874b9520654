"""A process that hangs reports and ends; one that is slow, stopped by a signal, or unwatched does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from processes import ENVIRONMENT

import evaluation
import run
import training
from systems import watchdog
from systems.watchdog import Watchdog

SCRIPT = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from systems import watchdog
watchdog.GRACE = 0.1
def forever():
    time.sleep(60)
"""


def start(arguments: list[str], *more: str) -> None:
    run.main.__wrapped__([*arguments, "num_epochs=1", "batch_size_eval=3", "max_new_tokens=2", *more])


def script(body: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT + body], stderr=subprocess.PIPE, **options)


# --- what it counts ---


def seconds_until_the_end(moments: list[bool], timeout: float) -> list[float]:
    """What a watchdog reports if the process makes progress (True) or none in each of its sleeps, then ends in order."""
    dog, sleeps, reports = Watchdog(timeout), iter(moments), []

    def wait(seconds: float) -> bool:
        progress = next(sleeps, None)
        if progress:
            dog.beat("something")
        return progress is None or bool(reports)

    dog._left.wait = wait  # type: ignore[method-assign, assignment]
    dog._end = reports.append  # type: ignore[method-assign, assignment]
    dog._watch(timeout)
    return reports


def test_only_sleeps_without_progress_in_a_row_count() -> None:
    assert seconds_until_the_end([False] * 600, 600.0) == [600.0]
    assert seconds_until_the_end([False] * 599, 600.0) == []
    assert seconds_until_the_end([*[False] * 599, True] * 4, 600.0) == []
    assert seconds_until_the_end([*[False] * 599, True, *[False] * 600], 600.0) == [600.0]
    assert seconds_until_the_end([False] * 10, 2.0) == [2.0]


def test_a_process_that_is_stopped_does_not_hang() -> None:
    """SIGSTOP for longer than the timeout; afterwards it has its whole time again."""
    body = "with watchdog.Watchdog(2.0):\n    os.write(1, b'!')\n    sys.stdin.read(1)\n"
    with script(body, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
        _, error = process.communicate(b"!")
    assert (process.returncode, error) == (0, b"")


# --- what it does ---


def test_a_process_that_hangs_says_where_and_ends() -> None:
    body = "with watchdog.Watchdog(0.5) as dog:\n    dog.beat('step 12')\n    forever()\n"
    with script(body, env={**os.environ, "RANK": "3"}) as process:
        error = process.communicate(timeout=50)[1].decode()
    assert process.returncode == 1
    header, *stacks = error.strip().splitlines()
    assert re.fullmatch(
        rf"watchdog: rank 3, \S+, process {process.pid}: no progress for 0.5 seconds \(hang_timeout\) after step 12; its threads:",
        header,
    )
    assert sum(" in forever" in line for line in stacks) == 1


def test_a_pipe_that_nobody_reads_does_not_keep_it() -> None:
    with script("with watchdog.Watchdog(0.5):\n    os.write(2, bytes(10**6))\n") as process:
        assert process.wait(timeout=50) == 1


HANGS = """
import os, sys, time
sys.path.insert(0, {root!r})
import run, training
step = training.Trainer._optimizer_step
def forever():
    time.sleep(100)
def optimizer_step(self, batches):
    if os.environ["RANK"] == "1" and self.state.global_step == 2:
        forever()
    return step(self, batches)
training.Trainer._optimizer_step = optimizer_step
run.main()
"""


def test_every_process_reports_when_one_hangs(run_arguments: list[str], tmp_path: Path) -> None:
    """Process 1 hangs before its third step, in which process 0 waits for it."""
    path = tmp_path / "hangs.py"
    path.write_text(HANGS.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    result = subprocess.run(
        [*torchrun, *run_arguments, "hang_timeout=4"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert result.returncode != 0
    reports = dict(
        re.findall(
            r"^watchdog: rank (\d), [^\n]* after step 2; its threads:\n(.*?)(?=^watchdog:|\Z)", result.stderr, re.M | re.S
        )
    )
    assert sorted(reports) == ["0", "1"], result.stderr
    assert " in forever" in reports["1"]
    assert " in all_reduce" in reports["0"]


# --- where it watches ---


def test_a_slow_run_is_left_alone(run_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Together the steps and answers take longer than the timeout; each of them reports."""
    ends: list[float] = []
    done: list[str] = []
    beat = Watchdog.beat

    def slowly(owner: Any, name: str, seconds: float) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: (time.sleep(seconds), original(*arguments))[1])

    monkeypatch.setattr(Watchdog, "_end", lambda self, seconds: ends.append(seconds))
    monkeypatch.setattr(Watchdog, "beat", lambda self, what: (done.append(what), beat(self, what))[1])
    slowly(training.Trainer, "_optimizer_step", 0.2)
    slowly(evaluation.Evaluator, "_generate", 0.2)
    start(run_arguments, "hang_timeout=1", "save_every_steps=4")
    assert ends == []
    assert done == [
        *("step 1", "step 2", "step 3", "step 4", "saving checkpoint_0_step4", "step 5", "step 6"),
        *(f"{part}, batch {number} of 3" for part in ("validation loss", "answers") for number in (1, 2, 3)),
        *("saving checkpoint_1", "epoch 1"),
    ]


@pytest.mark.parametrize(("hang_timeout", "watched"), [("600", True), ("null", False)])
def test_training_and_evaluation_are_watched_unless_it_is_off(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang_timeout: str, watched: bool
) -> None:
    seen: list[bool] = []
    generate = evaluation.Evaluator._generate

    def generate_watched(*arguments: Any) -> Any:
        seen.append(any(thread.name == "watchdog" for thread in threading.enumerate()))
        return generate(*arguments)

    monkeypatch.setattr(evaluation.Evaluator, "_generate", generate_watched)
    monkeypatch.setattr(watchdog, "SLICE", 0.01)
    start(run_arguments, f"hang_timeout={hang_timeout}")
    assert seen == [watched] * 3
    for thread in threading.enumerate():  # it ends with what it watches
        if thread.name == "watchdog":
            thread.join(timeout=30)
            assert not thread.is_alive()
    more = ["name=again", "only_eval=true", "from_scratch=false", f"load_model_path={tmp_path / 'checkpoints' / 'run'}"]
    start(run_arguments, *more, f"hang_timeout={hang_timeout}")
    assert seen == [watched] * 6
