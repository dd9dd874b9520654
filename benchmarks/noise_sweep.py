"""Time and memory of a noise sweep: all scales, branches and questions in one batch, and branches one by one.

    python benchmarks/noise_sweep.py [--out results/benchmarks/noise_sweep.json]

- batch: `Coconut.generate_with_branching` on all questions, scales and branches at once; a question's branches share the
  cache of its prompt.
- single: the same for one branch of one question at one scale at a time.
- naive: likewise one by one; every thought and every token recomputes the whole sequence (`tests/naive.py`).

single and naive would take hours for a whole sweep: each repeat decodes one branch, another one each time, and what the
sweep would take is estimated from their median. No branch ends early, so all have the same number of tokens. The tokens of
the variants are compared. Without sampling (`--temperature 0`) they must be equal; sampled ones may differ after a draw that
falls on the border of two tokens, as rounding depends on the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import common  # first: it makes the repository importable
import torch
from naive import naive_decode, naive_perturb
from torch import Tensor

from coconut import Coconut
from generation import sample
from noise import noise_generator, sampling_generator
from systems.last_layer import skip_unread_states

VARIANTS = ("batch", "single", "naive")
Timed = tuple[float, Tensor]  # seconds per branch, and the tokens


def place(repeat: int, arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Question, scale and branch, as indices, that a repeat decodes alone."""
    return repeat % arguments.batch_size, repeat % len(arguments.scales), repeat % arguments.branches


def naive_branch(model: Coconut, setting: common.Setting, prompt: Tensor, repeat: int, arguments: argparse.Namespace) -> Tensor:
    """The new tokens (new,) of the repeat's branch."""
    question, scale, branch = place(repeat, arguments)
    perturb = naive_perturb(
        lambda latent_pass: noise_generator(arguments.seed, question, branch, latent_pass),
        arguments.scales[scale],
        setting.latents,
    )
    generators = [sampling_generator(arguments.seed, question, branch)]

    def choose(logits: Tensor) -> int:
        return int(sample(logits[None], arguments.temperature, arguments.top_p, generators))

    decoded = naive_decode(model.base_causallm, setting, prompt, arguments.new_tokens, perturb, choose)
    return decoded.tokens[0, prompt.shape[1] :]


def decoders(
    model: Coconut, setting: common.Setting, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[int], Tensor]]:
    """How each variant decodes: number of the repeat -> tokens (questions, scales, branches, new), single ones (new,)."""
    questions = common.random_questions(setting, arguments.batch_size)
    ids = common.pad_left(questions, 0).to(device)
    mask = common.pad_left([torch.ones_like(question) for question in questions], 0).to(device)
    alone = [question[None].to(device) for question in questions]
    how: dict[str, Any] = {key: getattr(arguments, key) for key in ("temperature", "top_p", "seed")}
    how["max_new_tokens"] = arguments.new_tokens

    def branch_out(prompt: Tensor, mask: Tensor | None = None, **which: Any) -> Tensor:
        return cast("Tensor", model.generate_with_branching(prompt, mask, **which, **how))

    def single(repeat: int) -> Tensor:
        question, scale, _ = place(repeat, arguments)  # branch 0: an only branch has this number, on which its noise depends
        return branch_out(alone[question], num_branches=1, noise_scale=arguments.scales[scale], question_index=[question])[0, 0]

    return {
        "batch": lambda _: branch_out(ids, mask, num_branches=arguments.branches, noise_scale=arguments.scales),
        "single": single,
        "naive": lambda repeat: naive_branch(model, setting, alone[place(repeat, arguments)[0]], repeat, arguments),
    }


def timed(decode: Callable[[int], Tensor], device: torch.device, repeat: int) -> Timed:
    """One repeat of a variant."""
    start = common.clock(device)
    tokens = decode(repeat)
    return (common.clock(device) - start) / tokens[..., 0].numel(), tokens.cpu()


def count_differences(measured: dict[str, list[Timed]], arguments: argparse.Namespace) -> int:
    """Branches decoded alone whose tokens are not those of the batch."""
    batch = measured["batch"][0][1]
    different = 0
    for repeat, ((_, single), (_, naive)) in enumerate(zip(measured["single"], measured["naive"], strict=True)):
        question, scale, branch = place(repeat, arguments)
        different += not torch.equal(single, batch[question, scale, 0])
        different += not torch.equal(naive, batch[question, scale, branch])
    return different


def report(result: dict) -> str:
    seconds, sweep, memory = (result[key] for key in ("seconds_per_branch", "seconds_per_sweep", "peak_memory_mib"))
    rows = [[name, f"{seconds[name]:.3f}", sweep[name], memory.get(name, "-")] for name in VARIANTS]
    measured, branches = result["arguments"]["repeats"], result["branches_per_sweep"]
    return "\n".join(
        [
            common.table(["variant", "s per branch", "s per sweep", "peak MiB"], rows),
            f"single and naive: {measured} of {branches} branches were decoded; their sweeps are estimated from the median",
            *(f"{name}: {value:.2f}" for name, value in result["ratios"].items()),
            f"branches compared: {result['branches_compared']}, different: {result['branches_different']}",
        ]
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = common.parser("Time and memory of a noise sweep.", batch_size=4, repeats=2)
    options.set_defaults(warmup=0)  # a repeat takes more than a hundred passes: what only its first one waits for is little
    options.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.5, 1.0], help="of gaussian noise")
    options.add_argument("--branches", type=int, default=5, help="of each question at each scale")
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--temperature", type=float, default=0.8)
    options.add_argument("--top-p", type=float, default=0.95)
    return options.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    memory = {} if arguments.memory_of or arguments.no_memory else common.peak_memories(__file__, argv, VARIANTS[:1])
    setting, device = common.prepare(arguments)
    model = common.random_model(setting, device).eval()
    skip_unread_states(model)  # as test.py does
    of = decoders(model, setting, arguments, device)
    if arguments.memory_of:
        of[arguments.memory_of](0)
        print(json.dumps({"peak_memory_mib": common.peak_memory(device)}))
        return
    runs: dict[str, Callable[[int], Timed]] = {name: partial(timed, of[name], device) for name in VARIANTS}
    measured = common.measure(runs, arguments.warmup, arguments.repeats)
    seconds = {name: statistics.median(time for time, _ in results) for name, results in measured.items()}
    branches = arguments.batch_size * len(arguments.scales) * arguments.branches
    result = {
        **common.describe(setting, arguments, device),
        "branches_per_sweep": branches,
        "seconds_per_branch": seconds,
        "seconds_per_sweep": {name: value * branches for name, value in seconds.items()},
        "ratios": {f"naive / {name}": seconds["naive"] / seconds[name] for name in ("batch", "single")},
        "peak_memory_mib": memory,
        "branches_compared": 2 * arguments.repeats,
        "branches_different": count_differences(measured, arguments),
        "all_seconds": {name: [time for time, _ in results] for name, results in measured.items()},
    }
    common.write(result, arguments.out)
    print(report(result))
    if result["branches_different"] and not arguments.temperature:
        raise SystemExit("the variants do not give the same tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
