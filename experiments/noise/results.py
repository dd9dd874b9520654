"""The files of a finished noise experiment: results for each noise setting, controls, one table of everything, figures."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.console import Console

from experiments.answers.benchmarks import find_benchmark
from experiments.noise import figures
from experiments.noise.settings import SweepConfig
from experiments.noise.summary import (
    CLEAN,
    GREEDY,
    MC_DROPOUT,
    NO_LATENTS,
    SELF_CONSISTENCY,
    condition_key,
    condition_keys,
    condition_result,
    condition_summary,
    control_of,
    coverage_table,
    setting_result,
    summarise,
    summary_table,
    votes_table,
)
from experiments.noise.sweep import Sweep, run_sweep
from systems import distributed
from systems.metrics import print_config, show
from systems.signals import StopRequest
from systems.writing import save_config, write_json
from utils import get_logger

BASELINES = (NO_LATENTS, GREEDY, CLEAN, SELF_CONSISTENCY)
Conditions = dict[str, dict[str, Any]]


def answer_and_write(config: SweepConfig) -> None:
    """A whole experiment, as test.py and run_noisy_experiment.py run it: all questions, then the files."""
    with distributed.process_group() as device:
        print_config(config)
        sweep = run_sweep(config, device)
        if sweep is not None:
            with StopRequest().listening():  # all is answered: the files are finished first
                distributed.run_on_main(lambda: write_results(sweep))


def write_results(sweep: Sweep) -> Conditions:
    """Write everything into the experiment's directory, show the tables, and return the summary of every condition."""
    config, info, records = sweep
    save_config(config, config.directory / "config.yaml")
    present = condition_keys(records)
    baselines = {key: condition_summary(records, key) for key in BASELINES if key in present}
    settings: Conditions = {}
    for kind in config.settings():
        scales = config.scales(kind)
        settings[kind.name] = found = setting_result(records, kind, scales)
        about = {"noise_type": kind.noise_type, "noise_direction": kind.direction, "scales": [*found["results"]]}
        content = {"experiment_info": {**info, **about}, **found, "baselines": baselines}
        _write(sweep, kind.name, content, {*BASELINES, *(condition_key(kind, scale) for scale in scales)})
    controls = {key: condition_result(records, key) for key in present if control_of(key)}
    dropped = {key: condition_result(records, key) for key in present if key.startswith(MC_DROPOUT)}
    for name, found, beside in (("controls", controls, {GREEDY}), ("mc_dropout", dropped, {*BASELINES})):
        if found:
            content = {"experiment_info": info, "results": found, "baselines": baselines}
            _write(sweep, name, content, found.keys() | beside)
    summary = summarise(records)
    _write(sweep, "summary", {"experiment_info": info, "conditions": summary})
    _draw(sweep, settings, controls, baselines | dropped)
    _show(sweep, summary)
    return summary


def _write(sweep: Sweep, name: str, content: dict[str, Any], keys: Collection[str] = ()) -> None:
    """One JSON file; with keys also the records, with these conditions of each."""
    if keys:
        content["questions"] = [
            {**record, "conditions": {key: one for key, one in record.get("conditions", {}).items() if key in keys}}
            for record in sweep.records
        ]
    write_json(sweep.config.directory / f"{name}_{sweep.info['timestamp']}.json", content)


def _title(sweep: Sweep, what: str) -> str:
    answered = sweep.info["questions"] - sweep.info["errors"]
    return f"{what}: {sweep.config.benchmark}, {answered} questions"


def _draw(sweep: Sweep, settings: Conditions, controls: Conditions, baselines: Conditions) -> None:
    config = sweep.config
    directory, guess, branching = config.directory, find_benchmark(config.benchmark).kind.chance, config.num_branches > 1
    greedy = baselines[GREEDY]["accuracy"] if config.temperature else None  # without samples it is the clean one
    for kind, (name, setting) in zip(config.settings(), settings.items(), strict=True):
        path, title = directory / f"{name}.png", _title(sweep, name)
        figures.accuracy_by_scale(setting, kind, path, title, baselines[CLEAN], greedy=greedy, chance=guess)
        if branching:
            several = {key: one["coverage"] for key, one in baselines.items() if key not in (NO_LATENTS, GREEDY)}
            noisy = {f"scale {scale}": one["coverage"] for scale, one in setting["results"].items() if one["noise_ratio"]}
            title = _title(sweep, f"Branches that agree, {name}")
            black = [key for key in (CLEAN, SELF_CONSISTENCY) if key in several]
            figures.coverage_curves(several | noisy, directory / f"coverage_{name}.png", title, black)
    if len(settings) > 1:
        title = _title(sweep, "Noise types by what they add")
        figures.noise_types(settings, directory / "noise_types.png", title, baselines[CLEAN], chance=guess)
    if branching:
        title = _title(sweep, "How far branches part, and accuracy")
        figures.diversity_scatter(settings, directory / "diversity.png", title, chance=guess)
    if controls:
        title = _title(sweep, "Thoughts displaced")
        figures.control_bars(controls, directory / "controls.png", title, baselines[GREEDY], chance=guess)


def _show(sweep: Sweep, summary: Conditions) -> None:
    """On the terminal, and as text in table.txt."""
    tables = [summary_table(summary, _title(sweep, sweep.config.name))]
    if sweep.config.num_branches > 1:
        tables.append(votes_table(summary, "What branches say together"))
        tables.append(coverage_table(summary, "Answered only where so many branches agree"))
    with (sweep.config.directory / "table.txt").open("w", encoding="utf-8") as file:
        for table in tables:
            show(table)
            Console(file=file, width=140, highlight=False).print(table)
    if errors := sweep.info["errors"]:
        get_logger().warning(f"{errors} questions failed and are counted nowhere; the same command tries them again")
    get_logger().info(f"results and figures: {sweep.config.directory}")
