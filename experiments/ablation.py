"""What matters in noisy branching, one thing changed at a time: `python -m experiments.ablation [args/X.yaml] [key=value ...]`.

K branches with noise in one thought vote; around that one setting each part changes one thing: which thought gets the noise,
how many branches vote, the noise type at equal measured noise, how branches become an answer, own or shared noise vectors, the
noise in later thoughts. Every setting is compared with self-consistency, as many branches without noise, on the same questions
and with the same samples.

Each setting that needs branches of its own is one run of `sweep` in a folder of its own, so that the same command goes on where
it was stopped; the numbers of branches and the aggregations come from the branches of the run that all parts share.

    python -m experiments.ablation args/ablation.yaml
    python -m experiments.ablation args/ablation.yaml parts=branches num_branches=9 num_questions=100
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, model_validator

from experiments.answers.benchmarks import same_answer
from experiments.answers.judging import AGGREGATIONS
from experiments.noise.ablation_results import MIXED, NO_NOISE, Cells, Part, vote, write_results
from experiments.noise.settings import BranchConfig, NoiseNames, Voters, listed
from experiments.noise.subjects import load_subject
from experiments.noise.summary import CLEAN, JUDGE, SELF_CONSISTENCY, Outcome, condition_key
from experiments.noise.sweep import Sweep, all_paths, at_once, run_sweep
from noise import DECAY, DECAYING, NOISES, SCHEDULES, NoiseType
from systems import distributed
from systems.metrics import print_config
from systems.writing import write_jsonl
from utils import PathText, Positive, UserError, entry_point, get_logger, load_config, one_of

BASE, TYPES = "base", "noise_type"  # runs: the one that all parts share, and all other noise types together
ELSEWHERE = {  # inherited keys that an ablation sets itself or has no use for, and what to do instead
    "noise_scales": "set noise_ratios, from which the scales of every noise type are computed",
    "controls": "full_test.py tries them",
    "mc_dropout": "run_noisy_experiment.py tries it beside noise",
    "apply_noise_to_all_passes": "set schedule: constant",
}

Ratio = Annotated[float, Field(gt=0)]
PartName = Annotated[str, one_of(lambda: list(PARTS))]


class AblationConfig(BranchConfig):
    """The keys of run_noisy_experiment.py, which describe the setting that is varied, and what is varied around it."""

    results_path: PathText = "ablation/results"
    noise_type: NoiseNames = Field(default=["gaussian_scaled"])
    num_branches: Voters = 5
    noise_ratios: Annotated[list[Ratio], Field(min_length=1), BeforeValidator(listed)] = Field(default=[0.5, 1.0, 2.0])
    """Norms of the noise by the norm of the thought; every noise type gets the scales that add as much."""
    injection_steps: Annotated[list[Positive] | None, Field(min_length=1), BeforeValidator(listed)] = None
    """Which thoughts get the noise, one at a time, from 1; null: every thought there is."""
    parts: Annotated[
        list[PartName], Field(min_length=1), BeforeValidator(lambda value: list(PARTS) if value == "all" else listed(value))
    ] = Field(default_factory=lambda: list(PARTS))
    """What is varied: all or some of injection_step, branches, noise_type, aggregation, shared_noise, schedule."""

    @model_validator(mode="after")
    def _one_setting(self) -> AblationConfig:
        for key, hint in ELSEWHERE.items():
            if getattr(self, key):
                raise ValueError(f"{key}: not for an ablation: {hint}")
        if len(self.settings()) > 1:
            found = ", ".join(kind.name for kind in self.settings())
            raise ValueError(f"noise_type: an ablation varies one noise setting, found {found}; targeted needs noise_direction")
        if all(equal_scale(self.setting, ratio, 1.0) is None for ratio in self.noise_ratios):
            raise ValueError(f"noise_ratios: dropout removes at most the whole thought: at most 1, found {self.noise_ratios}")
        return self

    @property
    def decays(self) -> bool:
        return super().decays or "schedule" in self.parts

    @property
    def setting(self) -> NoiseType:
        [kind] = self.settings()
        return kind

    @property
    def baseline(self) -> str:
        """The condition that is self-consistency: K branches without noise that are sampled."""
        return CLEAN if self.temperature else SELF_CONSISTENCY


def equal_scale(kind: NoiseType, ratio: float, norm_per_entry: float) -> float | None:
    """The scale at which the noise's root mean square norm is `ratio` times the norm of a hidden state.

    norm_per_entry: the norm of the hidden state by the square root of its width. Rounded to three digits. None: the type cannot
    make so much noise.
    """
    scale = kind.scale_for(ratio, norm_per_entry)
    return None if scale is None else float(f"{scale:.3g}")


class Run(BranchConfig):
    """One run of an ablation: in place of noise_scales each noise setting has scales of its own; without any it is left out."""

    scales_of: dict[str, list[float]]

    def scales(self, kind: NoiseType) -> list[float]:
        return self.scales_of.get(kind.name, [])


# --- the runs ---


@dataclass
class Ablation:
    """source: the checkpoint or the model. thoughts: the most that a question has. sweeps: what the runs gave, by their names.

    norm_per_entry: mean norm of the thoughts that get the noise by the root of their width; 1 if no noise type needs it.
    """

    config: AblationConfig
    source: str
    thoughts: int
    norm_per_entry: float
    sweeps: dict[str, Sweep] = field(default_factory=dict)

    def scales(self, kind: NoiseType) -> dict[float, float]:
        """The scale of a noise setting for each noise ratio that it can have, see `equal_scale`."""
        found = {ratio: equal_scale(kind, ratio, self.norm_per_entry) for ratio in self.config.noise_ratios}
        return {ratio: scale for ratio, scale in found.items() if scale is not None}


def survey(config: AblationConfig, device: torch.device) -> Ablation:
    """Count the thoughts of all questions and measure them, where a noise type needs it. UserError: steps that no one has."""
    subject, questions = load_subject(config, device), config.questions()
    counts = subject.count_thoughts(questions)
    most = max(counts.values(), default=0)
    for key, steps in {"noise_at_step": [config.noise_at_step], "injection_steps": config.injection_steps or []}.items():
        if max(steps, default=0) > most > 0:
            raise UserError(f"{key}: {max(steps)} is beyond the thoughts: no question has more than {most}")
    paths = {}
    if "noise_type" in config.parts or not config.setting.relative:
        reached = [question for question in questions if counts.get(question.index, 0) >= config.noise_at_step]
        paths = all_paths(subject, reached, at_once(config, subject, reached))
    if not paths:
        return Ablation(config, subject.source, most, 1.0)
    perturbed = [path[config.noise_at_step - 1] for path in paths.values()]
    norm = fmean(float(thought.norm()) for thought in perturbed)
    return Ablation(config, subject.source, most, norm / math.sqrt(len(perturbed[0])))


def run_ablation(config: AblationConfig, device: torch.device) -> Ablation | None:
    """All runs, each going on where it was stopped; None if a signal stopped one. Called by all processes."""
    ablation = survey(config, device)
    runs = plan_runs(ablation)
    for number, (name, run) in enumerate(runs.items(), start=1):
        get_logger().info(f"run {number} of {len(runs)}: {run.directory}")
        sweep = run_sweep(run, device)
        if sweep is None:
            return None
        path = run.directory / f"questions_{sweep.info['timestamp']}.jsonl"
        distributed.run_on_main(functools.partial(write_jsonl, path, sweep.records))
        ablation.sweeps[name] = sweep
    return ablation


def plan_runs(ablation: Ablation) -> dict[str, Run]:
    """The runs that the chosen parts need, the shared one first."""
    config = ablation.config
    kept = config.model_dump(include=set(BranchConfig.model_fields))
    if config.load_model_path is not None:
        kept["load_model_path"] = ablation.source  # all of one checkpoint, even if a newer one appears meanwhile
    scales = {kind.name: list(ablation.scales(kind).values()) for kind in NOISES.values()}
    base = {config.setting.name: scales.pop(config.setting.name)}
    changed: dict[str, dict[str, Any]] = {BASE: {}}
    for part in config.parts:
        for value, changes in PARTS[part].runs(config, ablation.thoughts).items():
            changed.setdefault(run_name(config, part, value, changes), changes)
    if "noise_type" in config.parts:
        changed[TYPES] = {"noise_type": "all", "noise_direction": None, "scales_of": scales}
    kept["scales_of"] = base
    return {
        name: Run.model_validate({**kept, **_without_decay(config, changes), "name": f"{config.name}/{name}", **changes})
        for name, changes in changed.items()
    }


def _without_decay(config: AblationConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The default of lambda_decay where a run's schedule has no use for it, as any other is refused there."""
    return {} if changes.get("schedule", config.schedule) in DECAYING else {"lambda_decay": DECAY}


