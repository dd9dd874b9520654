"""run.py and other scripts in process groups that start faster than under torchrun.

torch and transformers take each process some seconds to import. Here a server imports them once, and every process is forked
from it (https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods). What torchrun itself does is
tested with torchrun: test_distributed.py, test_multinode.py, test_sweep.py, test_watchdog.py.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
SECONDS = 280


@functools.cache
def server() -> Any:
    """The context whose processes have imported what run.py imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run"])
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}):  # where it finds run.py, from any directory
        forkserver.ensure_running()
    return context


def launch(
    processes: int, arguments: list[str], *more: str, script: Path = ROOT / "run.py"
) -> subprocess.CompletedProcess[str]:
    """run.py, or another script, in a process group of so many.

    Its exit code is that of the first process that failed, after which the others are ended; what all wrote stands together.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes)}
    group |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [str(script), *arguments, *more]
    with tempfile.TemporaryDirectory() as directory:
        texts = [Path(directory, name) for name in ("stdout", "stderr")]
        workers = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(server().Process(target=work, args=(command, {**ENVIRONMENT, **group, **own}, texts)))
            workers[-1].start()
        code = wait(workers)
        return subprocess.CompletedProcess(command, code, *(text.read_text(encoding="utf-8") for text in texts))


def wait(workers: list[Any]) -> int:
    """Until all have ended or one has failed."""
    deadline = time.monotonic() + SECONDS
    while any(worker.exitcode is None for worker in workers) and not any(worker.exitcode for worker in workers):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    code = next((worker.exitcode for worker in workers if worker.exitcode), 0)
    late = [worker for worker in workers if worker.exitcode is None]
    for worker in late:
        worker.kill()
        worker.join()
    if late and not code:
        raise subprocess.TimeoutExpired("launch", SECONDS)
    return code


def work(command: list[str], environment: dict[str, str], texts: list[Path]) -> None:
    """In the new process: as if `python SCRIPT ARGUMENTS` had been started with this environment in the repository."""
    for number, text in enumerate(texts, start=1):
        os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent)]
    torch.set_num_threads(1)
    runpy.run_path(command[0], run_name="__main__")
