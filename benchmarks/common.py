"""What the benchmarks share: the setting, random weights and ProsQA-shaped questions, a clock, peak memory, the report.

Speed and memory depend on shapes alone, so weights and tokens are random and nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a script sees only its own folder; the naive reference is in tests

from coconut import Coconut  # noqa: E402
from systems.machine import machine  # noqa: E402
from systems.models import fuse_activations  # noqa: E402

MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of the rows. Questions differ in length by `spread` on each side of `question_tokens`."""

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    ordinary_tokens: int = 50257  # GPT-2's vocabulary; the three markers follow
    question_tokens: int = 300
    spread: int = 24
    latents: int = 6
    answer_tokens: int = 10
    dropout: float = 0.1

    @property
    def start_latent(self) -> int:
        return self.ordinary_tokens

    @property
    def end_latent(self) -> int:
        return self.ordinary_tokens + 1

    @property
    def latent(self) -> int:
        return self.ordinary_tokens + 2

    @property
    def eos(self) -> int:
        return -1  # no token: a random model must not end an answer early


TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "ordinary_tokens": 200, "question_tokens": 20, "spread": 4, "dropout": 0.0}


def parser(description: str, batch_size: int, repeats: int) -> argparse.ArgumentParser:
    """The options both benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--batch-size", type=int, default=batch_size)
    options.add_argument("--latents", type=int, default=Setting.latents)
    options.add_argument("--repeats", type=int, default=repeats, help="measured repeats; the median is reported")
    options.add_argument("--warmup", type=int, default=1, help="repeats before them that are not measured")
    options.add_argument("--threads", type=int, help="threads of torch on a CPU (default: torch's own choice)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="write the result to this JSON file")
    options.add_argument("--no-memory", action="store_true", help="leave out peak memory, for which each variant starts anew")
    options.add_argument("--tiny", action="store_true", help="a tiny model and short rows: does it run at all?")
    options.add_argument("--memory-of", help=argparse.SUPPRESS)  # one variant, in a process of its own
    return options


def add_dropout(options: argparse.ArgumentParser) -> None:
    """For training steps. torch has no fused attention with dropout on a CPU, which makes a step much longer."""
    options.add_argument("--dropout", type=float, help="0 to 1 (default: 0.1, as GPT-2 is published; with --tiny 0)")


def prepare(arguments: argparse.Namespace) -> tuple[Setting, torch.device]:
    """Threads, seed, setting and device."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    setting = replace(Setting(**TINY) if arguments.tiny else Setting(), latents=arguments.latents)
    if getattr(arguments, "dropout", None) is not None:
        setting = replace(setting, dropout=arguments.dropout)
    return setting, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(setting: Setting, device: torch.device) -> Coconut:
    """GPT-2 of the setting's size with random weights, float32."""
    config = GPT2Config(
        vocab_size=setting.ordinary_tokens + 3,
        n_layer=setting.n_layer,
        n_embd=setting.n_embd,
        n_head=setting.n_head,
        resid_pdrop=setting.dropout,
        embd_pdrop=setting.dropout,
        attn_pdrop=setting.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = GPT2LMHeadModel(config).to(device)
    fuse_activations(base)  # as run.py does
    return Coconut(base, setting.latent, setting.start_latent, setting.end_latent, setting.eos)


def random_questions(setting: Setting, count: int) -> list[Tensor]:
    """Prompts at the last stage, lengths in random order, each (t,) int64: question, start marker, latents, end marker."""
    low, high = setting.question_tokens - setting.spread, setting.question_tokens + setting.spread
    spread = torch.linspace(low, high, count) if count > 1 else torch.tensor([setting.question_tokens])
    lengths = spread.round().long()[torch.randperm(count)].tolist()
    thoughts = torch.tensor([setting.start_latent, *[setting.latent] * setting.latents, setting.end_latent])
    return [torch.cat([torch.randint(setting.ordinary_tokens, (length,)), thoughts]) for length in lengths]


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Rows of different lengths to one (B, T) tensor. At the last stage this brings all first latents to one column."""
    width = max(map(len, rows))
    return torch.stack([torch.cat([row.new_full((width - len(row),), value), row]) for row in rows])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, after all work queued on the device is done."""
    synchronize(device)
    return time.perf_counter()


def measure(variants: dict[str, Callable[[int], T]], warmup: int, repeats: int) -> dict[str, list[T]]:
    """Results of every variant in every repeat. Variants take turns, so that a busy machine slows all of them alike."""
    results: dict[str, list[T]] = {name: [] for name in variants}
    for repeat in range(-warmup, repeats):
        for name, variant in variants.items():
            result = variant(max(repeat, 0))
            if repeat >= 0:
                results[name].append(result)
    return results


def median_by_key(results: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def peak_memory(device: torch.device) -> float:
    """Peak of this process in MiB: on a GPU what tensors took, on a CPU all resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def peak_memories(script: str, argv: Sequence[str], variants: Sequence[str]) -> dict[str, float]:
    """Peak memory of each variant, run in a process of its own.

    To be called before this process grows: a child's resident peak starts from that of the process it was forked from.
    """
    peaks = {}
    for variant in variants:
        command = [sys.executable, script, *argv, "--memory-of", variant]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[variant] = json.loads(output.splitlines()[-1])["peak_memory_mib"]
    return peaks


def describe(setting: Setting, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The part of a result that says what was measured, and where."""
    chosen = {key: value for key, value in vars(arguments).items() if key not in ("out", "memory_of")}
    return {"setting": asdict(setting), "arguments": chosen, "machine": machine(device)}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns; floats with one decimal."""
    cells = [list(header)] + [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def write(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
