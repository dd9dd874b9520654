"""Time and memory of a training step at the last stage: Coconut, a plain step, and the naive forward.

    python benchmarks/train_step.py [--out results/benchmarks/train_step.json]

- coconut: latent passes with a cache, logits of labelled positions only, as the training loop does it.
- plain: the same tokens without thoughts (every latent replaced by an ordinary token), labelled logits only: what a
  step costs anyway.
- naive: every thought recomputes the whole sequence with full logits (`tests/naive.py`). It keeps the activations of all
  its passes, more than 20 GB for 4 rows, so it takes `--naive-rows` at a time and adds up the gradients.

A step is forward, backward and AdamW. --bf16 and --compile are the keys of run.py of these names. The share of the matrix rate
is that of the plain step's operations (`experiments.race`) and of the rate of matrix products measured in the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence

import common  # first: it makes the repository importable
import torch
from naive import naive_forward
from torch import Tensor

from coconut import IGNORE_INDEX, Coconut
from experiments.race import matrix_rate, operations_of_a_token
from generation import count_positions
from systems import distributed
from systems.distributed import Parallelism

VARIANTS = ("coconut", "plain", "naive")
PARTS = ("step", "forward_backward")


def training_batch(setting: common.Setting, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    """Questions with thoughts and answers, first latents in one column; loss on the answers."""
    questions = common.random_questions(setting, batch_size)
    prompts = common.pad_left(questions, 0)
    real = common.pad_left([torch.ones_like(question) for question in questions], 0)
    answers = torch.randint(setting.ordinary_tokens, (batch_size, setting.answer_tokens))
    mask = torch.cat([real, torch.ones_like(answers)], dim=1)
    batch = {
        "input_ids": torch.cat([prompts, answers], dim=1),
        "attention_mask": mask,
        "labels": torch.cat([torch.full_like(prompts, IGNORE_INDEX), answers], dim=1),
        "position_ids": count_positions(mask),
    }
    return {key: value.to(device) for key, value in batch.items()}


def without_thoughts(batch: dict[str, Tensor], latent: int) -> dict[str, Tensor]:
    """The same batch with an ordinary token in place of every latent."""
    ids = batch["input_ids"]
    return {**batch, "input_ids": ids.masked_fill(ids == latent, 1)}


def losses(
    model: Coconut, setting: common.Setting, batch: dict[str, Tensor], naive_rows: int, bf16: bool = False
) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """How each variant computes its loss: in parts, each of which can be differentiated before the next begins."""
    plain, device = without_thoughts(batch, setting.latent), batch["input_ids"].device

    def loss(inputs: dict[str, Tensor]) -> Iterator[Tensor]:
        with distributed.autocast(bf16, "ddp", device):
            loss = model(**inputs, labelled_only=True).loss
        yield loss

    def naive() -> Iterator[Tensor]:
        rows = len(batch["input_ids"])
        for start in range(0, rows, naive_rows):
            part = {key: value[start : start + naive_rows] for key, value in batch.items()}
            share = len(part["input_ids"]) / rows  # every row has as many labels
            with distributed.autocast(bf16, "ddp", device):
                loss = naive_forward(model.base_causallm, setting, **part)[0]
            yield loss * share

    return {
        "coconut": lambda: loss(batch),
        "plain": lambda: loss(plain),
        "naive": naive,
    }


def training_step(
    parts: Callable[[], Iterator[Tensor]], optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, float]:
    """Milliseconds of one training step, and of its forward and backward."""
    start = common.clock(device)
    optimizer.zero_grad()
    for part in parts():
        part.backward()
    backward = common.clock(device)
    optimizer.step()
    end = common.clock(device)
    return {"step": 1e3 * (end - start), "forward_backward": 1e3 * (backward - start)}


@torch.no_grad()
def loss_difference(model: Coconut, of: dict[str, Callable[[], Iterator[Tensor]]], most: float) -> float:
    """|loss - naive loss| without dropout: is it the same thing that is measured? RuntimeError where it is more than `most`."""
    model.eval()
    difference = abs(sum(of["coconut"]()) - sum(of["naive"]())).item()
    model.train()
    if difference > most:
        raise RuntimeError(f"the loss differs from that of the naive forward by {difference}")
    return difference


def report(result: dict) -> str:
    milliseconds, memory, ratios = result["milliseconds"], result["peak_memory_mib"], result["ratios"]
    header = ["variant", "step ms", "forward+backward ms", "peak MiB"]
    rows = [[name, *(milliseconds[name][part] for part in PARTS), memory.get(name, "-")] for name in milliseconds]
    lines = [
        f"{name}: {value['step']:.2f} (forward and backward {value['forward_backward']:.2f})" for name, value in ratios.items()
    ]
    lines += [f"{name}: {share:.0%} of the matrix rate" for name, share in result["matrix_rate_share"].items()]
    return "\n".join([common.table(header, rows), *lines])


def ratios(milliseconds: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    pairs = {"naive / coconut": ("naive", "coconut"), "coconut / plain": ("coconut", "plain")}
    return {
        name: {part: milliseconds[above][part] / milliseconds[below][part] for part in PARTS}
        for name, (above, below) in pairs.items()
        if above in milliseconds
    }


def rate_shares(
    model: Coconut, batch: dict[str, Tensor], milliseconds: dict[str, dict[str, float]], dtype: torch.dtype
) -> dict[str, float]:
    """The plain step's operations in a second of each variant's step, by the machine's rate in matrix products.

    They are those of all layers at all positions, though the last layer leaves some out (`systems.last_layer`).
    """
    tokens, positions = int(batch["attention_mask"].sum()), batch["input_ids"].shape[1]
    operations = tokens * operations_of_a_token(model.base_causallm, positions)
    rate = matrix_rate(batch["input_ids"].device, dtype)
    return {name: operations / (milliseconds[name]["step"] / 1e3) / rate for name in ("coconut", "plain")}


def main(argv: Sequence[str]) -> None:
    options = common.parser("Time and memory of a training step.", batch_size=4, repeats=5)
    options.add_argument("--bf16", action="store_true", help="compute in bfloat16 from float32 weights")
    options.add_argument("--compile", action="store_true", help="compile the decoder")
    options.add_argument("--naive-rows", type=int, default=1, help="rows the naive forward takes at a time; 0: it is not timed")
    common.add_dropout(options)
    arguments = options.parse_args(argv)
    variants = VARIANTS if arguments.naive_rows else VARIANTS[:-1]
    memory = {} if arguments.memory_of or arguments.no_memory else common.peak_memories(__file__, argv, variants)
    setting, device = common.prepare(arguments)
    model = common.random_model(setting, device).train()
    distributed.wrap(model, Parallelism("coconut", "ddp", "pass", arguments.bf16, False, arguments.compile), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batch = training_batch(setting, arguments.batch_size, device)
    of = losses(model, setting, batch, max(1, arguments.naive_rows), arguments.bf16)
    if arguments.memory_of:
        training_step(of[arguments.memory_of], optimizer, device)
        training_step(of[arguments.memory_of], optimizer, device)  # the second has the optimizer's state beside it
        print(json.dumps({"peak_memory_mib": common.peak_memory(device)}))
        return
    difference = loss_difference(model, of, 0.05 if arguments.bf16 else 1e-3)
    steps = {name: lambda _, name=name: training_step(of[name], optimizer, device) for name in variants}
    measured = common.measure(steps, arguments.warmup, arguments.repeats)
    milliseconds = {name: common.median_by_key(results) for name, results in measured.items()}
    result = {
        **common.describe(setting, arguments, device),
        "tokens_per_row": batch["input_ids"].shape[1],
        "milliseconds": milliseconds,
        "ratios": ratios(milliseconds),
        "matrix_rate_share": rate_shares(model, batch, milliseconds, torch.bfloat16 if arguments.bf16 else torch.float32),
        "peak_memory_mib": memory,
        "loss_difference": difference,
        "all_steps": measured,
    }
    common.write(result, arguments.out)
    print(report(result))


if __name__ == "__main__":
    main(sys.argv[1:])
