"""The full evaluation suite: noise in one thought and controls, noise in all thoughts, branches that vote; one report.

The report is a page of what was measured, and the same numbers as JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from experiments.answers.benchmarks import find_benchmark
from experiments.answers.judging import AGGREGATIONS
from experiments.noise.controls import PLACES
from experiments.noise.results import write_results
from experiments.noise.settings import SELF_CONSISTENCY_TEMPERATURE, FullConfig, SweepConfig
from experiments.noise.summary import (
    CLEAN,
    GREEDY,
    MC_DROPOUT,
    SELF_CONSISTENCY,
    compare_all,
    control_key,
    control_of,
    fewest_reached,
    measured_key,
    setting_result,
    summarise,
)
from experiments.noise.sweep import Sweep, run_sweep
from experiments.plots import Numbers
from experiments.significance import least_difference, questions_for_margin
from experiments.tables import markdown, probability, text, with_interval
from noise import DECAY, NoiseType, noise_rows
from systems import distributed
from systems.signals import StopRequest
from systems.writing import write_json, write_text
from utils import get_logger

GREEDILY: dict[str, Any] = {
    "num_branches": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "shared_noise": False,
    "mc_dropout": [],
    "self_consistency_temperature": SELF_CONSISTENCY_TEMPERATURE,
}
EVERYWHERE = {"apply_noise_to_all_passes": True, "schedule": "none", "lambda_decay": DECAY, "noise_at_step": 1, "controls": []}
NOISE_PARTS = {"noise": "one thought", "all_passes": "all thoughts"}
SHOWN = ("noise/noise_types.png", "noise/controls.png", "all_passes/noise_types.png", "branching/diversity.png")


def parts(config: FullConfig) -> dict[str, SweepConfig]:
    """The experiments of the suite by their names, which are also their directories below the suite's."""

    def direction(*noise_types: str) -> dict[str, Any]:
        return {"noise_direction": config.noise_direction if any(len(noise_rows(one)) > 1 for one in noise_types) else None}

    greedily, branching = direction(*config.noise_type), direction(config.branch_noise_type)
    changes = {
        "noise": GREEDILY | greedily,
        "all_passes": GREEDILY | EVERYWHERE | greedily,
        "branching": {"noise_type": [config.branch_noise_type], "controls": []} | branching,
    }
    common = config.model_dump(exclude={"branch_noise_type", "harmless_margin"})
    return {
        name: SweepConfig.model_validate({**common, **changed, "name": f"{config.name}/{name}"})
        for name, changed in changes.items()
    }


def run_full(config: FullConfig, device: torch.device) -> None:
    """All parts, each going on where an earlier run stopped, and the report; a signal stops it before the next part."""
    sweeps: dict[str, Sweep] = {}
    with StopRequest().listening() as stop:  # while results are written; a sweep stops at once
        for name, part in parts(config).items():
            if distributed.max_over_ranks(int(stop.requested)):
                get_logger().info(f"stopped by a signal before {name}; the same command goes on from there")
                return
            get_logger().info(f"part {len(sweeps) + 1} of 3: {name}")
            sweep = run_sweep(part, device)
            if sweep is None:
                return
            sweeps[name] = sweep
            distributed.run_on_main(functools.partial(write_results, sweep))
        distributed.run_on_main(lambda: write_report(config, sweeps))


# --- the report ---


def write_report(config: FullConfig, sweeps: Mapping[str, Sweep]) -> None:
    """report_<timestamp>.md and report.json; the timestamp is that of the first part's beginning, accuracies are in percent."""
    summaries = {name: summarise(sweep.records) for name, sweep in sweeps.items()}
    noise = sweeps["noise"]
    content = {
        "name": config.name,
        "tested": noise.info,
        "errors": {name: sweep.info["errors"] for name, sweep in sweeps.items()},
        "seconds": {name: sweep.info["seconds"] for name, sweep in sweeps.items()},
        "chance": find_benchmark(config.benchmark).kind.chance,
        "clean": summaries["noise"][GREEDY],
        "reached": fewest_reached(summaries["noise"]),
        "harmless_margin": config.harmless_margin,
        "noise": {
            kind.name: {name: noise_result(sweeps[name], summaries[name], kind, config.harmless_margin) for name in NOISE_PARTS}
            for kind in noise.config.settings()
        },
        "controls": {key: one for key, one in summaries["noise"].items() if control_of(key)},
        "branching": branching_result(sweeps["branching"], summaries["branching"]),
        "figures": [
            path.relative_to(config.directory).as_posix()
            for sweep in sweeps.values()
            for path in sorted(sweep.config.directory.glob("*.png"))
        ],
    }
    path = config.directory / f"report_{noise.info['timestamp']}.md"
    write_json(config.directory / "report.json", content)
    write_text(path, page(content))
    get_logger().info(f"report: {path}")