def run_name(config: AblationConfig, part: str, value: str, changes: dict[str, Any]) -> str:
    same = all(getattr(config, key) == wanted for key, wanted in changes.items())
    return BASE if same else f"{part}_{value}"


# --- what the questions got in them ---


def outcomes(ablation: Ablation, run: str, kind: NoiseType) -> dict[str, dict[int, Outcome]]:
    """By the amount of noise, the least first, what a run made of each question; NO_NOISE is self-consistency.

    Questions that have fewer thoughts than the noisy one are left out: they got no noise.
    """
    keys = {NO_NOISE: ablation.config.baseline}
    keys |= {f"{ratio:g}": condition_key(kind, scale) for ratio, scale in ablation.scales(kind).items()}
    answered = [record for record in ablation.sweeps[run].records if record["error"] is None]
    found = {noise: {record["index"]: record["conditions"][key] for record in answered} for noise, key in keys.items()}
    noisy = [cell for noise, cell in found.items() if noise != NO_NOISE]
    reached = {index for index in found[NO_NOISE] if all(cell[index]["noise_ratio"] for cell in noisy)}
    return {noise: {index: one for index, one in cell.items() if index in reached} for noise, cell in found.items()}


def run_cells(ablation: Ablation, part: str) -> Cells:
    """One run for each value."""
    config = ablation.config
    return {
        (value, noise): cell
        for value, changes in PARTS[part].runs(config, ablation.thoughts).items()
        for noise, cell in outcomes(ablation, run_name(config, part, value, changes), config.setting).items()
    }


