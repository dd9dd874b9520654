"""A run that is killed, stopped, out of disk or damaged, then started again by the same command: the same run in the end."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, chain_records, read_rows, write_json
from processes import launch
from safetensors.torch import load_file
from same_run import differences

import run
import training
from config import RunConfig
from systems import checkpoint, files, metrics, sources, storage
from systems.batches import epoch_order
from systems.checkpoint import CheckpointError
from systems.storage import complete_checkpoints, newest_whole
from utils import UserError, load_config

SMALL = ["num_epochs=2", "batch_size_training=8", "batch_size_eval=3", "max_new_tokens=2"]  # 3 steps an epoch
recorded: list[Path] = []


def start(arguments: list[str], *more: str) -> None:
    run.main.__wrapped__([*arguments, *SMALL, *more])


@pytest.fixture
def whole(run_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts, made once: nothing in it depends on where it is."""
    if not recorded:
        directory = tmp_path_factory.mktemp("recorded")
        start(run_arguments, f"save_path={directory}", "save_every_steps=1")
        recorded.append(directory / "run")
    return recorded[0]


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "run"


@pytest.fixture
def half(whole: Path, save_dir: Path) -> Path:
    """The same run, killed in its second epoch before anything of that was saved."""
    shutil.copytree(whole, save_dir)
    shutil.rmtree(save_dir / "checkpoint_2")
    return save_dir


# --- killed at any moment ---

MOMENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
watcher: Callable[[str], None] | None = None


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Tell the watcher of an operation that changes files, before it happens; what the watcher does itself is left out."""
    global watcher
    if watcher is None or event not in MOMENTS:
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    watching, watcher = watcher, None
    try:
        watching(str(arguments[0]))
    finally:
        watcher = watching


sys.addaudithook(audit)  # stays until the process ends


@pytest.fixture
def watch() -> Iterator[Callable[[Callable[[str], None] | None], None]]:
    """watch(function): call it with the path before every operation that changes files. watch(None): no longer."""

    def watch_with(function: Callable[[str], None] | None) -> None:
        global watcher
        watcher = function

    yield watch_with
    watch_with(None)


class Kills:
    """Before each change of a file in a run's directory: what is there if the run is killed now, and what a rerun would find.

    A file operation that the kernel has taken outlives the process, so the directory as it is now is what SIGKILL leaves.
    """

    def __init__(self, directory: Path, copies: Path) -> None:
        self.directory, self.copies = directory, copies
        self.states: dict[str, dict[str, Any]] = {}  # of the checkpoints found, in this order
        self.moments = 0

    def __call__(self, path: str) -> None:
        inside = path.startswith(str(self.directory)) or not path.startswith("/")  # rmtree removes relative to a folder
        if not inside or not self.directory.is_dir():
            return
        self.moments += 1
        assert complete_checkpoints(self.directory) == storage._named(self.directory), "a name is a promise"
        newest = newest_whole(self.directory)
        name = "none" if newest is None else newest.name
        if name not in self.states:
            self.states[name] = {} if newest is None else files.read_training_state(newest)["state"]
        assert name == list(self.states)[-1], "back to an older checkpoint"
        self.check(**self.states[name])
        shutil.rmtree(self.copies / name, ignore_errors=True)
        shutil.copytree(self.directory, self.copies / name, copy_function=link)

    def check(self, metrics_rows: int = 0, best_checkpoint: str | None = None, **_: Any) -> None:
        metrics = self.directory / "metrics.jsonl"
        assert metrics_rows == 0 or len(metrics.read_text().splitlines()) >= metrics_rows
        assert best_checkpoint is None or self.directory / best_checkpoint in complete_checkpoints(self.directory)


def link(source: str, target: str) -> None:
    """A copy that costs nothing; only metrics.jsonl is ever changed in place."""
    if source.endswith(".jsonl"):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


def test_killed_before_any_change_of_a_file_a_run_goes_on_exactly(
    run_arguments: list[str], whole: Path, save_dir: Path, tmp_path: Path, watch: Any
) -> None:
    """Every moment is looked at; for each checkpoint found the last one, with the most rows and leftovers, is resumed from."""
    kills = Kills(save_dir, tmp_path / "copies")
    more = ["save_every_steps=1", "keep_last=1", "epochs_per_stage=2"]  # the first epoch stays the best
    watch(kills)
    start(run_arguments, *more)
    watch(None)
    steps = [f"checkpoint_{step // 3}_step{step}" for step in (1, 2, 4, 5)]
    assert list(kills.states) == ["none", *steps[:2], "checkpoint_1", *steps[2:], "checkpoint_2"]
    assert kills.moments > 150
    assert sorted(path.name for path in save_dir.glob("checkpoint*")) == ["checkpoint_1", "checkpoint_2"]
    for name in kills.states:
        start(run_arguments, *more, f"save_path={tmp_path / 'copies'}", f"name={name}")
        assert differences(save_dir, tmp_path / "copies" / name) == []
        left = {path.name for path in (tmp_path / "copies" / name).iterdir()}
        assert left == {path.name for path in save_dir.iterdir()}


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', b"\xff\x00", b"\n", b'{"kind": "step", "step": 9}\n{"kind'])
def test_a_row_that_was_cut_short_is_written_again(run_arguments: list[str], whole: Path, half: Path, tail: bytes) -> None:
    with (half / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    start(run_arguments)
    assert differences(whole, half) == []


# run.py, but SIGKILL comes just before a checkpoint gets its name, and, after a rerun, when the evaluation's answers are written.
KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
import run
def audit(event, arguments):
    for number, (kind, name) in enumerate((("os.rename", ".checkpoint_0_step2.partial"), ("open", "predictions_1.jsonl.partial"))):
        done = pathlib.Path({marks!r}) / str(number)
        if event == kind and str(arguments[0]).endswith(name) and not os.path.exists(done):
            os.mkdir(done)
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
run.main()
"""