def noise_result(sweep: Sweep, summary: Mapping[str, Numbers], kind: NoiseType, margin: float) -> dict[str, Any]:
    """One noise type and direction in one part.

    half_scale: where half of the clean accuracy is lost. harmless_scale: see there. most_scale, most_accuracy: the most noise
    that was tried, and the accuracy with it.
    """
    scales = sorted(sweep.config.scales(kind), key=kind.amount)
    return {
        "half_scale": setting_result(sweep.records, kind, scales)["half_scale"],
        "harmless_scale": harmless_scale(summary, kind, scales, margin),
        "most_scale": scales[-1],
        "most_accuracy": summary[measured_key(kind, scales[-1])]["accuracy"],
    }


def harmless_scale(summary: Mapping[str, Numbers], kind: NoiseType, scales: Sequence[float], margin: float) -> float | None:
    """The most noise such that it and all less are shown to cost less than `margin` points; None: not even the least is.

    scales: the least noise first. Shown: the whole 95% interval of the difference from clean lies above -margin. So a large
    loss that few questions cannot prove is not called harmless. Scales without noise say nothing.
    """
    harmless = None
    for scale in filter(kind.amount, scales):
        lost = summary[measured_key(kind, scale)]["versus_clean"]
        if 100 * least_difference(lost["only_first"], lost["only_second"], lost["questions"]) <= -margin:
            break
        harmless = scale
    return harmless


def branching_result(sweep: Sweep, summary: Mapping[str, Numbers]) -> dict[str, Any]:
    """Every condition, and under versus_self_consistency its comparison with branches that differ by sampling alone."""
    baseline = SELF_CONSISTENCY if SELF_CONSISTENCY in summary else CLEAN
    versus = compare_all(sweep.records, baseline)
    conditions = {key: {**one, "versus_self_consistency": versus.get(key)} for key, one in summary.items()}
    settings = {key: sweep.info[key] for key in ("num_branches", "temperature", "top_p")}
    return {**settings, "self_consistency": baseline, "conditions": conditions}


# --- the page ---


def page(content: Mapping[str, Any]) -> str:
    clean, guess = content["clean"], content["chance"]
    accuracy = with_interval(clean, "accuracy", unit="%")
    said = f"**Clean accuracy: {accuracy}** ({clean['correct']} of {clean['total']}, greedy; {clean['status']})."
    sections = [
        f"# {content['name']}: {content['tested']['model']} on {content['tested']['benchmark']}",
        tested_table(content),
        said + (f" A guess among the options: {guess:.0f}%." if guess is not None else ""),
        "## Noise in the thoughts",
        noise_table(content["noise"]),
        noise_notes(content),
        *(["## Thoughts displaced", controls_table(content["controls"])] if content["controls"] else []),
        "## Branches that vote",
        *branching_tables(content["branching"]),
        "## Figures",
        *(f"![{path}]({path})" for path in content["figures"] if path in SHOWN or path.startswith("branching/coverage")),
        ", ".join(f"[{path.removesuffix('.png')}]({path})" for path in content["figures"]),
    ]
    return "\n\n".join(sections) + "\n"


def tested_table(content: Mapping[str, Any]) -> str:
    info = content["tested"]
    trained = info["trained"]
    training = f"{trained['method']}, stage {trained['stage']}, c_thought {trained['c_thought']}" if trained else "none"
    errors = ", ".join(f"{count} failed in {name}" for name, count in content["errors"].items() if count)
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    reached = content["reached"]
    some = f"; reached {reached} of the questions: differences, p and where half is lost are of these, accuracies of all"
    layer = "the last, after the final norm" if info["hidden_layer_idx"] == -1 else str(info["hidden_layer_idx"])
    rows = {
        "model": f"{info['family']}, {info['layers']} layers, width {info['width']}, {info['parameters']:,} parameters",
        "training for thoughts": training,
        "thoughts": f"{', '.join(map(str, info['n_latents']))} a question; layer read: {layer}",
        "questions": f"{info['questions']} of {info['benchmark']} ({info['data_path'] or 'hub'})",
        **({"not answered": errors} if errors else {}),
        "noise": f"seed {info['seed']}; one thought: number {info['noise_at_step']}, schedule {info['schedule']}"
        + (some if reached < content["clean"]["total"] else ""),
        "answers": f"at most {info['max_new_tokens']} tokens",
        "device": f"{info['device']}, {info['dtype']}; {versions}",
        "commit": info["git_commit"] or "unknown",
        "seconds": ", ".join(f"{name} {seconds:,.0f}" for name, seconds in content["seconds"].items()),
    }
    return markdown(["tested", ""], rows.items())


