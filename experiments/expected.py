"""Numbers you should see: `python -m experiments.expected RUN` says at which stage a run leaves those of docs/expected.json.

`python -m experiments.expected --make RUN RUN ...` takes the finished runs of several seeds into docs/expected.json and writes
docs/EXPECTED.md anew; with `--add` in its place the seeds that are there stay, for instance those of another machine. A run
belongs to the file of args/ whose `name` it has, or, where a script trains several seeds, to the script and the run's name
without the seed.

A seed that was not among those may lie a little outside of their range. So a stage counts as left behind where its accuracy
is lower, or its loss or its epochs are more, than the range of the seeds and half its width again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from config import RunConfig
from experiments.quickstart import read_metrics
from experiments.tables import markdown
from methods import ALL_TOKENS
from systems.arguments import Parser
from systems.files import read_typed
from systems.machine import described
from systems.writing import write_json, write_text
from utils import UserError, entry_point, get_logger, load_config, parse_yaml, read_text

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "docs" / "expected.json", ROOT / "docs" / "EXPECTED.md"
# Where a run may differ from its file: none of these changes what is learned, beyond the seed.
FREE = ("seed", "save_path", "load_model_path", "keep_last", "log_every", "num_workers", "wandb", "hang_timeout")
SCRIPTS = {"checkpoints/compare": "scripts/compare_methods.sh", "checkpoints/search": "scripts/search.sh"}  # by save_path
SIGNS = {"accuracy": -1, "val_loss": 1, "epochs": 1}  # in which direction a number is worse
LEAST = {"accuracy": 0.01, "val_loss": 0.005, "epochs": 1}  # no range is narrower than this
HEADING = """# Numbers you should see

Made by `python -m experiments.expected --make RUN ...`, and for a further machine `--add`, from
[expected.json](expected.json). Hold your own run against it:

    python -m experiments.expected checkpoints/quick-coconut

It says at which stage the run leaves the range of these seeds. Runs of `scripts/compare_methods.sh` and
`scripts/search.sh` have entries too, by method; a stage of `icot` is the number of tokens removed, and "all" that all are. Loss
and accuracy are those of the validation set at the end of each stage: mean over seeds, and lowest to highest. The same seed
gives the same bits on the same kind of machine only; compare ranges, not digits. Seconds are of training alone, on the machine
named, with other work beside some of the runs.
"""
PUBLISHED = """
## Published

Not run here: these need a GPU. The accuracy is the paper's (arXiv 2412.06769, or as the file says), on the test set.
"""


def stages_of(run: Path) -> dict[str, dict[str, float]]:
    """Of each stage: its last epoch's numbers, its epochs, its seconds."""
    found = {}
    for stage, part in itertools.groupby(read_metrics(run, "epoch"), key=lambda row: row["stage"]):
        epochs = list(part)
        last = {key: epochs[-1][key] for key in ("val_loss", "accuracy")}
        found[str(stage)] = {**last, "epochs": len(epochs), "seconds": sum(row["seconds"] for row in epochs)}
    return found


def owner_of(run: Path) -> str:
    """The file of args/ that a run was started with, or the script and its name there. Raises UserError if it has neither."""
    config = parse_yaml(read_text(run / "config.yaml"), str(run / "config.yaml"))
    name = config["name"]
    if config["save_path"] in SCRIPTS and (found := re.fullmatch(r"(.+)-seed\d+", name)):
        return f"{SCRIPTS[config['save_path']]}, {found[1]}"
    files = [path for path in sorted((ROOT / "args").glob("*.yaml")) if f"\nname: {name}\n" in path.read_text(encoding="utf-8")]
    if not files:
        raise UserError(f"{run}: no file in args/ has the name {name}; expected numbers belong to one")
    return f"args/{files[0].name}"