def test_a_process_that_is_killed_goes_on_exactly(
    run_arguments: list[str], whole: Path, save_dir: Path, tmp_path: Path
) -> None:
    """Two real kills, each at an event, so that neither a fast nor a busy machine misses it."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), marks=str(tmp_path)), encoding="utf-8")
    command = [sys.executable, str(script), *run_arguments, *SMALL, "save_every_steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    codes = [subprocess.run(command, env=environment, check=False).returncode for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert differences(whole, save_dir) == []


STAND_IN = """
import pathlib, sys, time
print("a table of optimizer steps", flush=True)
directory = pathlib.Path(sys.argv[1])
if not directory.with_suffix(".2.log").exists():  # the third start ends by itself
    (directory / ".checkpoint_1.partial").mkdir(parents=True, exist_ok=True)
    time.sleep(250)
"""


def test_the_kill_test_kills_and_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/kill_test.py with a stand-in for run.py that is saving until it is killed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    kill_test = importlib.import_module("kill_test")
    monkeypatch.setattr(kill_test, "AIMS", ("saving",))
    command = [sys.executable, "-c", STAND_IN, str(tmp_path / "run")]
    assert kill_test.run_with_kills(command, tmp_path / "run", 2, window=0.1, rng=random.Random(0)) == ["saving", "saving"]


def test_the_kill_test_has_runs_that_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    kill_test = importlib.import_module("kill_test")
    for name, changes in kill_test.CONFIGURATIONS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.yaml").write_text("name: killed\n")
        config = load_config(RunConfig, [str(folder / "run.yaml"), *kill_test.settings(folder, changes)])
        rows = config.batch_size_training * config.gradient_accumulation_steps
        assert math.ceil((config.examples_per_epoch or 64) / rows) == 8  # `kill_test.moment` counts on it


def test_an_evaluation_adds_its_row_after_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "evaluation"}\n{"kind": "eval')
    assert metrics._truncate(path, keep_rows=None) == 1
    assert path.read_text() == '{"kind": "evaluation"}\n'


def test_rows_that_are_gone_are_said(run_arguments: list[str], half: Path, capsys: Any) -> None:
    (half / "metrics.jsonl").write_text("")
    start(run_arguments)
    assert "metrics.jsonl: 0 rows are there, 4 were written before the checkpoint" in capsys.readouterr().out
    assert len(read_rows(half / "metrics.jsonl")) == 4


def test_a_checkpoint_of_an_earlier_version_goes_on(run_arguments: list[str], whole: Path, save_dir: Path, watch: Any) -> None:
    """Without a manifest, hashes of the data, and the number of samples that the epoch has taken."""

    class Dead(BaseException):
        pass

    def die(path: str) -> None:
        if path.endswith("predictions_1.jsonl.partial"):
            raise Dead

    watch(die)
    with pytest.raises(Dead):
        start(run_arguments, "save_every_steps=2")
    watch(None)
    directory = save_dir / "checkpoint_0_step2"
    (directory / "manifest.json").unlink()
    facts = json.loads((directory / "coconut.json").read_text())
    write_json(directory / "coconut.json", {key: value for key, value in facts.items() if key != "data"})
    loaded = files.read_training_state(directory)
    del loaded["state"]["samples_in_epoch"]
    torch.save(loaded, directory / "training_state.pt")
    start(run_arguments)
    assert differences(whole, save_dir) == []


# --- damage ---


def test_a_damaged_checkpoint_is_passed_over_and_made_again(
    run_arguments: list[str], whole: Path, half: Path, capsys: Any
) -> None:
    shutil.copytree(whole / "checkpoint_2", half / "checkpoint_2")
    content = bytearray((half / "checkpoint_2" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (half / "checkpoint_2" / "model.safetensors").write_bytes(content)
    start(run_arguments, "keep_last=1", "save_every_steps=1")
    lines = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert len(lines) == 1
    assert "checkpoint_2 is passed over: model.safetensors is damaged" in lines[0]
    assert differences(whole, half) == []


def test_with_damaged_checkpoints_alone_training_does_not_start_over(run_arguments: list[str], half: Path) -> None:
    before = (half / "metrics.jsonl").read_bytes()
    (half / "checkpoint_1" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left \(checkpoint_1: config.json is missing\)"):
        start(run_arguments)
    assert (half / "metrics.jsonl").read_bytes() == before


def test_an_evaluation_leaves_the_training_of_the_same_name_as_it_is(run_arguments: list[str], half: Path) -> None:
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "predictions_1.jsonl"} <= before.keys()
    with storage.alone(half):  # even while the training goes on
        start(run_arguments, "only_eval=true", "from_scratch=false", "max_new_tokens=3", f"load_model_path={half}")
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()} == before
    (place,) = (half / "eval").iterdir()
    assert place.name.endswith("-run-checkpoint_1")
    assert {path.name for path in place.iterdir()} == {"config.yaml", "metrics.jsonl", "predictions_1.jsonl"}


def test_load_model_path_is_checked(run_arguments: list[str], half: Path) -> None:
    directory = half / "checkpoint_1"
    evaluate = ["name=again", "only_eval=true", "from_scratch=false"]
    (directory / "training_state.pt").unlink()  # a model that is passed on does not need it
    start(run_arguments, *evaluate, f"load_model_path={directory}")
    write_json(half / "manifest.json", {"name": "of something else"})
    sources.check_whole(half)  # no checkpoint, so no manifest of ours
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"model.safetensors has 1,000 bytes; manifest.json says .* put back a copy"):
        start(run_arguments, *evaluate, f"load_model_path={directory}")


def test_the_clock_decides_nothing(run_arguments: list[str], whole: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole / "checkpoint_1", half / "checkpoint_0")  # an older one that looks newer
    for age, name in enumerate(("checkpoint_1", "checkpoint_0")):
        for path in (half / name, *(half / name).iterdir()):
            os.utime(path, (2e9 + age, 2e9 + age))
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    start(run_arguments)
    assert differences(whole, half) == []
    assert all(row.get("seconds", 0) >= 0 for row in read_rows(half / "metrics.jsonl"))


def test_changed_data_are_refused_unless_asked_for(run_arguments: list[str], half: Path, tmp_path: Path, capsys: Any) -> None:
    path = write_json(tmp_path / "train.json", chain_records(21))
    now = storage.sha256(path)
    saved = files.read_facts(half / "checkpoint_1").data["train_path"]
    message = f"train_path: {path} has changed since .*checkpoint_1 was saved: its SHA-256 is {now}, it was {saved}"
    with pytest.raises(CheckpointError, match=message):
        start(run_arguments)
    start(run_arguments, "allow_changed_data=true")
    assert re.search(message, capsys.readouterr().out)
    assert files.read_facts(half / "checkpoint_2").data["train_path"] == now != saved
    start(run_arguments)  # now it is the data of the newest checkpoint


def test_a_changed_configuration_is_said(run_arguments: list[str], half: Path, capsys: Any) -> None:
    start(run_arguments, "lr=5e-4")
    line = next(line for line in capsys.readouterr().out.splitlines() if "the configuration has changed" in line)
    assert "lr 0.0005, was 0.001" in line
    assert "seed" not in line
    shutil.rmtree(half / "checkpoint_2")
    start(run_arguments, "lr=5e-4")
    assert "the configuration has changed" not in capsys.readouterr().out


# --- stopped by a signal ---


def send(number: int, patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> list[int]:
    """Send this process a signal in the given call of a method; returns a list that gets one entry per call."""
    original, calls = getattr(owner, name), []

    def method(self: Any, *arguments: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    patch.setattr(owner, name, method)
    return calls


def test_a_signal_ends_an_evaluation_which_is_repeated(
    run_arguments: list[str], whole: Path, save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        calls = send(signal.SIGINT, patch, training.InterruptibleEvaluator, "_generate", 4)  # the first of 3 in epoch 2
        start(run_arguments)
    assert calls == [1, 2, 3, 4]
    assert "stopped by a signal at step 6" in capsys.readouterr().out
    assert newest_whole(save_dir) == save_dir / "checkpoint_1_step6"
    assert len(read_rows(save_dir / "metrics.jsonl", "epoch")) == 1
    start(run_arguments)
    assert differences(whole, save_dir) == []


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_between_epochs_stops_before_the_next_step(
    run_arguments: list[str], whole: Path, save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, call: int
) -> None:
    with monkeypatch.context() as patch:
        send(signal.SIGUSR1, patch, training.Trainer, "_epoch", call)
        start(run_arguments)
    assert f"stopped by a signal at step {3 * (call - 1)}" in capsys.readouterr().out
    assert [path.name for path in complete_checkpoints(save_dir)] == (["checkpoint_0_step0"], ["checkpoint_1"])[call - 1]
    start(run_arguments)
    assert differences(whole, save_dir) == []


def test_preemption_while_the_model_is_loaded_stops_before_the_first_step(
    run_arguments: list[str], whole: Path, save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    original = run.build_model

    def build(number: int) -> Callable[..., Any]:
        return lambda *arguments: (os.kill(os.getpid(), number), original(*arguments))[1]

    with monkeypatch.context() as patch:
        patch.setattr(run, "build_model", build(signal.SIGTERM))
        start(run_arguments)
        assert "stopped by a signal at step 0" in capsys.readouterr().out
        patch.setattr(run, "build_model", build(signal.SIGINT))  # nothing is there that could be saved
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        with pytest.raises(KeyboardInterrupt):
            start(run_arguments)
        signal.signal(signal.SIGINT, before)
    start(run_arguments)
    assert differences(whole, save_dir) == []


# --- another number of samples a step, as with another number of processes ---


@pytest.mark.parametrize("samples", [4, 6, 16])
def test_a_resume_with_other_batches_takes_the_same_samples(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    seen: list[int] = []
    original = training.Trainer._optimizer_step

    def optimizer_step(self: training.Trainer, batches: Any) -> Any:
        if self.state.global_step == 4 and not seen[15:]:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.extend(int(idx) for batch in batches for idx in batch["idx"])
        return original(self, batches)

    monkeypatch.setattr(training.Trainer, "_optimizer_step", optimizer_step)
    more = ["num_epochs=1", "batch_size_training=3"]
    start(run_arguments, *more)
    assert len(seen) == 15
    start(run_arguments, *more, f"batch_size_training={samples}")
    assert seen == epoch_order(22, 0, 0).tolist()
    assert files.read_training_state(save_dir / "checkpoint_1")["state"]["epoch"] == 1


def test_steps_by_length_go_on_exactly_and_with_the_same_global_batch_only(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["num_epochs=1", "batch_size_training=3", "group_by_length=true"]
    start(run_arguments, *more, "name=whole")
    original = training.Trainer._optimizer_step

    def optimizer_step(self: training.Trainer, batches: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_optimizer_step", optimizer_step)
        start(run_arguments, *more, "name=half")
    with pytest.raises(UserError, match="group_by_length: inside an epoch a run goes on with the global batch that it began"):
        start(run_arguments, *more, "name=half", "batch_size_training=4")
    start(run_arguments, *more, "name=half")
    checkpoints = tmp_path / "checkpoints"
    assert differences(checkpoints / "whole", checkpoints / "half") == []
    assert 0 <= read_rows(checkpoints / "half" / "metrics.jsonl", "epoch")[-1]["padding"] < 1
    result = launch(2, run_arguments, *more[::2], "batch_size_training=3", "gradient_accumulation_steps=1", "name=two")
    assert result.returncode == 0, result.stderr
    start(run_arguments, *more[::2], "batch_size_training=6", "name=one")
    rows = [read_rows(checkpoints / name / "metrics.jsonl", "epoch")[-1] for name in ("one", "two")]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-5)


# --- a full disk, a read-only one, a second run ---


@pytest.mark.parametrize(
    ("victim", "checkpoints"),
    [
        ("config.yaml", []),
        ("metrics.jsonl", []),
        ("coconut.json", []),
        ("checkpoint_0_step2.partial", ["checkpoint_0_step1"]),
        ("predictions_1.jsonl", ["checkpoint_0_step1", "checkpoint_0_step2"]),
        ("checkpoint_1.partial/.manifest.json", ["checkpoint_0_step1", "checkpoint_0_step2"]),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(
    run_arguments: list[str],
    save_dir: Path,
    watch: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    victim: str,
    checkpoints: list[str],
) -> None:
    def fail(path: str) -> None:
        if path.startswith(str(save_dir)) and victim in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    watch(fail)
    monkeypatch.setattr("sys.argv", ["run.py", *run_arguments, *SMALL, "save_every_steps=1", "num_epochs=1"])
    with pytest.raises(SystemExit) as caught:
        run.main()
    watch(None)
    assert caught.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "No space left on device" in error[0]
    left = [path.name for path in complete_checkpoints(save_dir)]
    assert left == checkpoints[-1:] if save_dir.exists() else checkpoints == []
    assert not [path for path in save_dir.glob(".*") if path.name != ".lock"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up_ends_the_run_and_space_lets_it_go_on(
    run_arguments: list[str], whole: Path, small_disk: Path
) -> None:
    with pytest.raises(CheckpointError, match="could not be written: .*No space left on device.*before it are untouched"):
        start(run_arguments, f"save_path={small_disk}", "save_every_steps=1")
    newest = newest_whole(small_disk / "run")
    assert newest is not None
    assert not list((small_disk / "run").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    start(run_arguments, f"save_path={small_disk}", "save_every_steps=1")
    assert differences(whole, small_disk / "run") == []


def test_a_place_that_cannot_be_written_to_is_said_before_anything_else(run_arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run: cannot be written to: Not a directory; choose another save_path"):
        start(run_arguments, f"save_path={tmp_path / 'file'}", "train_path=nowhere.json")


def test_data_that_may_never_end_are_refused(run_arguments: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=f"{path}: not a regular file"):
            start(run_arguments, f"val_path={path}")


def test_a_read_only_file_system_is_said_before_anything_else(run_arguments: list[str], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="run: cannot be written to: Read-only file system; choose another save_path"):
        start(run_arguments, f"save_path={small_disk}", "train_path=nowhere.json")


def test_a_second_run_on_the_same_directory_is_refused(run_arguments: list[str], half: Path) -> None:
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(storage.lock_file(half))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        before = {path.name: path.stat().st_mtime_ns for path in half.iterdir()}
        with pytest.raises(
            UserError, match="run: another run is writing there .*: wait for it or stop it, or choose another name"
        ):
            start(run_arguments)
        assert {path.name: path.stat().st_mtime_ns for path in half.iterdir()} == before
        first.communicate(b"\n")


# --- saving in the background ---


def test_saving_in_the_background_changes_nothing(
    run_arguments: list[str], whole: Path, save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint is written only after the next optimizer step, which must not change what it holds."""
    steps: list[int] = []
    original_step, original_fill = training.Trainer._optimizer_step, checkpoint._fill_model

    def optimizer_step(self: training.Trainer, batches: Any) -> Any:
        result = original_step(self, batches)
        steps.append(self.state.global_step)
        return result

    def fill_model(*arguments: Any) -> None:
        before = len(steps)
        while before == len(steps) < 6:
            time.sleep(0.001)
        original_fill(*arguments)

    monkeypatch.setattr(training.Trainer, "_optimizer_step", optimizer_step)
    monkeypatch.setattr(checkpoint, "_fill_model", fill_model)
    start(run_arguments, "async_save=true", "save_every_steps=1")
    for path in [save_dir / "checkpoint_1", save_dir / "checkpoint_2"]:
        for key, value in load_file(whole / path.name / "model.safetensors").items():
            assert torch.equal(value, load_file(path / "model.safetensors")[key]), key
    assert differences(whole, save_dir) == []


def test_an_error_in_the_background_ends_the_run(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = torch.save, []

    def save(value: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise RuntimeError("unexpected pos 576 vs 534")
        original(value, path)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    with pytest.raises(CheckpointError, match="checkpoint_0_step2: the checkpoint could not be written: unexpected pos 576"):
        start(run_arguments, "async_save=true", "save_every_steps=1")
    assert [path.name for path in complete_checkpoints(save_dir)] == ["checkpoint_0_step1"]


def test_a_run_that_ends_with_an_error_finishes_what_it_is_writing(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, fill = training.Trainer._optimizer_step, checkpoint._fill_model

    def optimizer_step(self: training.Trainer, batches: Any) -> Any:
        if self.state.global_step == 1:
            raise UserError("the loss is nan")
        return step(self, batches)

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        fill(*arguments)

    monkeypatch.setattr(training.Trainer, "_optimizer_step", optimizer_step)
    monkeypatch.setattr(checkpoint, "_fill_model", slow)
    with pytest.raises(UserError, match="the loss is nan"):
        start(run_arguments, "async_save=true", "save_every_steps=1")
    assert [path.name for path in complete_checkpoints(save_dir)] == ["checkpoint_0_step1"]
