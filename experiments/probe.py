"""Look inside the thoughts: `python -m experiments.probe [args/probe.yaml] [key=value ...]`.

Every probe runs on every checkpoint of every group, say Coconut's seeds and those of a control; a rerun goes on. Writes a table
with intervals over seeds and questions, a figure for each probe, and the numbers of each question.

python -m experiments.probe args/probe.yaml groups="{mine: [checkpoints/a, checkpoints/b], pause: [checkpoints/c]}"
python -m experiments.probe args/probe.yaml probes="[forced, decoded]" num_questions=100
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from pydantic import BeforeValidator, Field, model_validator

from dataset import load_records
from experiments.across_seeds import Numbers, numbers
from experiments.plots import save_figure, shades
from experiments.probes import PROBES, Probe, Probed, Series
from experiments.tables import markdown, with_interval
from systems.files import MANIFEST, read_typed
from systems.machine import described, machine
from systems.pretrained import resolved
from systems.writing import write_json, write_text
from utils import (
    Config,
    PathText,
    Positive,
    UserError,
    check_folder_name,
    entry_point,
    get_logger,
    load_config,
    one_of,
    read_text,
)

Found = dict[str, dict[str, Numbers]]  # condition -> group -> numbers


class ProbeConfig(Config):
    """Keys of experiments.probe."""

    name: PathText
    """Folder of the experiment below results_path."""
    results_path: PathText = "results"
    """Folder below which every experiment has its own."""
    data_path: PathText
    """Records that are asked."""
    num_questions: Positive = 500
    """So many of them, the first ones."""
    batch_size: Positive = 250
    """Questions at once."""
    max_new_tokens: Positive = 64
    """Most tokens of an answer."""
    probes: Annotated[
        list[Annotated[str, one_of(PROBES)]], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = Field(default=list(PROBES))
    """Those that run; docs/PROBES.md says what each asks."""
    groups: dict[str, list[str]]
    """By name the checkpoints, or directories of runs, that are seeds of one thing."""

    @model_validator(mode="after")
    def _consistent(self) -> ProbeConfig:
        check_folder_name(self.name, "results_path")
        if not self.groups or not all(self.groups.values()):
            raise ValueError("groups: name at least one checkpoint in each, as in {mine: [checkpoints/x]}")
        return self


@torch.no_grad()
def measured(config: ProbeConfig, checkpoint: str, device: torch.device) -> dict[str, Series]:
    """By probe the numbers of a checkpoint, from the file of an earlier run where there is one of the same questions."""
    directory = Path(config.results_path) / config.name / checkpoint.strip("/.").replace("/", "_")
    manifest = Path(str(resolved(checkpoint).load_model_path)) / MANIFEST  # with the hash of every file
    asked = {
        "checkpoint": checkpoint,
        "weights": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
        "questions": config.num_questions,
        "max_new_tokens": config.max_new_tokens,
        "data_sha256": hashlib.sha256(read_text(Path(config.data_path)).encode()).hexdigest(),
    }
    found: dict[str, Series] = {}
    probed = None
    for name in config.probes:
        path = directory / f"{name}.json"
        if path.exists() and (kept := read_typed(path, dict[str, Any]))["asked"] == asked:
            found[name] = {key: np.array(values, float) for key, values in kept["series"].items()}
            continue
        if probed is None:
            settings = {"batch_size_eval": config.batch_size, "max_new_tokens": config.max_new_tokens}
            probed = Probed.load(checkpoint, Path(config.data_path), config.num_questions, settings, device)
        probe = PROBES[name]
        found[name] = probe.measure(probed) if probed.thoughts or not probe.needs_thoughts else {}
        directory.mkdir(parents=True, exist_ok=True)
        series = {key: [None if np.isnan(value) else float(value) for value in values] for key, values in found[name].items()}
        if probe.sketch is not None and probed.thoughts:
            probe.sketch(probed, directory / f"{name}.png")
        write_json(path, {"asked": asked, "machine": machine(device), "series": series})
    return found


def over_seeds(by_checkpoint: Mapping[str, Sequence[Series]]) -> Found:
    """For each condition and group its numbers over the group's checkpoints and the questions that have one in all of them."""
    found: Found = {}
    for group, each in by_checkpoint.items():
        for key in each[0]:
            if all(key in one for one in each):
                values = np.array([one[key] for one in each])
                values = values[:, ~np.isnan(values).any(axis=0)] / 100  # `numbers` gives percent
                if values.size:
                    found.setdefault(key, {})[group] = numbers(values)
    return found