def collect(runs: Sequence[Path], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entry of several seeds' runs of one file, added to that of earlier ones, say on another machine."""
    stages = before["stages"] if before else {}
    for run in runs:
        for stage, numbers in stages_of(run).items():
            for name, value in numbers.items():
                stages.setdefault(stage, {}).setdefault(name, []).append(value)
    seeds = [load_config(RunConfig, [str(run / "config.yaml")]).seed for run in runs]
    machine = described(read_metrics(runs[0], "epoch")[-1]["machine"])
    if before:
        seeds, machine = before["seeds"] + seeds, f"{before['machine']}; and {machine}"
    return {"seeds": seeds, "machine": machine, "stages": stages}


def limit(name: str, values: Sequence[float]) -> float:
    """The worst value that is still expected."""
    low, high = min(values), max(values)
    slack = max(LEAST[name], (high - low) / 2)
    return high + slack if SIGNS[name] > 0 else low - slack


def compare(run: Path, expected: Mapping[str, Any]) -> list[str]:
    """One line for each stage, and a last one with the verdict."""
    lines, left, found = [], None, stages_of(run)
    for stage, numbers in found.items():
        if stage not in expected["stages"]:
            lines.append(f"stage {stage}: not among the expected ones")
            continue
        wanted = expected["stages"][stage]
        told = {name: f"{name} {_shown(name, numbers[name])}" for name in SIGNS}
        problems = [
            f"{told[name]}, expected {_range(name, wanted[name])}"
            for name, sign in SIGNS.items()
            if sign * (numbers[name] - limit(name, wanted[name])) > 1e-9
        ]
        lines.append(f"stage {stage}: {', '.join(told.values())}: {'; '.join(problems) or 'as expected'}")
        left = left or (stage if problems else None)
    missing = [stage for stage in expected["stages"] if stage not in found]
    verdict = "as expected" if left is None else f"leaves the expected range at stage {left}"
    return [*lines, verdict + (f"; not there yet: stages {', '.join(missing)}" if missing else "")]


def differences(run: Path, file: str) -> list[str]:
    """Keys with which a run differs from its file, where that may change what is learned; a script says its own."""
    if not file.startswith("args/"):
        return []
    ours, theirs = (load_config(RunConfig, [str(path)]).model_dump() for path in (run / "config.yaml", ROOT / file))
    return [f"{key} {ours[key]!r}, there {theirs[key]!r}" for key in theirs if key not in FREE and ours[key] != theirs[key]]


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.1f}%" if name == "accuracy" else f"{value:.3f}" if name == "val_loss" else f"{value:.0f}"


def _range(name: str, values: Sequence[float]) -> str:
    average = f"{mean(values):.1f}" if name in ("epochs", "seconds") else _shown(name, mean(values))
    return f"{average} ({_shown(name, min(values))} to {_shown(name, max(values))})"


def page(data: Mapping[str, Any]) -> str:
    parts = [HEADING]
    for file, entry in data.items():
        seeds = ", ".join(map(str, entry["seeds"]))
        parts.append(f"\n## {file}\n\nSeeds {seeds}; {entry['machine']}.\n\n")
        names = ("val_loss", "accuracy", "epochs", "seconds")
        rows = [
            ("all" if stage == ALL_TOKENS else str(stage), *(_range(name, entry["stages"][str(stage)][name]) for name in names))
            for stage in sorted(map(int, entry["stages"]))
        ]
        parts.append(markdown(("stage", "validation loss", "accuracy", "epochs", "seconds"), rows) + "\n")
    published = [
        (f"args/{path.name}", found[1])
        for path in sorted((ROOT / "args").glob("*.yaml"))
        if (found := re.search(r"^# Expected: the paper reports (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    ]
    return "".join(parts) + f"{PUBLISHED}\n{markdown(('file', 'published'), published)}\n"


def make(runs: Sequence[Path], add: bool = False) -> None:
    data = read_typed(DATA, dict[str, Any]) if DATA.exists() else {}
    by_file: dict[str, list[Path]] = {}
    for run in runs:
        by_file.setdefault(owner_of(run), []).append(run)
    for file, group in by_file.items():
        data[file] = collect(group, data.get(file) if add else None)
    data = dict(sorted(data.items()))
    write_json(DATA, data)
    write_text(PAGE, page(data))


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.expected", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--make", action="store_true", help="take these runs as what is expected")
    parser.add_argument("--add", action="store_true", help="take them too, beside those that are there")
    arguments = parser.parse_args(given)
    if arguments.make or arguments.add:
        make(arguments.runs, arguments.add)
        return
    data = read_typed(DATA, dict[str, Any])
    for run in arguments.runs:
        file = owner_of(run)
        if file not in data:
            raise UserError(f"{run}: {file} has no expected numbers; docs/EXPECTED.md has those of {', '.join(data)}")
        for change in differences(run, file):
            get_logger().warning(f"{run} differs from {file}: {change}")
        get_logger().info("\n".join(f"{run}: {line}" for line in compare(run, data[file])))


if __name__ == "__main__":
    main()
