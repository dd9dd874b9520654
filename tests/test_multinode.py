"""Several nodes: two torchrun agents with one rendezvous, the batch script without SLURM, files made once on each node."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, read_rows

import run
from systems import distributed
from utils import UserError, entry_point

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# run.py, but the process of the second node is hit by a signal after a step, each signal once; and small files are cached.
STRUCK = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
import run
from systems import tokens
from systems import metrics
tokens.CACHED_FROM = 0
row = metrics.Reporter.row
def struck(self, kind, values):
    row(self, kind, values)
    for step, number in ((5, signal.SIGKILL), (9, signal.SIGUSR1)):
        done = pathlib.Path({marks!r}) / str(step)
        if kind == "step" and values["step"] == step and os.environ["RANK"] == "1" and not done.exists():
            done.touch()
            os.kill(os.getpid(), number)
metrics.Reporter.row = struck
run.main()
"""


def one_process(arguments: list[str]) -> None:
    run.main.__wrapped__(arguments)  # type: ignore[attr-defined]


def two_nodes(script: Path, arguments: list[str], caches: Path) -> str:
    """Train with one process on each of two "nodes"; what the agents wrote. Both must end with exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agents, outputs = [], [caches / f"node{node}.log" for node in range(2)]
    for node, output in enumerate(outputs):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "nodes", "--local-addr", "127.0.0.1"]
        command += ["--rdzv-conf", f"is_host={1 - node}", "--max-restarts", "2", str(script), *arguments]
        own = {"HF_DATASETS_CACHE": str(caches / f"node{node}"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with output.open("w") as file:
            agents.append(
                subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, **own}, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        codes = [agent.wait(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # ends its workers too
            agent.wait(timeout=40)
    text = "".join(output.read_text(encoding="utf-8") for output in outputs)
    assert codes == [0, 0], text
    return text


def test_two_nodes_train_through_a_killed_worker_and_a_stop_signal(run_arguments: list[str], tmp_path: Path) -> None:
    """Losses as in one process with the same global batch: within 1e-5, no row missing or repeated.

    The second node's worker is killed after step 5 (the agents start all workers again, which go on from step 4) and
    signalled after step 9 (all processes save and end; the same commands go on).
    """
    arguments = [*run_arguments, "lr=1e-4", "save_every_steps=2", "num_epochs=2"]
    script = tmp_path / "struck.py"
    script.write_text(STRUCK.format(root=str(ROOT), marks=str(tmp_path)), encoding="utf-8")
    several = [*arguments, "name=several", "batch_size_training=1"]
    first = two_nodes(script, several, tmp_path)
    assert "resuming from" in first  # in the restart of the killed worker
    assert re.search(r"stopped by a signal at step (9|10);", first)
    assert "finished: 22 steps" in two_nodes(script, several, tmp_path)
    one_process([*arguments, "name=one", "batch_size_training=2"])
    one, both = (read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl") for name in ("one", "several"))
    assert [(row["kind"], row["step"]) for row in both] == [(row["kind"], row["step"]) for row in one]
    assert [row["loss"] for row in both if row["kind"] == "step"] == pytest.approx(
        [row["loss"] for row in one if row["kind"] == "step"], abs=1e-5
    )
    for node in range(2):  # training and validation data, found again by the restart and by the continued run
        assert len(list((tmp_path / f"node{node}" / "coconut").iterdir())) == 2


# --- files made once on each node ---


@pytest.mark.parametrize(("local_rank", "expected"), [("0", ["block", "barrier"]), ("1", ["barrier", "block"])])
def test_the_first_process_of_a_node_goes_first(monkeypatch: pytest.MonkeyPatch, local_rank: str, expected: list[str]) -> None:
    order: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(distributed, "barrier", lambda: order.append("barrier"))
    with distributed.first_on_each_node():
        order.append("block")
    assert order == expected
    order.clear()
    with contextlib.suppress(UserError), distributed.first_on_each_node():
        order.append("block")
        raise UserError("bad input")
    assert order == expected  # nobody waits for a process that has failed


def test_a_node_with_other_data_is_named_on_all(
    run_arguments: list[str], model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: object = UserError("data.json: no such file")
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, None, ("node2", other), None])
    evaluation = [*run_arguments, "only_eval=true", "from_scratch=false", f"load_model_path={model_directory}"]
    for arguments in (run_arguments, evaluation):
        with pytest.raises(UserError, match="node node2: data.json: no such file"):
            one_process(arguments)
    other = {"train_path": "0", "val_path": "1"}
    with pytest.raises(UserError, match=r"train_path: .*train.json is another file on node node2 \(SHA-256 0\) than on"):
        one_process(run_arguments)
    with pytest.raises(UserError, match=r"val_path: .*valid.json is another file on node node2 \(SHA-256 1\) than on"):
        one_process(evaluation)


@pytest.mark.parametrize(("rank", "local_rank", "lines"), [("0", "0", 1), ("1", "1", 0), ("4", "0", 1)])
def test_each_node_says_why_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, local_rank: str, lines: int
) -> None:
    torchrun = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for key, value in torchrun.items():
        monkeypatch.setenv(key, value)

    @entry_point
    def main(_arguments: list[str]) -> None:
        raise UserError("data.json: no such file")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.splitlines() == ["error: data.json: no such file"] * lines


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes on a node with 2 GPUs: set --nproc-per-node to 2"):
        distributed.process_group().__enter__()


# --- scripts/run_training.sbatch, with stand-ins for SLURM's commands and for torchrun ---

STAND_INS = {
    # One node; signals go to the whole step, as proctrack/linuxproc and proctrack/cgroup do it.
    "srun": """#!/usr/bin/env python3
