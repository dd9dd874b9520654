"""How a training step of Coconut grows, and where memory ends.

    python benchmarks/scaling.py [--out results/benchmarks/scaling.json]

Measured here: forward and backward while one size grows and the others stay (GPT-2 with random weights). The law is time ~
size^exponent, fitted on the logarithms; beside it the same exponent of the counted operations, six for a weight and a token and
those of attention over half of the tokens. Where the first is smaller, the machine is not yet busy; thoughts add passes, not
operations, so their exponent is what passes cost.

Computed, not measured: what fits on GPUs of 80 GB, sharded over all of them (FSDP2), for models of the size of GPT-2 and of
Llama 1B, 3B and 8B. A weight takes 16 bytes (float32, gradient, two moments of AdamW) by the number of GPUs, and the largest
block once more, whole in bfloat16; a token's activations take 34 bytes for each unit of width and 6 for each of the inner
width in each layer (bfloat16, without recomputation). Traffic: bytes that a GPU receives for a micro-batch of six thoughts,
when parameters are gathered for each pass, and when they are gathered once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import common  # first: it makes the repository importable
import numpy as np
import torch
from train_step import training_batch

from experiments.race import operations_of_a_token

BASE = common.Setting(n_layer=4, n_embd=128, n_head=4, ordinary_tokens=2000, question_tokens=96, spread=0, dropout=0.0)
GROWN: dict[str, tuple[int, ...]] = {
    "thoughts": (2, 4, 8, 16),
    "question tokens": (64, 128, 256, 512),
    "width": (64, 128, 256, 512),
    "layers": (2, 4, 8, 16),
    "rows": (2, 4, 8, 16),
}
GPU_BYTES, PASSES, TOKENS = 80e9, 8, 400  # six thoughts, and a row of ProsQA


def grown(name: str, size: int, rows: int) -> tuple[common.Setting, int]:
    """The base setting with one size changed, and its rows."""
    changes: dict[str, Callable[[], tuple[common.Setting, int]]] = {
        "thoughts": lambda: (replace(BASE, latents=size), rows),
        "question tokens": lambda: (replace(BASE, question_tokens=size), rows),
        "width": lambda: (replace(BASE, n_embd=size), rows),
        "layers": lambda: (replace(BASE, n_layer=size), rows),
        "rows": lambda: (BASE, size),
    }
    return changes[name]()


def measure(setting: common.Setting, rows: int, device: torch.device, arguments: Any) -> dict[str, float]:
    """Milliseconds of a step, and its counted operations."""
    model = common.random_model(setting, device).train()
    batch = training_batch(setting, rows, device)
    times = []
    for _ in range(arguments.warmup + arguments.repeats):
        begun = common.clock(device)
        model.zero_grad(set_to_none=True)
        model(**batch, labelled_only=True).loss.backward()
        times.append(1e3 * (common.clock(device) - begun))
    tokens, positions = int(batch["attention_mask"].sum()), batch["input_ids"].shape[1]
    operations = tokens * operations_of_a_token(model.base_causallm, positions)
    return {"milliseconds": median(times[arguments.warmup :]), "operations": operations}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of the law values ~ sizes^exponent."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclass(frozen=True)
class Size:
    """A model that is only counted. inner: width of its feed-forward layers."""

    name: str
    parameters: float
    layers: int
    width: int
    inner: int

    def fixed_bytes(self, gpus: int) -> float:
        """Of a GPU, whatever the batch."""
        return 16 * self.parameters / gpus + 2 * self.parameters / self.layers

    def token_bytes(self) -> float:
        return float(self.layers * (34 * self.width + 6 * self.inner))

    def rows(self, gpus: int) -> int:
        """Rows of TOKENS that fit on each GPU; 0 where the model itself does not."""
        return max(0, int((GPU_BYTES - self.fixed_bytes(gpus)) / (TOKENS * self.token_bytes())))

    def received(self, gpus: int, each_pass: bool) -> float:
        """Bytes for a micro-batch: parameters in bfloat16, forward and backward; gradients in float32."""
        times = PASSES if each_pass else 1
        return (2 * 2 + 4) * times * self.parameters * (gpus - 1) / gpus


SIZES = (
    Size("GPT-2 124M", 124e6, 12, 768, 3072),
    Size("Llama 1B", 1.236e9, 16, 2048, 8192),
    Size("Llama 3B", 3.213e9, 28, 3072, 8192),
    Size("Llama 8B", 8.03e9, 32, 4096, 14336),
)


def computed() -> list[list[str]]:
    rows = []
    for size in SIZES:
        for gpus in (1, 8, 64):
            fits = size.rows(gpus)
            traffic = [f"{size.received(gpus, each_pass) / 1e9:.1f}" if gpus > 1 else "" for each_pass in (True, False)]
            room = str(fits) if fits else "none: does not fit"
            rows.append([size.name, str(gpus), f"{size.fixed_bytes(gpus) / 1e9:.1f}", room, *traffic])
    return rows


def main(argv: Sequence[str]) -> None:
    options = common.parser("How a training step grows, and where memory ends.", batch_size=4, repeats=5)
    arguments = options.parse_args(argv)
    _, device = common.prepare(arguments)
    laws, rows = {}, []
    for name, sizes in GROWN.items():
        sizes = sizes[:2] if arguments.tiny else sizes
        found = [measure(*grown(name, size, arguments.batch_size), device, arguments) for size in sizes]
        times, operations = ([one[key] for one in found] for key in ("milliseconds", "operations"))
        laws[name] = {
            "sizes": list(sizes),
            "milliseconds": times,
            "exponent": exponent(sizes, times),
            "operations_exponent": exponent(sizes, operations),
        }
        shown = ", ".join(f"{size}: {time:.0f}" for size, time in zip(sizes, times, strict=True))
        rows.append([name, shown, f"{laws[name]['exponent']:.2f}", f"{laws[name]['operations_exponent']:.2f}"])
    print(common.table(["what grows", "ms", "exponent of time", "of operations"], rows))
    print("\ncomputed, for rows of 400 tokens and six thoughts on GPUs of 80 GB:")
    header = ["model", "GPUs", "GB before any row", "rows each", "GB received, each pass", "once"]
    print(common.table(header, computed()))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {**common.describe(BASE, arguments, device), "laws": laws, "computed": computed()}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
