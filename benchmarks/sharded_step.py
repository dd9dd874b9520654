"""Time, memory and communication of a training step on several processes: DDP and FSDP2, with and without recomputation.

    python benchmarks/sharded_step.py [--processes 2] [--config DIRECTORY] [--bf16] [--out results/benchmarks/sharded_step.json]

- ddp: every process holds everything; gradients are reduced once a step.
- pass: FSDP2 with fsdp_gather: pass, which gathers a block's parameters for each latent pass, forward and backward.
- step: FSDP2 with fsdp_gather: step, which gathers all parameters once.
- Each also with activation_checkpointing.

A step is the training loop's: forward, backward and AdamW on `--micro-batches` micro-batches at the last stage. Each variant
runs in processes of its own, and the variants take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import common  # first: it makes the repository importable
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import training_batch
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import Coconut
from config import RunConfig
from systems import distributed

VARIANTS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "ddp, recomputed": {"parallel": "ddp", "activation_checkpointing": True},
    "pass": {"parallel": "fsdp"},
    "pass, recomputed": {"parallel": "fsdp", "activation_checkpointing": True},
    "step": {"parallel": "fsdp", "fsdp_gather": "step"},
    "step, recomputed": {"parallel": "fsdp", "fsdp_gather": "step", "activation_checkpointing": True},
}


class Traffic(TorchDispatchMode):
    """Bytes of parameters that arrive by gathering, and how many times."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.gathers = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().startswith("c10d::_allgather"):
            self.bytes += args[0].nbytes
            self.gathers += 1
        return function(*args, **(kwargs or {}))


def build(arguments: argparse.Namespace, setting: common.Setting, device: torch.device) -> Coconut:
    if arguments.config is None:
        return common.random_model(setting, device)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.config), dtype=torch.float32).to(device)
    base.resize_token_embeddings(max(setting.latent + 1, base.config.vocab_size), mean_resizing=False)
    return Coconut(base, setting.latent, setting.start_latent, setting.end_latent, setting.eos)


def worker(arguments: argparse.Namespace) -> None:
    """One variant in one of the processes; rank 0 prints what was measured as its last line."""
    with distributed.process_group() as device:
        setting, _ = common.prepare(arguments)
        config = RunConfig(
            name="x",
            model_id="x",
            train_path="x",
            val_path="x",
            method="coconut",
            bf16=arguments.bf16,
            **VARIANTS[arguments.variant],
        )
        model = distributed.unwrap(
            distributed.wrap(build(arguments, setting, device), config.part(distributed.Parallelism), device)
        ).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        torch.manual_seed(arguments.seed + distributed.rank())
        batches = [training_batch(setting, arguments.batch_size, device) for _ in range(arguments.micro_batches)]

        def step() -> float:
            start = common.clock(device)
            for number, batch in enumerate(batches, start=1):
                with distributed.gradient_sync(model, number == len(batches), config.fsdp_gather):
                    with distributed.autocast(config.bf16, config.parallel, device):
                        loss = model(**batch, labelled_only=True).loss
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return 1e3 * (common.clock(device) - start)

        with Traffic() as traffic:
            step()
        for _ in range(arguments.warmup - 1):
            step()
        milliseconds = [step() for _ in range(arguments.repeats)]
        peaks = distributed.gather_objects(common.peak_memory(device))
        found = {"milliseconds": min(milliseconds), "peak_memory_mib": max(peaks), "gathers": traffic.gathers}
        if distributed.rank() == 0:
            print(json.dumps({**found, "gathered_mib": traffic.bytes / common.MIB, "machine": common.machine(device)}))


def run_variant(variant: str, argv: Sequence[str], processes: int) -> dict[str, Any]:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*starter, __file__, *argv, "--variant", variant]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def report(results: dict[str, dict[str, Any]]) -> str:
    columns = ("milliseconds", "peak_memory_mib", "gathers", "gathered_mib")
    rows = [[name, *(result[column] for column in columns)] for name, result in results.items()]
    ratio = results["pass"]["milliseconds"] / results["step"]["milliseconds"]
    table = common.table(["variant", "step ms", "peak MiB", "gathers", "gathered MiB"], rows)
    return f"{table}\npass / step: {ratio:.2f} in time"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = common.parser(__doc__.split("\n")[0], batch_size=2, repeats=1)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--micro-batches", type=int, default=2)
    options.add_argument("--rounds", type=int, default=2, help="turns of each variant; the fastest step counts")
    options.add_argument(
        "--config", help="a directory or hub id whose configuration is used with random weights (default: GPT-2 124M)"
    )
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # in a process of its own
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.variant:
        worker(arguments)
        return
    own = list(sys.argv[1:] if argv is None else argv)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    began = time.time()
    for number in range(arguments.rounds):
        for name in VARIANTS:
            rounds[name].append(run_variant(name, own, arguments.processes))
            print(f"{time.time() - began:.0f} s: round {number + 1}, {name}", file=sys.stderr, flush=True)
    results = {
        name: {key: min(one[key] for one in found if key != "machine") for key in found[0] if key != "machine"}
        for name, found in rounds.items()
    }
    setting, _ = common.prepare(arguments)
    result = {
        **common.describe(setting, arguments, torch.device("cpu")),
        "machine": rounds["ddp"][0]["machine"],
        "variants": results,
    }
    print(report(results))
    common.write(result, arguments.out)


if __name__ == "__main__":
    main()
