"""The most memory that each process takes to start under FSDP: as it is, and as if each made the whole model.

    python benchmarks/start_memory.py [--layers 12 --width 768 --processes 2]

The model has random weights and GPT-2's vocabulary. In the first process that is the whole model and its shard, in the others
the shard and what is sent at a time. Peak resident memory of a process, less what the imports had taken.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import common  # first: it makes the repository importable
import torch

from config import RunConfig
from systems import distributed, meta_start


def peak() -> int:
    """In KiB, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def start(setting: common.Setting, sharded: bool) -> None:
    """In one of the processes: make the model, shard it, say how much that took."""
    with distributed.process_group() as device:
        before = peak()
        settings = {"name": "x", "model_id": "x", "train_path": "x", "val_path": "x", "coconut": True, "parallel": "fsdp"}
        model, whole = meta_start.build(lambda: common.random_model(setting, device), sharded)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        distributed.wrap(model, RunConfig(**settings).part(distributed.Parallelism), device, whole=whole)
        for rank, taken in enumerate(distributed.gather_objects(peak() - before)):
            if distributed.rank() == 0:
                print(f"  process {rank}: {taken * 1024 / weights:.2f} times the weights ({taken / 2**20:.2f} GiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sharded", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.sharded is not None:
        setting = common.Setting(arguments.layers, arguments.width, arguments.width // 64)
        start(setting, bool(arguments.sharded))
        return
    for sharded, what in enumerate(("every process makes the whole model", "the first one makes it")):
        print(what, flush=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
        own = [str(Path(__file__).resolve()), *sys.argv[1:], f"--sharded={sharded}"]
        subprocess.run([sys.executable, *torchrun, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
