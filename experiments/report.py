"""One page about runs and results: `python -m experiments.report RUN_OR_RESULTS ... [--out report.html]`.

Each argument is a run's directory (checkpoints/x: configuration, curves, epochs, questions with what the thoughts say) or a
folder of results (results/x: its tables and figures). The page is one file that needs no network. --watch writes it anew
whenever a run has finished an epoch; --wandb PROJECT logs it there as well.
"""

from __future__ import annotations

import base64
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt

from coconut import Coconut
from dataset import load_records
from experiments.chat import How, ask, graph_of
from experiments.plots import epoch_curves
from experiments.probes import Probed
from experiments.probes.base import GRAPH
from experiments.probes.decoded import lens
from experiments.probes.frontier import graph_after
from experiments.quickstart import read_metrics
from experiments.tables import markdown
from systems.arguments import Parser, natural
from systems.files import read_typed
from systems.machine import described, machine
from systems.metrics import METRICS, start_wandb
from systems.writing import write_text
from utils import UserError, entry_point, get_logger, parse_yaml, read_text

CONFIG = "config.yaml"
EPOCH = ("epoch", "stage", "latents", "train_loss", "val_loss", "accuracy", "wrote_steps", "seconds", "effective_rank")
SECONDS = 5.0  # between two looks at a run that is watched


@dataclass(frozen=True)
class Block:
    """kind: figure, text (HTML), plain; settings and numbers are folded. about: what it shows, or the fold's heading."""

    kind: str
    content: str
    about: str = ""


def blocks_of(path: Path, questions: int) -> list[Block]:
    """What the page says of one argument. Raises UserError if it is neither a run nor results."""
    is_run = (path / METRICS).is_file() and (path / CONFIG).is_file()
    if blocks := list(run_blocks(path, questions) if is_run else result_blocks(path)):
        return blocks
    raise UserError(f"{path}: neither a run ({METRICS}, {CONFIG}) nor results with tables or figures")


def run_blocks(run: Path, questions: int) -> Iterator[Block]:
    rows = read_metrics(run, "epoch")
    if "machine" in rows[-1]:
        yield Block("plain", described(rows[-1]["machine"]))
    about = f"Loss, validation accuracy and health of the thoughts of {run} by epoch; stages are shaded."
    yield _drawn(lambda path: epoch_curves({run.name: rows}, path, str(run)), about)
    yield Block("text", _html(markdown(EPOCH, [[_cell(row.get(key)) for key in EPOCH] for row in rows])))
    config = parse_yaml(read_text(run / CONFIG), str(run / CONFIG))
    if questions and any(run.glob("checkpoint_*")):
        yield from sample_blocks(run, config, questions)
        yield from sketch_blocks(run, Path(config["val_path"]))
    yield Block("settings", yaml.safe_dump(config, sort_keys=False), f"Configuration of {run}")


def sample_blocks(run: Path, config: dict[str, Any], questions: int) -> Iterator[Block]:
    """The first questions of the validation file, answered, with what each thought says."""
    model = Coconut.from_pretrained(str(run))
    for record in load_records(config["val_path"])[:questions]:
        answer = ask(model, record["question"], How(), config.get("max_new_tokens", 64))
        graph, person = graph_of(record["question"])
        reached = f"\nfrom {person}: {' '.join(f'{a}>{b}' for a, b in graph.edges)}" if person in graph else ""
        said = [
            f"thought {n}: " + ", ".join(f"{token!r} {p:.2f}" for token, p in each) for n, each in enumerate(answer.thoughts, 1)
        ]
        text = f"{record['question']}{reached}\n\n" + "\n".join(said)
        yield Block("plain", f"{text}\n\nanswer: {answer.text}  (p = {answer.probability:.3f})\ngold: {record['answer']}")


def sketch_blocks(run: Path, data: Path) -> Iterator[Block]:
    """What every layer says at each thought of the first question, and the question's graph after each number of thoughts."""
    probed = Probed.load(str(run), data, 1, {}, torch.device("cpu"))
    if not probed.thoughts:
        return
    yield _drawn(lambda path: lens(probed, path), "The likeliest token of every layer at each thought of the first question.")
    if all(key in probed.records()[0] for key in GRAPH):
        about = "Graph of the first question after k thoughts: darker is likelier as the next step's start; the path is red."
        yield _drawn(lambda path: graph_after(probed, path), about)


def result_blocks(folder: Path) -> Iterator[Block]:
    yield from (Block("text", _html(read_text(path))) for path in sorted(folder.glob("*.md")))
    yield from (Block("plain", read_text(path)) for path in folder.glob("table.txt"))
    for path in sorted(folder.glob("*.png")):
        yield _figure(path, f"{path.stem.replace('_', ' ')}, of {folder}")
    if (folder / "summary.json").is_file():
        summary = read_typed(folder / "summary.json", dict[str, Any])
        yield Block("numbers", yaml.safe_dump(summary, sort_keys=False), f"Numbers of {folder}")
    if (folder / CONFIG).is_file():
        yield Block("settings", read_text(folder / CONFIG), f"Configuration of {folder}")


def _figure(path: Path, about: str) -> Block:
    return Block("figure", base64.b64encode(path.read_bytes()).decode(), about)


@torch.no_grad()
def _drawn(draw: Callable[[Path], None], about: str) -> Block:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "figure.png")
        return _figure(Path(folder) / "figure.png", about)


def _html(text: str) -> str:
    """Markdown without raw HTML in it, so that nothing in a file can become code of the page."""
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link"]).render(text)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def write_page(paths: Sequence[Path], out: Path, questions: int, logged: Any = None) -> None:
    """logged: a run of wandb that gets the page, too. Raises UserError, before it writes, if one of the paths says nothing."""
    parts = [(str(path), blocks_of(path, questions)) for path in paths]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        title=", ".join(path.name for path in paths),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(["python", "-m", "experiments.report", *sys.argv[1:]]),
        machine=described(machine()) + ".",
        parts=parts,
    )
    write_text(out, page)
    get_logger().info(f"{out}: written")
    if logged is not None:
        import wandb

        logged.log({"report": wandb.Html(str(out), inject=False)})


def watch(paths: Sequence[Path], out: Path, questions: int, logged: Any = None) -> None:
    """Write the page again whenever a run's metrics have grown, until Ctrl-C; a run in its first epoch is waited for."""
    seen: list[float] = []
    while True:
        now = [(path / METRICS).stat().st_mtime if (path / METRICS).exists() else 0.0 for path in paths]
        if now != seen:
            try:
                write_page(paths, out, questions, logged)
            except UserError as error:
                if not all(path.is_dir() for path in paths):
                    raise
                get_logger().info(f"nothing to show yet: {error}")
            seen = now
        time.sleep(SECONDS)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.report", __doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN_OR_RESULTS")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--questions", type=natural, default=3, help="of a run that are answered on the page")
    parser.add_argument("--watch", action="store_true", help="write it again after each epoch, until Ctrl-C")
    parser.add_argument("--wandb", metavar="PROJECT", help="log the page to this project of wandb as well")
    arguments = parser.parse_args(given)
    logged = None
    if arguments.wandb:
        mode, directory = os.environ.get("WANDB_MODE", "online"), os.environ.get("WANDB_DIR")
        logged = start_wandb(arguments.wandb, arguments.out.stem, mode, dir=directory, job_type="report")
    (watch if arguments.watch else write_page)(arguments.paths, arguments.out, arguments.questions, logged)


if __name__ == "__main__":
    main()