def noise_table(noise: Mapping[str, Mapping[str, Numbers]]) -> str:
    columns = ["noise"]
    for where in NOISE_PARTS.values():
        columns += [f"{where}: half is lost at", "harmless up to", "accuracy at the most noise"]
    rows = []
    for kind, parts in noise.items():
        cells = [kind]
        for part in NOISE_PARTS:
            one = parts[part]
            half, harmless, most = one["half_scale"], one["harmless_scale"], one["most_scale"]
            cells.append("never" if half is None else f"{half:.3g}")
            cells.append("not shown" if harmless is None else f"{harmless:g}{' (the most tried)' if harmless == most else ''}")
            cells.append(f"{one['most_accuracy']:.1f}% at {most:g}")
        rows.append(cells)
    return markdown(columns, rows)


def noise_notes(content: Mapping[str, Any]) -> str:
    margin = content["harmless_margin"]
    needed = [f"{questions_for_margin(margin / 100, share):,}" for share in (0, 0.02, 0.05)]
    lines = [
        "Scales, interpolated where half is lost; for snr less is more noise. Harmless: for this scale, and every one with "
        f"less noise, the 95% interval of the difference from clean lies above -{margin:g} points (`harmless_margin`). That "
        f"takes {needed[0]} questions if no answer turns from right to wrong or back, {needed[1]} if 2 in 100 do, {needed[2]} "
        "if 5 in 100 do."
    ]
    half, guess = content["clean"]["accuracy"] / 2, content["chance"]
    if guess is not None and half <= guess:
        lines.append(
            f"Half of the clean accuracy, {half:.1f}%, is no more than a guess gets, {guess:.0f}%: it is lost only where "
            "answers are worse than guesses, or none."
        )
    return "\n".join(lines)


def controls_table(controls: Mapping[str, Numbers]) -> str:
    kinds = dict.fromkeys(key.partition("/")[0] for key in controls)
    columns = ["in their stead", *(place.replace("\n", " ") for place in PLACES.values())]
    rows = ([kind, *(control_cell(controls[control_key(kind, place)]) for place in PLACES)] for kind in kinds)
    said = "Accuracy, and questions lost and gained against clean; p after Holm's correction."
    return f"{markdown(columns, rows)}\n\n{said}"


def control_cell(condition: Numbers) -> str:
    versus = condition["versus_clean"]
    changes = f"-{versus['only_first']} +{versus['only_second']}"
    return f"{condition['accuracy']:.1f}%, {changes}, p {probability(versus['p_holm'])}"


def branching_tables(branching: Mapping[str, Any]) -> list[str]:
    """By how the branches are counted, and by how many must agree, with what the columns mean."""
    shown = shown_conditions(branching)
    columns = [
        "",
        *(name.replace("_", " ") for name in AGGREGATIONS),
        "likeliest branch",
        "single branches",
        "any branch",
        "agreement",
        "diversity",
        "difference",
    ]
    rows = []
    for name, one in shown.items():
        versus = one["versus_self_consistency"]
        rows.append(
            [
                name,
                with_interval(one, "accuracy", unit="%"),
                *(f"{one['aggregation'][other]['accuracy']:.1f}%" for other in [*AGGREGATIONS][1:]),
                f"{one['best_correct']:.1f}%",
                f"{one['branch_accuracy']:.1f}%",
                f"{one['any_correct']:.1f}%",
                f"{one['agreement']:.2f}",
                text(one["normalised"], "{:.3g}"),
                "" if versus is None else f"{versus['difference']:+.1f}, p {probability(versus['p_holm'])}",
            ]
        )
    said = (
        f"{branching['num_branches']} branches, temperature {branching['temperature']:g}, top_p {branching['top_p']:g}. "
        "Accuracy by how the branches are counted, the majority's with its 95% interval; any branch: questions of which one "
        "branch is right. Diversity: mean distance of two "
        "branches' later thoughts by their norm. Difference of the majority's accuracy from self-consistency, p after Holm's "
        "correction."
    )
    agreeing = [
        [name, *(f"{text(one['accuracy'], '{:.1f}%') or 'none'} ({one['coverage']:.1f}%)" for one in condition["coverage"])]
        for name, condition in shown.items()
        if condition["coverage"]
    ]
    return [
        markdown(columns, rows),
        said,
        "Answered only where at least so many branches agree: accuracy of the answered (share of questions answered).",
        markdown(["branches", *map(str, range(1, branching["num_branches"] + 1))], agreeing),
    ]


def shown_conditions(branching: Mapping[str, Any]) -> dict[str, Numbers]:
    """Under the names of the page; the clean one without samples is the greedy one K times."""
    conditions, baseline = branching["conditions"], branching["self_consistency"]
    names = {GREEDY: "greedy, one answer", baseline: "self-consistency, no noise"}
    order = [GREEDY, baseline, *(key for key in conditions if "@" in key or key.startswith(MC_DROPOUT))]
    return {names.get(key, key): conditions[key] for key in order}