def table(probe: Probe, found: Found, groups: Sequence[str]) -> str:
    rows = []
    for key, by_group in found.items():
        rows.append((key, *map(with_interval, map(by_group.get, groups))))
    return f"{probe.about} In {probe.unit}.\n\n" + markdown(("", *groups), rows)


def draw(found: Found, groups: Sequence[str], path: Path, unit: str) -> None:
    """A row for each condition, a point with its interval for each group."""
    keys, colours = list(found), shades(groups)
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.24 * len(keys)), layout="constrained")
    for number, group in enumerate(groups):
        shown = [(place, found[key][group]) for place, key in enumerate(keys) if group in found[key]]
        places = [place + 0.16 * (number - (len(groups) - 1) / 2) for place, _ in shown]
        means = np.array([one["mean"] for _, one in shown])
        errors = [means - [one["low"] for _, one in shown], np.array([one["high"] for _, one in shown]) - means]
        axes.errorbar(means, places, xerr=np.maximum(0, errors), fmt="o", color=colours[group], label=group, markersize=4)
    axes.set_yticks(range(len(keys)), keys, fontsize=7)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set(title=path.stem, xlabel=f"mean over seeds and questions in {unit}, with its 95% interval")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def run(config: ProbeConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(config.results_path) / config.name
    each: dict[str, list[dict[str, Series]]] = {}
    for group, checkpoints in config.groups.items():
        for checkpoint in checkpoints:
            each.setdefault(group, []).append(measured(config, checkpoint, device))
            get_logger().info(f"{group}: {checkpoint}")
    sections, results = [], {}
    for name in config.probes:
        probe, found = PROBES[name], over_seeds({group: [one[name] for one in series] for group, series in each.items()})
        if not found:
            sections.append(f"## {name}\n\n{probe.about}\n\nNone of these checkpoints has what it looks at.")
            continue
        groups = [group for group in config.groups if any(group in by_group for by_group in found.values())]
        without = [group for group in config.groups if group not in groups]
        said = f"\n\nWithout what it looks at, and so without numbers here: {', '.join(without)}." if without else ""
        (probe.draw or functools.partial(draw, unit=probe.unit))(found, groups, out / f"{name}.png")
        sections.append(f"## {name}\n\n{table(probe, found, groups)}{said}")
        results[name] = found
    if not results:
        raise UserError(f"{', '.join(config.probes)}: none of the checkpoints has thoughts to look at")
    seeds = ", ".join(f"{group} {len(checkpoints)}" for group, checkpoints in config.groups.items())
    where = machine(device)
    questions = min(config.num_questions, len(load_records(Path(config.data_path))))
    heading = f"# Probes\n\n{questions} questions of {config.data_path}; checkpoints: {seeds}. {described(where)}."
    write_text(out / "probes.md", "\n\n".join([heading, *sections]) + "\n")
    write_json(out / "probes.json", {"config": json.loads(config.model_dump_json()), "machine": where, "probes": results})
    get_logger().info("\n\n".join(sections) + f"\n\ntables, figures and numbers: {out}")


@entry_point
def main(arguments: list[str]) -> None:
    run(load_config(ProbeConfig, arguments, __doc__, "args/probe.yaml"))


if __name__ == "__main__":
    main()