import os, signal, subprocess, sys
program = sys.argv[sys.argv.index("bash"):]
step = subprocess.Popen(program, env={**os.environ, "SLURM_NODEID": "0", "SLURMD_NODENAME": "node1"}, start_new_session=True)
signal.signal(signal.SIGUSR1, lambda number, frame: os.killpg(step.pid, number))
sys.exit(step.wait())
""",
    "scontrol": """#!/usr/bin/env bash
echo "scontrol $*" >> "$CALLS"
case "$1 $2" in
    "show hostnames") echo node1; echo node2 ;;
    "show node") echo "   NodeAddr=10.0.0.${3#node} NodeHostName=$3" ;;
    "show job") echo "   StartTime=Unknown EndTime=$(date -d "+$LEFT seconds" +%FT%T) Deadline=N/A" ;;
esac
""",
    "python": """#!/usr/bin/env python3
import os, subprocess, sys
with open(os.environ["CALLS"], "a") as file:
    print("torchrun", *sys.argv[1:], "cache", os.environ["HF_DATASETS_CACHE"], file=file)
sys.exit(subprocess.call([sys.executable, "-c", os.environ["WORKER"], "run.py"], start_new_session=True))
""",
}
SAVES = "import pathlib, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0)); print('ready', flush=True); time.sleep(60)"


def submit(tmp_path: Path, worker: str, left: int = 60, **variables: str) -> tuple[subprocess.Popen[str], Path]:
    """The batch script on the first of two nodes, with `worker` (Python code) as the training and `left` seconds to the limit."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "TMPDIR": str(tmp_path)},
        **{"SLURM_JOB_ID": "70123", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "8"},
        **{"CALLS": str(calls), "WORKER": worker, "LEFT": str(left), **variables},
    }
    environment.pop("HF_DATASETS_CACHE", None)
    command = ["bash", str(ROOT / "scripts" / "run_training.sbatch"), "args/x.yaml", "name=a b"]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    return job, calls


def test_the_batch_script_starts_an_agent_on_each_node(tmp_path: Path) -> None:
    job, calls = submit(tmp_path, "", SLURM_GPUS_ON_NODE="4")
    output = job.communicate(timeout=30)[0]
    assert job.returncode == 0, output
    written = calls.read_text(encoding="utf-8")
    assert "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:20123 --rdzv-id 70123" in written
    assert "--rdzv-conf is_host=1 --local-addr 10.0.0.1 --max-restarts 3 run.py args/x.yaml name=a b" in written
    assert f"cache {tmp_path}/coconut-{os.getuid()}" in written
    assert "requeue" not in written  # finished before the limit


def test_near_the_limit_the_workers_save_and_the_job_is_queued_again(tmp_path: Path) -> None:
    job, calls = submit(tmp_path, SAVES)
    assert job.stdout is not None
    while "ready" not in job.stdout.readline():
        pass
    os.kill(job.pid, signal.SIGUSR1)  # what --signal=B:USR1@120 does
    output = job.communicate(timeout=30)[0]
    assert job.returncode == 0, output
    assert "saved; queued again" in output
    assert calls.read_text(encoding="utf-8").endswith("scontrol requeue 70123\n")


def test_a_job_whose_workers_cannot_save_in_time_is_queued_again(tmp_path: Path) -> None:
    busy = (
        "import os, time; print('ready', flush=True)\nwhile not os.path.exists(os.environ['TMPDIR'] + '/end'): time.sleep(0.1)"
    )
    job, calls = submit(tmp_path, busy, left=16)
    assert job.stdout is not None
    while "ready" not in job.stdout.readline():
        pass
    os.kill(job.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while "requeue" not in calls.read_text(encoding="utf-8") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert calls.read_text(encoding="utf-8").endswith("scontrol requeue 70123\n")
    os.killpg(job.pid, signal.SIGKILL)  # what SLURM does next
    (tmp_path / "end").touch()
    assert "not saved in time" in job.communicate(timeout=30)[0]


def test_a_failed_training_is_not_queued_again(tmp_path: Path) -> None:
    job, calls = submit(tmp_path, "import sys; sys.exit('error: x.yaml: no such file')", PROCESSES_PER_NODE="2")
    output = job.communicate(timeout=30)[0]
    assert job.returncode == 2
    assert output.splitlines()[-2] == "error: x.yaml: no such file"
    assert "run_training.sbatch: error: job 70123: training ended with exit code 1" in output.splitlines()[-1]
    assert "requeue" not in calls.read_text(encoding="utf-8")
