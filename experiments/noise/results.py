"""The files of a finished noise experiment: results for each noise setting, controls, one table of everything, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.answers.benchmarks import find_benchmark
from experiments.noise import figures
from experiments.noise.settings import SweepConfig
from experiments.noise.summary import (
    CLEAN,
    GREEDY,
    NO_LATENTS,
    SELF_CONSISTENCY,
    condition_key,
    condition_keys,
    condition_result,
    condition_summary,
    control_of,
    coverage_table,
    setting_name,
    setting_result,
    summarise,
    summary_table,
)
from experiments.noise.sweep import Sweep, run_sweep
from systems import distributed
from systems.metrics import print_config, show
from systems.signals import StopRequest
from systems.writing import save_config, write_json
from utils import get_logger

BASELINES = (NO_LATENTS, GREEDY, CLEAN, SELF_CONSISTENCY)


def chance(benchmark: str) -> float | None:
    """Accuracy in % of a guess among the options; None where the answer is free."""
    return find_benchmark(benchmark).kind.chance


def answer_and_write(config: SweepConfig) -> None:
    """A whole experiment, as test.py and run_noisy_experiment.py run it: all questions, then the files."""
    with distributed.process_group() as device:
        print_config(config)
        sweep = run_sweep(config, device)
        if sweep is not None:
            with StopRequest().listening():  # all is answered: the files are finished first
                distributed.run_on_main(lambda: write_results(sweep))


def write_results(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Write everything into the experiment's directory, show the tables, and return the summary of every condition."""
    directory, records = sweep.config.directory, sweep.records
    save_config(sweep.config, directory / "config.yaml")
    present = condition_keys(records)
    baselines = {key: condition_summary(records, key) for key in BASELINES if key in present}
    settings: dict[str, dict[str, Any]] = {}
    for noise_type, direction in sweep.config.settings():
        scales = sweep.config.scales(noise_type, direction)
        name = setting_name(noise_type, direction)
        settings[name] = setting_result(records, noise_type, direction, scales)
        info = {**sweep.info, "noise_type": noise_type, "noise_direction": direction, "scales": [*settings[name]["results"]]}
        keys = [
            key for key in present if key in BASELINES or key in {condition_key(noise_type, direction, one) for one in scales}
        ]
        _write(sweep, name, {"experiment_info": info, **settings[name], "baselines": baselines}, keys)
        _setting_figures(sweep, name, noise_type, settings[name], baselines)
    controls = {key: condition_result(records, key) for key in present if control_of(key)}
    if controls:
        _write(
            sweep, "controls", {"experiment_info": sweep.info, "results": controls, "baselines": baselines}, [*controls, GREEDY]
        )
    summary = summarise(records)
    _write(sweep, "summary", {"experiment_info": sweep.info, "conditions": summary})
    _figures(sweep, settings, controls, baselines)
    _tables(sweep, summary)
    return summary


def _write(sweep: Sweep, name: str, content: dict[str, Any], keys: list[str] | None = None) -> None:
    """One JSON file, whole or not at all; with keys also the records, with these conditions of each."""
    if keys is not None:
        content["questions"] = [
            {**record, "conditions": {key: one for key, one in record.get("conditions", {}).items() if key in keys}}
            for record in sweep.records
        ]
    write_json(sweep.config.directory / f"{name}_{sweep.info['timestamp']}.json", content)


def _title(sweep: Sweep, what: str) -> str:
    answered = sweep.info["questions"] - sweep.info["errors"]
    return f"{what}: {sweep.config.benchmark}, {answered} questions"


def _setting_figures(
    sweep: Sweep, name: str, noise_type: str, setting: dict[str, Any], baselines: dict[str, dict[str, Any]]
) -> None:
    path = sweep.config.directory / f"{name}.png"
    guess = chance(sweep.config.benchmark)
    greedy = baselines[GREEDY]["accuracy"] if sweep.config.temperature else None  # without samples it is the clean one
    figures.accuracy_by_scale(setting, noise_type, path, _title(sweep, name), baselines[CLEAN], greedy=greedy, chance=guess)
    if sweep.config.num_branches > 1:
        emphasised = [key for key in (CLEAN, SELF_CONSISTENCY) if key in baselines]
        curves = {key: baselines[key]["coverage"] for key in emphasised}
        curves |= {f"scale {scale}": one["coverage"] for scale, one in setting["results"].items() if one["noise_ratio"]}
        title = _title(sweep, f"Branches that agree, {name}")
        figures.coverage_curves(curves, path.with_name(f"coverage_{path.name}"), title, emphasised)


def _figures(sweep: Sweep, settings: dict[str, Any], controls: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> None:
    directory, guess = sweep.config.directory, chance(sweep.config.benchmark)
    if len(settings) > 1:
        title = _title(sweep, "Noise types by what they add")
        figures.noise_types(settings, directory / "noise_types.png", title, baselines[CLEAN], chance=guess)
    if sweep.config.num_branches > 1:
        title = _title(sweep, "How far branches part, and accuracy")
        figures.diversity_scatter(settings, directory / "diversity.png", title, chance=guess)
    if controls:
        title = _title(sweep, "Thoughts displaced")
        figures.control_bars(controls, directory / "controls.png", title, baselines[GREEDY], chance=guess)


def _tables(sweep: Sweep, summary: dict[str, dict[str, Any]]) -> None:
    """On the terminal, and as text in table.txt."""
    tables = [summary_table(summary, _title(sweep, sweep.config.name))]
    if sweep.config.num_branches > 1:
        tables.append(coverage_table(summary, "Answered only where so many branches agree"))
    for table in tables:
        show(table)
    _write_tables(sweep.config.directory / "table.txt", tables)
    if errors := sweep.info["errors"]:
        get_logger().warning(f"{errors} questions failed and are counted nowhere; the same command tries them again")
    get_logger().info(f"results and figures: {sweep.config.directory}")


def _write_tables(path: Path, tables: list[Table]) -> None:
    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=140, highlight=False)
        for table in tables:
            console.print(table)
