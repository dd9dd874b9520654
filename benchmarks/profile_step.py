"""Where the time of a training step goes: matrix products, attention, the optimizer, copies, the rest, and Python.

    python benchmarks/profile_step.py [--bf16] [--out results/benchmarks/profile_step.json]

- plain: the same tokens without thoughts.
- apart: Coconut, each pass with its own gradients of the weights, as autograd has them.
- coconut: with the gradients of all passes in one product (`systems.weight_gradients`), as run.py trains on a CPU.

A step is forward, backward and AdamW. Times of operations are those that torch.profiler counts as their own, on the CPU; host
is what is left of the step's time. Steps are also timed without the profiler, in turns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from statistics import median

import common  # first: it makes the repository importable
import torch
from torch.profiler import ProfilerActivity, profile
from train_step import training_batch, without_thoughts

from coconut import Coconut
from systems import distributed
from systems.distributed import Parallelism
from systems.last_layer import skip_unread_states

KINDS = {  # the first pattern that an operation's name matches
    "optimizer": r"fused_adam|Optimizer",
    "attention": r"scaled_dot_product|softmax|flash_attention",
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|mkldnn_linear)|mkldnn",
    "copies": r"aten::(copy_|cat|clone|contiguous|index|index_put|gather|embedding|fill_|zero_|_to_copy|narrow|slice_backward)",
    "the rest": r"",
}
HOST = "host"


def models(setting: common.Setting, device: torch.device, bf16: bool) -> dict[str, Coconut]:
    """The same model twice."""
    made = {}
    for name, gathered in {"coconut": True, "apart": False}.items():
        torch.manual_seed(0)
        made[name] = common.random_model(setting, device).train()
        if gathered:
            distributed.wrap(made[name], Parallelism("coconut", "ddp", "pass", bf16, False, False), device)
        else:
            skip_unread_states(made[name])  # which the other does too
    return made


def kind_of(operation: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, operation))


def by_kind(step: Callable[[int], float]) -> dict[str, float]:
    """Milliseconds of one step by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = step(0)
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    return {**found, HOST: max(0.0, whole - sum(found.values()))}


def main(argv: Sequence[str]) -> None:
    options = common.parser("Where the time of a training step goes.", batch_size=4, repeats=5)
    options.add_argument("--bf16", action="store_true", help="compute in bfloat16 from float32 weights")
    common.add_dropout(options)
    arguments = options.parse_args(argv)
    setting, device = common.prepare(arguments)
    batch = training_batch(setting, arguments.batch_size, device)
    plain, made = without_thoughts(batch, setting.latent), models(setting, device, arguments.bf16)

    def step_of(model: Coconut, inputs: dict[str, torch.Tensor]) -> Callable[[int], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

        def step(_: int) -> float:
            begun = common.clock(device)
            optimizer.zero_grad()
            with distributed.autocast(arguments.bf16, "ddp", device):
                loss = model(**inputs, labelled_only=True).loss
            loss.backward()
            optimizer.step()
            return 1e3 * (common.clock(device) - begun)

        return step

    taken = {
        "plain": step_of(made["coconut"], plain),
        "apart": step_of(made["apart"], batch),
        "coconut": step_of(made["coconut"], batch),
    }
    measured = common.measure(taken, arguments.warmup, arguments.repeats)
    milliseconds = {name: median(times) for name, times in measured.items()}
    kinds = {name: by_kind(step) for name, step in taken.items()}
    ratios = {f"{name} / plain": milliseconds[name] / milliseconds["plain"] for name in ("apart", "coconut")}
    result = {**common.describe(setting, arguments, device), "milliseconds": milliseconds, "ratios": ratios, "by_kind": kinds}
    common.write({**result, "all_steps": measured}, arguments.out)
    header = ["step, ms", "unprofiled", *KINDS, HOST]
    print(common.table(header, [[name, milliseconds[name], *kinds[name].values()] for name in taken]))
    print("\n".join(f"{name}: {value:.3f}" for name, value in ratios.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
