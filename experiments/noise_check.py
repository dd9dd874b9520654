"""Noise on the thoughts of a trained model, against its formulas:
`python -m experiments.noise_check CHECKPOINT DATA_FILE OUT [--questions N] [--seed S]`.

CHECKPOINT is a checkpoint directory, a run's directory, or a model without training; DATA_FILE a JSON file of records. Every
type of noise is put on the clean thoughts of the first N questions at every recommended scale, drawn as in the experiments;
on the first thought of each also in float16 and bfloat16. Writes OUT/noise_check.json and prints a table. Exit code 1 if a
check fails: a p-value below 1e-4, or what must hold exactly does not.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from experiments.answers.questions import BenchmarkQuestion
from experiments.checks.noise_laws import SMALLEST_P, measure, measure_below_rounding, measure_zero, recommended_settings
from experiments.noise.settings import SweepConfig
from experiments.noise.subjects import Subject, load_subject
from experiments.noise.sweep import think
from experiments.tables import terminal, text
from noise import noise_generator
from systems.arguments import Parser
from systems.machine import machine
from systems.metrics import show
from systems.writing import write_json
from thoughts import embedding_norm
from utils import UserError, entry_point, load_config

PROGRAM = "noise_check"
RESULT = f"{PROGRAM}.json"
BATCH = 100  # questions
MOST_LINES = 10  # about what is wrong; the file has everything
COARSE = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *COARSE)


Paths = dict[int, Tensor]  # the thoughts (N, D) of each question by its index, float32


# --- the thoughts ---


def load(source: Path, data_file: Path, benchmark: str, limit: int) -> tuple[Subject, list[BenchmarkQuestion]]:
    """Who thinks, on the CPU in float32, and the first questions of a file. Raises UserError as these two do."""
    asked = [f"benchmark={benchmark}", f"data_path={data_file}", f"num_questions={limit}"]
    config = load_config(SweepConfig, [f"name={PROGRAM}", f"load_model_path={source}", *asked])
    return load_subject(config, torch.device("cpu")), config.questions()


def clean_thoughts(subject: Subject, questions: Sequence[BenchmarkQuestion]) -> Paths:
    """The thoughts of all questions, each as it is fed back. Raises UserError if one is zero or not finite."""
    paths: Paths = {}
    for at in range(0, len(questions), BATCH):
        paths |= think(subject, questions[at : at + BATCH])
    states = torch.cat([*paths.values()])
    if not bool((states.norm(dim=-1) > 0).all() and states.isfinite().all()):
        raise UserError(f"{subject.source}: a thought is zero or not finite; the weights are damaged")
    return paths


def generators(paths: Paths, seed: int, branch: int) -> list[torch.Generator]:
    """The sources that the noise of these thoughts has in an experiment, in their order."""
    numbered = ((question, number) for question, path in paths.items() for number in range(1, len(path) + 1))
    return [noise_generator(seed, question, branch, number) for question, number in numbered]


def norms(paths: Paths) -> dict[str, Any]:
    """How long thoughts are: all of them, and those of each pass."""
    states = torch.cat([*paths.values()]).double()
    sizes, passes = states.norm(dim=-1), torch.cat([torch.arange(1, len(path) + 1) for path in paths.values()])
    return {
        "width": states.shape[1],
        "coordinate": states.square().mean().sqrt().item(),  # root mean square
        "mean_inverse_square": sizes.pow(-2).mean().item(),
        "all": _spread(sizes),
        "by_pass": {str(number): _spread(sizes[passes == number]) for number in passes.unique().tolist()},
    }


def _spread(sizes: Tensor) -> dict[str, float]:
    return {
        "count": len(sizes),
        "mean": sizes.mean().item(),
        "deviation": sizes.std(correction=0).item(),
        "smallest": sizes.min().item(),
        "largest": sizes.max().item(),
    }


# --- the checks ---


def check_noise_on(paths: Paths, seed: int) -> dict[str, Any]:
    """All settings, each with its own draws: on all thoughts in float32, on the first thoughts in 16 bits, and on zeros."""
    result = {}
    for dtype in DTYPES:
        chosen = paths if dtype == torch.float32 else {question: path[:1] for question, path in paths.items()}
        states = torch.cat([*chosen.values()]).to(dtype)
        sources = [functools.partial(generators, chosen, seed, branch) for branch in range(len(recommended_settings()) + 1)]
        rows = [measure(states, *each) for each in zip(recommended_settings(), sources, strict=False)]
        zeros = [measure_zero(states.shape[1], dtype, setting) for setting in recommended_settings()]
        result[_name(dtype)] = {"settings": rows, "zero_thoughts": zeros}
        if dtype in COARSE:
            result[_name(dtype)]["below_rounding"] = [measure_below_rounding(states, sources[-1])]
    return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def all_rows(checks: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for kinds in checks.values() for rows in kinds.values() for row in rows]


def check(subject: Subject, questions: Sequence[BenchmarkQuestion], seed: int) -> dict[str, Any]:
    """The content of noise_check.json, without the data file; what is no number is None."""
    paths = clean_thoughts(subject, questions)
    checks = check_noise_on(paths, seed)
    result = {
        "model": "/".join(Path(subject.source).parts[-2:]),
        "questions": sum(len(path) > 0 for path in paths.values()),
        "seed": seed,
        "smallest_p": SMALLEST_P,
        "machine": machine(subject.device),
        "norms": norms(paths) | {"embedding": embedding_norm(subject.model.base_causallm).item()},
        **checks,
        "p_values": sum(one["p_value"] is not None for row in all_rows(checks) for one in row["checks"].values()),
        "failed": sum(not row["passed"] for row in all_rows(checks)),
        "passed": all(row["passed"] for row in all_rows(checks)),
    }
    return json.loads(json.dumps(result), parse_constant=lambda _: None)


# --- what is shown ---


def result_table(result: dict[str, Any]) -> Table:
    size, questions = result["norms"]["all"], result["questions"]
    title = (
        f"Noise on {size['count']:,} thoughts of {questions:,} questions; |h| = {size['mean']:.2f} ± {size['deviation']:.2f}"
    )
    columns = ("noise", "scale", "|n|/|h|", "formula", "cosine", "|h'|/|h|", "p", "lowest of", "")
    return terminal(title, columns, map(_cells, result["float32"]["settings"]), _caption(result), left=("lowest of", ""))


def _caption(result: dict[str, Any]) -> str:
    """The checks that have no row of their own, counted, and what is wrong."""
    lines = []
    for dtype in map(_name, DTYPES):
        counts = [f"{_words(kind)} {sum(row['passed'] for row in rows)} of {len(rows)}" for kind, rows in result[dtype].items()]
        lines.append(f"{dtype}: {', '.join(counts)} as they should be")
    problems = wrong(result)
    more = [f"and {len(problems) - MOST_LINES} more"] if len(problems) > MOST_LINES else []
    return "\n".join([*lines, *problems[:MOST_LINES], *more])


def wrong(result: dict[str, Any]) -> list[str]:
    """One line for each setting that fails a check."""
    lines = []
    for dtype in map(_name, DTYPES):
        for kind, row in ((kind, row) for kind, rows in result[dtype].items() for row in rows):
            if failed := [name for name, check in row["checks"].items() if not check["passed"]]:
                lines.append(f"wrong: {dtype}, {_words(kind)}, {row['name']} at {row['scale']:g}: {', '.join(failed)}")
    return lines


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = [row[key] for key in ("ratio", "expected_ratio", "cosine", "norm_change")]
    return [
        row["name"],
        f"{row['scale']:g}",
        *(text(number, "{:.3g}") for number in numbers),
        text(row["p_value"], "{:.2g}"),
        row["test"] or "",
        "ok" if row["passed"] else "wrong",
    ]


@entry_point
def main(given: list[str]) -> None:
    parser = Parser(f"python -m experiments.{PROGRAM}", __doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=500, help="how many, from the first (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--benchmark", default="prosqa", help="whose questions they are (default: %(default)s)")
    arguments = parser.parse_args(given)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{arguments.out}: results cannot be written there: {error.strerror}") from None
    subject, questions = load(arguments.checkpoint, arguments.data_file, arguments.benchmark, arguments.questions)
    result = {"data_file": arguments.data_file.name, **check(subject, questions, arguments.seed)}
    write_json(arguments.out / RESULT, result)
    show(result_table(result))
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
