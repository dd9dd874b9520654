"""Whether two runs ended alike: what a run that was killed or stopped, then started again, must not differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from systems import files
from systems.shards import SHARDS, whole_tensors
from systems.storage import newest_whole
from systems.weights import read_map


def timeless_rows(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def equal(one: Any, two: Any) -> bool:
    """Equal bit for bit, tensors inside dictionaries and lists as well."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def weights(directory: Path) -> dict[str, Any]:
    """Everything in a checkpoint's model.safetensors, or in its shards, which also hold the optimizer's state; and its map."""
    if (directory / SHARDS).is_dir():
        found = {part: whole_tensors(directory / SHARDS, part) for part in ("model", "optimizer")}
    else:
        found = load_file(directory / "model.safetensors")
    return {**found, "map": read_map(directory)}


def differences(first: Path, second: Path) -> list[str]:
    """In what the newest checkpoints, the metrics but for the times and the predictions of two runs differ."""
    one, two = newest_whole(first), newest_whole(second)
    if one is None or two is None or one.name != two.name:
        return [f"newest checkpoint {two}, not {one}"]
    found = []
    if not equal(weights(one), weights(two)):
        found.append("weights")
    states = [files.read_training_state(path) for path in (one, two)]
    for state in states:
        del state["state"]["epoch_seconds"], state["state"]["wandb_id"]
    found += [f"training state: {key}" for key in states[0] if not equal(states[0][key], states[1][key])]
    if timeless_rows(first) != timeless_rows(second):
        found.append("metrics.jsonl")
    for path in first.glob("predictions_*.jsonl"):
        if path.read_bytes() != (second / path.name).read_bytes():
            found.append(path.name)
    found += [f"left behind: {path.name}" for path in second.glob(".*")]
    return found
