"""The full evaluation suite: noise in one thought and controls, noise in all thoughts, branches that vote; one report."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from experiments.noise.full_report import write_report
from experiments.noise.results import write_results
from experiments.noise.settings import SELF_CONSISTENCY, FullConfig, SweepConfig
from experiments.noise.sweep import Sweep, run_sweep
from noise import DECAY, noise_rows
from systems import distributed
from systems.signals import StopRequest
from utils import get_logger

GREEDILY: dict[str, Any] = {
    "num_branches": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "shared_noise": False,
    "mc_dropout": [],
    "self_consistency_temperature": SELF_CONSISTENCY,
}
EVERYWHERE = {"apply_noise_to_all_passes": True, "schedule": "none", "lambda_decay": DECAY, "noise_at_step": 1, "controls": []}


def parts(config: FullConfig) -> dict[str, SweepConfig]:
    """The experiments of the suite by their names, which are also their directories below the suite's."""
    direction = config.noise_direction if len(noise_rows(config.branch_noise_type)) > 1 else None
    changes = {
        "noise": GREEDILY,
        "all_passes": GREEDILY | EVERYWHERE,
        "branching": {"noise_type": [config.branch_noise_type], "noise_direction": direction, "controls": []},
    }
    common = config.model_dump(exclude={"branch_noise_type", "harmless_margin"})
    return {
        name: SweepConfig.model_validate({**common, **changed, "name": f"{config.name}/{name}"})
        for name, changed in changes.items()
    }


def run_full(config: FullConfig, device: torch.device) -> Path | None:
    """All parts, each going on where an earlier run stopped, and the report, whose path is returned; None after a signal."""
    sweeps: dict[str, Sweep] = {}
    with StopRequest().listening() as stop:  # while results are written; a sweep stops at once
        for name, part in parts(config).items():
            if distributed.max_over_ranks(int(stop.requested)):
                get_logger().info(f"stopped by a signal before {name}; the same command goes on from there")
                return None
            get_logger().info(f"part {len(sweeps) + 1} of 3: {name}")
            sweep = run_sweep(part, device)
            if sweep is None:
                return None
            sweeps[name] = sweep
            distributed.run_on_main(functools.partial(write_results, sweep))
        return distributed.run_on_main(lambda: write_report(config, sweeps))