def type_cells(ablation: Ablation, part: str) -> Cells:
    """Every noise type at scales that add about as much."""
    cells = {}
    for kind in NOISES.values():
        for noise, cell in outcomes(ablation, BASE if kind == ablation.config.setting else TYPES, kind).items():
            cells[kind.name, noise] = cell
    return cells


def branch_cells(ablation: Ablation, part: str) -> Cells:
    """The first k branches of every K: a branch's noise and samples do not depend on how many there are."""
    base = outcomes(ablation, BASE, ablation.config.setting)
    return {
        (str(k), noise): {index: first_branches(ablation, one, k) for index, one in cell.items()}
        for k in range(1, ablation.config.num_branches + 1)
        for noise, cell in base.items()
    }


def first_branches(ablation: Ablation, outcome: Outcome, k: int) -> Outcome:
    same = functools.partial(same_answer, ablation.config.benchmark)
    return vote(outcome["branches"][:k], outcome["noise_ratio"], same)


def aggregation_cells(ablation: Ablation, part: str) -> Cells:
    """Every aggregation of the same branches; and of branches with different amounts of noise, which weigh differently."""
    base = outcomes(ablation, BASE, ablation.config.setting)
    if len(base) > 2:  # more than self-consistency and one ratio
        base[MIXED] = mixed_branches(ablation, [cell for noise, cell in base.items() if noise != NO_NOISE])
    k = ablation.config.num_branches
    # All vote again: recorded votes of earlier versions used the noise before it was rounded, and of mixed ones there are none.
    voted = {noise: {index: first_branches(ablation, one, k) for index, one in cell.items()} for noise, cell in base.items()}
    return {  # what is counted is the answer where the majority's stands
        (name, noise): {index: {**one, JUDGE: one[name]} for index, one in cell.items()}
        for name in AGGREGATIONS
        for noise, cell in voted.items()
    }


