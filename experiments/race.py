"""How fast a run goes, stage by stage: `python -m experiments.race RUN`, RUN being a directory with metrics.jsonl.

Model FLOPs of a trained token are 6 for each weight of the transformer blocks, forward and backward, and attention's own
products over half of the tokens (causal); embeddings and head are left out. What the last layer leaves out
(`systems.last_layer`) counts, as a model's FLOPs do not depend on how they are computed. Their share of the machine's rate,
measured now by matrix products in the dtype of the run, is the utilisation (MFU, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from config import RunConfig
from experiments.quickstart import read_metrics
from experiments.tables import terminal
from systems.arguments import Parser
from systems.metrics import show
from systems.storage import newest_whole
from utils import entry_point, get_logger, load_config

SECONDS = 0.5  # of matrix products


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of square matrix products: the best of some rounds."""
    size = 8192 if device.type == "cuda" else 1024
    one = torch.randn(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + SECONDS
    while time.perf_counter() < end or not best:
        began = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def model_without_memory(model_id: str) -> PreTrainedModel:
    """The model of a configuration, with no memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_id).get_text_config())


def operations_of_a_token(model: PreTrainedModel, positions: float) -> float:
    """Forward and backward, in rows of so many positions."""
    config = model.config
    ends = [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]
    left_out = {id(parameter) for parameter in ends}
    weights = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in left_out)
    return 6 * weights + 6 * config.num_hidden_layers * config.hidden_size * positions


def stages(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One row for each stage from the rows of kind "epoch": means over its epochs. Evaluation counts as time of its own."""
    before = [0, *(row["examples"] for row in rows)]
    found = []
    for stage, group in itertools.groupby(zip(rows, before, strict=False), key=lambda pair: pair[0]["stage"]):
        members = [{**row, "own": row["examples"] - earlier} for row, earlier in group]
        answering = [row["seconds_per_question"] * row["questions"] / row["machine"]["processes"] for row in members]
        found.append(
            {
                "stage": stage,
                "epochs": len(members),
                "questions_per_second": mean(row["own"] / row["seconds"] for row in members),
                "tokens_per_second": mean(row["tokens_per_second"] for row in members),
                "tokens_per_question": mean(row["tokens_per_second"] * row["seconds"] / row["own"] for row in members),
                "seconds_per_epoch": mean(row["seconds"] for row in members) + mean(answering),
                "accuracy": members[-1]["accuracy"],
            }
        )
    return found


def report(run: Path) -> tuple[Table, str]:
    """The table, and a line on the time spent and to come. Raises UserError where the run has no finished epoch."""
    config = load_config(RunConfig, [str(run / "config.yaml")])
    rows = read_metrics(run, "epoch")
    found = stages(rows)
    machine = rows[-1]["machine"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_rate(device, torch.bfloat16 if config.bf16 else torch.float32) * machine["processes"]
    title = f"{run}: {machine['device']}, {rate / 1e12:.3g} TFLOP/s in matrix products"
    columns = ["stage", "epochs", "questions/s", "tokens/s", "MFU", "seconds an epoch", "accuracy"]
    lines = []
    model = model_without_memory(str(newest_whole(run) or Path(config.model_id)))
    for row in found:
        share = row["tokens_per_second"] * operations_of_a_token(model, row["tokens_per_question"]) / rate
        cells = [f"{row['questions_per_second']:.1f}", f"{row['tokens_per_second']:,.0f}", f"{100 * share:.1f}%"]
        lines.append(
            [str(row["stage"]), str(row["epochs"]), *cells, f"{row['seconds_per_epoch']:.1f}", f"{100 * row['accuracy']:.1f}%"]
        )
    spent = sum(row["epochs"] * row["seconds_per_epoch"] for row in found)
    left = config.num_epochs - rows[-1]["epoch"]
    to_come = left * found[-1]["seconds_per_epoch"]
    return terminal(
        title, columns, lines
    ), f"{spent / 60:.1f} minutes spent; {left} epochs to come, {to_come / 60:.1f} minutes at the rate of the newest stage"


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.race", __doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args(given).run
    table, line = report(run)
    show(table)
    get_logger().info(line)


if __name__ == "__main__":
    main()
