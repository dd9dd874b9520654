"""How a training step grows, and where memory ends.

    python benchmarks/scaling.py [--out results/benchmarks/scaling.json]

Measured here: forward and backward while one size grows and the others stay (GPT-2 with random weights), and a whole step of
GPT-2 124M on several processes (DDP, each with as many rows). The law is time ~ size^exponent, fitted on the logarithms; beside
it the same exponent of the counted operations, six for a weight and a token and those of attention over half of the tokens, and
of the bytes that the forward pass keeps for the backward pass. Where the exponent of time is smaller than that of operations,
the machine is not yet busy; thoughts add passes, not operations, so their exponent is what passes cost.

Counted, not measured: what fits on GPUs of 80 GB, sharded over all of them (FSDP2), for GPT-2 and models of the shapes of Llama
1B, 3B and 8B. A weight takes 16 bytes (float32, gradient, two moments of AdamW) by the number of GPUs, and the largest block
once more, whole in bfloat16. What a token takes is counted on layers of that shape in bfloat16, without recomputation, with
tensors that have shapes and no memory (FakeTensorMode). Traffic: bytes that a GPU receives for a micro-batch of six thoughts,
when parameters are gathered for each pass, and when they are gathered once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import common  # first: it makes the repository importable
import numpy as np
import torch
from sharded_step import run_variant
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from train_step import training_batch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from experiments.race import operations_of_a_token

BASE = common.Setting(n_layer=4, n_embd=128, n_head=4, ordinary_tokens=2000, question_tokens=96, spread=0, dropout=0.0)
GROWN: dict[str, tuple[int, ...]] = {
    "thoughts": (2, 4, 8, 16),
    "question tokens": (64, 128, 256, 512),
    "width": (64, 128, 256, 512),
    "layers": (2, 4, 8, 16),
    "rows": (2, 4, 8, 16),
}
PROCESSES = (1, 2)
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


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Of the memory that autograd keeps for the backward pass, without that of the parameters."""
    kept, own = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def measure(setting: common.Setting, rows: int, device: torch.device, arguments: Any) -> dict[str, float]:
    """Milliseconds of a step, its counted operations, and the bytes it keeps."""
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
    kept = kept_bytes(model, lambda: model(**batch, labelled_only=True))
    return {"milliseconds": median(times[arguments.warmup :]), "operations": operations, "kept": kept}


def measure_processes(processes: int, arguments: Any) -> float:
    """Milliseconds of a step of each of so many processes."""
    options = ["--micro-batches", "1", "--batch-size", str(arguments.batch_size), "--repeats", str(arguments.repeats)]
    return run_variant("ddp", [*options, *(["--tiny"] if arguments.tiny else [])], processes)["milliseconds"]


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of the law values ~ sizes^exponent."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclass(frozen=True)
class Size:
    """A model that is only counted: none of its tensors has memory."""

    name: str
    config: PretrainedConfig

    @cached_property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(self.config).parameters())

    def fixed_bytes(self, gpus: int) -> float:
        """Of a GPU, whatever the batch."""
        return 16 * self.parameters / gpus + 2 * self.parameters / self.config.num_hidden_layers

    @cached_property
    def row_bytes(self) -> int:
        """Of a row of TOKENS: those of a layer, as two layers and two rows keep more than one, by the number of layers."""
        return self.config.num_hidden_layers * sum(
            sign * self._kept(layers, rows) for sign, layers, rows in ((1, 2, 2), (-1, 1, 2), (-1, 2, 1), (1, 1, 1))
        )

    def _kept(self, layers: int, rows: int) -> int:
        config = type(self.config).from_dict({**self.config.to_dict(), "num_hidden_layers": layers, "n_layer": layers})
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
            ids = torch.zeros(rows, TOKENS, dtype=torch.long)
            return kept_bytes(model, lambda: model.base_model(input_ids=ids, use_cache=False))

    def rows(self, gpus: int) -> int:
        """Rows of TOKENS that fit on each GPU; 0 where the model itself does not."""
        return max(0, int((GPU_BYTES - self.fixed_bytes(gpus)) / self.row_bytes))

    def received(self, gpus: int, each_pass: bool) -> float:
        """Bytes for a micro-batch: parameters in bfloat16, forward and backward; gradients in float32."""
        times = PASSES if each_pass else 1
        return (2 * 2 + 4) * times * self.parameters * (gpus - 1) / gpus


def llama(layers: int, width: int, inner: int, heads: int, tied: bool = True) -> LlamaConfig:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
    return LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=tied)


SIZES = (
    Size("GPT-2 124M", GPT2Config(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)),
    Size("Llama 1B", llama(16, 2048, 8192, 32)),
    Size("Llama 3B", llama(28, 3072, 8192, 24)),
    Size("Llama 8B", llama(32, 4096, 14336, 32, tied=False)),
)


def counted() -> list[list[str]]:
    rows = []
    for size in SIZES:
        for gpus in (1, 8, 64):
            fits = size.rows(gpus)
            traffic = [f"{size.received(gpus, each_pass) / 1e9:.1f}" if gpus > 1 else "" for each_pass in (True, False)]
            room = str(fits) if fits else "none: does not fit"
            row = f"{size.row_bytes / 1e9:.2f}"
            rows.append([size.name, str(gpus), f"{size.fixed_bytes(gpus) / 1e9:.1f}", row, room, *traffic])
    return rows


def law(sizes: Sequence[int], found: Sequence[dict[str, float]]) -> dict[str, Any]:
    exponents = {f"{key}_exponent": exponent(sizes, [one[key] for one in found]) for key in found[0]}
    return {"sizes": list(sizes), "milliseconds": [one["milliseconds"] for one in found], **exponents}


def main(argv: Sequence[str]) -> None:
    options = common.parser("How a training step grows, and where memory ends.", batch_size=4, repeats=5)
    arguments = options.parse_args(argv)
    _, device = common.prepare(arguments)
    laws = {}
    for name, sizes in GROWN.items():
        sizes = sizes[:2] if arguments.tiny else sizes
        laws[name] = law(sizes, [measure(*grown(name, size, arguments.batch_size), device, arguments) for size in sizes])
    laws["processes"] = law(PROCESSES, [{"milliseconds": measure_processes(size, arguments)} for size in PROCESSES])
    rows = []
    for name, one in laws.items():
        shown = ", ".join(f"{size}: {time:.0f}" for size, time in zip(one["sizes"], one["milliseconds"], strict=True))
        exponents = (one.get(f"{key}_exponent") for key in ("milliseconds", "operations", "kept"))
        rows.append([name, shown, *("" if value is None else f"{value:.2f}" for value in exponents)])
    print(common.table(["what grows", "ms", "exponent of time", "of operations", "of bytes kept"], rows))
    print("\ncounted, for rows of 400 tokens and six thoughts on GPUs of 80 GB:")
    header = ["model", "GPUs", "GB before any row", "GB a row", "rows each", "GB received, each pass", "once"]
    print(common.table(header, counted()))
    common.write({**common.describe(BASE, arguments, device), "laws": laws, "counted": counted()}, arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
