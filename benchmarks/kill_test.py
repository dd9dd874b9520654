"""A small training run killed with SIGKILL at random moments ends as one that nothing interrupts: bit for bit, on a CPU.

    python benchmarks/kill_test.py [--configuration one_row] [--kills 60] [--out results/benchmarks/kill_test.json]
    python benchmarks/kill_test.py --configuration fsdp_shards --processes 2

The same command is started again after each kill until the run is finished, then the next run begins, until so many kills
are reached. A moment is drawn uniformly from a part of the run after each start; two of three kills then wait for the next
save, or the next evaluation, and fall into that. With several processes all are killed together, or one of them, which ends
the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common  # first: it makes the repository importable
import psutil
import torch
from same_run import differences, timeless_rows
from transformers import AutoConfig, AutoModelForCausalLM

from preprocessing.prosqa import chain_records
from systems.storage import complete_checkpoints

TRAINING = "optimizer steps"  # the line that run.py writes just before its first step
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
AIMS = ("anything", "saving", "evaluation")  # what a kill waits for
INSIDE = 0.02  # seconds: how far into it, at most
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}

# What each configuration changes in `settings`. All have 8 steps an epoch.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "one_row": {"batch_size_training": 1, "gradient_accumulation_steps": 8},
    "uneven": {"examples_per_epoch": 57},  # one question in the last step
    "accumulation": {"batch_size_training": 2, "gradient_accumulation_steps": 4},
    "mixed_stages": {"uniform_prob": 0, "earlier_stage_prob": 0.5, "pad_latent_to_max": False},
    "icot": {"method": "icot", "uniform_prob": 0, "icot_tokens_per_epoch": 6},
    "lora": {"from_scratch": False, "lora_r": 4, "lora_dropout": 0.1},
    "async_save": {"async_save": True},
    "fsdp": {"parallel": "fsdp"},
    "fsdp_shards": {"parallel": "fsdp", "sharded_checkpoints": True},
}


def settings(folder: Path, changes: dict[str, Any]) -> list[str]:
    """The arguments of the run: a tiny model with dropout, 64 questions, 4 epochs of 8 steps, a checkpoint after each."""
    model, source = folder / "model", common.ROOT / "configs" / "llama_small"
    shutil.copytree(source, model)
    configuration = json.loads((source / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**configuration, **SIZES, "attention_dropout": 0.1}))
    for split, count in (("train", 64), ("valid", 24)):
        (folder / f"{split}.json").write_text(json.dumps(chain_records(count, 0, split)))
    values = {
        "save_path": folder / "runs",
        "method": "coconut",
        "max_latent_stage": 2,
        "num_epochs": 4,
        "batch_size_training": 4,
        "gradient_accumulation_steps": 2,
        "batch_size_eval": 4,
        "max_new_tokens": 24,
        "lr": "1e-3",
        "reset_optimizer": True,
        "uniform_prob": 0.3,
        "save_every_steps": 1,
        "keep_last": 2,
        "model_id": model,
        "from_scratch": True,
        "train_path": folder / "train.json",
        "val_path": folder / "valid.json",
        "num_workers": 0,
        "wandb": "disabled",
        "log_every": 1,
        **changes,
    }
    if not values["from_scratch"]:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    return [f"{key}={value}" for key, value in values.items()]


def command(processes: int, arguments: Sequence[str]) -> list[str]:
    starter = [sys.executable]
    if processes > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*starter, str(common.ROOT / "run.py"), *arguments]


class Attempt:
    """One start of the command, its output in a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=common.ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for_training(self, seconds: float = 600) -> bool:
        """Whether training began; False if the process ended before. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while TRAINING not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.log}: no training after {seconds:.0f} seconds")
            time.sleep(0.01)
        return True

    def ended_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, one: random.Random | None = None) -> None:
        """SIGKILL to all its processes, or to one worker of several drawn with `one`; waits until none is left."""
        starter = psutil.Process(self.process.pid)
        workers = starter.children(recursive=True)
        for process in [one.choice(workers)] if one is not None and workers else [starter, *workers]:
            process.kill()
        self.process.wait(120)
        psutil.wait_procs(workers, timeout=120)


def moment(directory: Path) -> str:
    """What a run that was just killed was doing, from what it left."""
    names = [path.name for path in directory.glob(".checkpoint*")]
    if any(name.endswith(".partial") for name in names):
        return "saving"
    if names:
        return "removing old checkpoints"
    try:
        rows = timeless_rows(directory) if (directory / "metrics.jsonl").exists() else []
    except ValueError:  # a row that is being written
        return "steps"
    return "evaluation" if rows and rows[-1]["kind"] == "step" and rows[-1]["step"] % 8 == 0 else "steps"


def aim(attempt: Attempt, directory: Path, window: float, rng: random.Random) -> bool:
    """Wait until the moment of a kill has come; False if the process ended before it."""
    target = rng.choice(AIMS)
    if attempt.ended_within(rng.uniform(0, window)):
        return False
    while target != "anything" and moment(directory) != target:
        if attempt.process.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, INSIDE))
    return attempt.process.poll() is None


def run_with_kills(command: Sequence[str], directory: Path, kills: int, window: float, rng: random.Random) -> list[str]:
    """Start a run again and again until it is finished, killed at most `kills` times on the way.

    Args:
        directory: where it saves.
        window: seconds after training began in which a kill falls.

    Returns:
        What it was doing at each kill.

    Raises:
        RuntimeError: it ended with an error of its own.
    """
    moments: list[str] = []
    several = "torch.distributed.run" in command
    while True:
        attempt = Attempt(command, directory.with_suffix(f".{len(moments)}.log"))
        try:
            if attempt.wait_for_training() and len(moments) < kills and aim(attempt, directory, window, rng):
                attempt.kill(rng if several and rng.random() < 1 / 3 else None)
                moments.append(moment(directory))
                continue
            attempt.process.wait(600)
        finally:
            if attempt.process.poll() is None:
                attempt.kill()
        if attempt.process.returncode:
            raise RuntimeError(f"exit code {attempt.process.returncode}:\n{attempt.log.read_text()[-4000:]}")
        return moments


def uninterrupted(command: Sequence[str], directory: Path) -> float:
    """Make the run to compare with; returns the seconds from the first step to the end."""
    attempt = Attempt(command, directory.with_suffix(".log"))
    attempt.wait_for_training()
    began = time.monotonic()
    if attempt.process.wait(1200) or not complete_checkpoints(directory):
        raise RuntimeError(attempt.log.read_text()[-4000:])
    return time.monotonic() - began


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs with kills until there were enough of them, each compared with the uninterrupted one."""
    (folder / "runs").mkdir()
    common_arguments = settings(folder, CONFIGURATIONS[arguments.configuration])
    reference = folder / "runs" / "reference"
    seconds = uninterrupted(command(arguments.processes, [*common_arguments, "name=reference"]), reference)
    rng = random.Random(arguments.seed)
    moments: list[str] = []
    runs: list[dict[str, Any]] = []
    while len(moments) < arguments.kills:
        directory = folder / "runs" / f"killed-{len(runs)}"
        again = command(arguments.processes, [*common_arguments, f"name={directory.name}"])
        new = run_with_kills(again, directory, arguments.kills - len(moments), seconds * arguments.window, rng)
        runs.append({"kills": len(new), "differences": differences(reference, directory)})
        moments += new
        print(f"{len(moments)} kills; run {len(runs)}: {len(new)} kills, {runs[-1]['differences'] or 'equal'}", flush=True)
    equal = sum(run["kills"] for run in runs if not run["differences"])
    return {"kills": len(moments), "kills_of_equal_runs": equal, "moments": Counter(moments), "seconds": seconds, "runs": runs}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--kills", type=int, default=60)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--configuration", choices=CONFIGURATIONS, default="usual")
    options.add_argument("--window", type=float, default=0.35, help="kills fall into this part of the run after a start")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="write the result to this JSON file")
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    result = {**vars(arguments), "out": None, "machine": common.machine(torch.device("cpu")), **result}
    common.write(result, arguments.out)
    moments = ", ".join(f"{count} in {name}" for name, count in sorted(result["moments"].items()))
    print(f"{result['kills_of_equal_runs']} of {result['kills']} kills left runs equal to the uninterrupted one ({moments})")
    return 0 if result["kills_of_equal_runs"] == result["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