def mixed_branches(ablation: Ablation, cells: list[dict[int, Outcome]]) -> dict[int, Outcome]:
    """K branches that take turns in the amount of noise: branch i is branch i of the ratio whose turn it is."""
    turns = [cells[branch % len(cells)] for branch in range(ablation.config.num_branches)]
    mixed = {}
    for index in cells[0]:
        branches = [cell[index]["branches"][branch] for branch, cell in enumerate(turns)]
        ratios = [(cell[index]["noise_ratio"] or [0.0] * len(turns))[branch] for branch, cell in enumerate(turns)]
        mixed[index] = {"branches": branches, "noise_ratio": ratios}
    return mixed


# --- the parts ---


@dataclass(frozen=True)
class Varied:
    """One part; see `ablation_results.Part`. runs: the values that need runs of their own, and the keys that each sets."""

    about: str
    default: Callable[[AblationConfig], str]
    cells: Callable[[Ablation, str], Cells] = run_cells
    runs: Callable[[AblationConfig, int], dict[str, dict[str, Any]]] = lambda config, thoughts: {}
    ordered: bool = False
    of_self_consistency: bool = False


def _steps(config: AblationConfig, thoughts: int) -> dict[str, dict[str, Any]]:
    return {str(step): {"noise_at_step": step} for step in config.injection_steps or range(1, thoughts + 1)}


PARTS: dict[str, Varied] = {
    "injection_step": Varied(
        "thought that gets the noise", lambda config: str(config.noise_at_step), runs=_steps, ordered=True
    ),
    "branches": Varied(
        "branches that vote",
        lambda config: str(config.num_branches),
        branch_cells,
        ordered=True,
        of_self_consistency=True,
    ),
    "noise_type": Varied("noise type", lambda config: config.setting.name, type_cells),
    "aggregation": Varied("from branches to an answer", lambda config: JUDGE, aggregation_cells, of_self_consistency=True),
    "shared_noise": Varied(
        "noise vectors of the branches",
        lambda config: "shared" if config.shared_noise else "own",
        runs=lambda config, thoughts: {"own": {"shared_noise": False}, "shared": {"shared_noise": True}},
    ),
    "schedule": Varied(
        "schedule of the noise in later thoughts",
        lambda config: config.schedule,
        runs=lambda config, thoughts: {name: {"schedule": name} for name in SCHEDULES},
    ),
}


def part_of(ablation: Ablation, name: str) -> Part:
    """What every question got under every value of a part and every amount of noise."""
    row = PARTS[name]
    default, cells = row.default(ablation.config), row.cells(ablation, name)
    return Part(name, default, cells, row.about, row.ordered, row.of_self_consistency)


@entry_point
def main(arguments: list[str]) -> None:
    config = load_config(AblationConfig, arguments, __doc__, "args/ablation.yaml")
    with distributed.process_group() as device:
        print_config(config)
        ablation = run_ablation(config, device)
        if ablation is None:
            return
        parts = [part_of(ablation, name) for name in config.parts]
        info = {
            **ablation.sweeps[BASE].info,
            "noise_type": config.setting.name,
            "noise_ratios": config.noise_ratios,
            "scales": {kind.name: [*ablation.scales(kind).values()] for kind in NOISES.values()},
            "runs": {name: str(sweep.config.directory) for name, sweep in ablation.sweeps.items()},
            "self_consistency": config.baseline,
        }
        distributed.run_on_main(lambda: write_results(config, info, parts, ablation.sweeps[BASE].records))


if __name__ == "__main__":
    main()
