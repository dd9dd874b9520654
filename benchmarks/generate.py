"""Time and memory of answering questions: Coconut in batches with a cache, and one by one without.

    python benchmarks/generate.py [--out results/benchmarks/generate.json]

- coconut: all questions in one batch, cached.
- coconut_single: one question at a time, cached.
- naive: one question at a time, every thought and every token recomputes the whole sequence (`tests/naive.py`).

No answer ends early, so all have the same number of tokens; the tokens of the variants are compared. The floor is the time of
the arithmetic alone: the operations of prompt and answer in the layers, and of each new token in the head, at the rate of
matrix products measured in the same run. --profile also shows where the time of a batch goes (torch.profiler, on the CPU), up
to its first new token and in all; what is between the two are passes over one position.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence

import common  # first: it makes the repository importable
import torch
from naive import naive_generate
from profile_step import HOST, KINDS, by_kind
from torch import Tensor

from coconut import Coconut
from experiments.race import matrix_rate, operations_of_a_token
from systems.last_layer import skip_unread_states

VARIANTS = ("coconut", "coconut_single", "naive")


def answers(
    model: Coconut, setting: common.Setting, questions: Sequence[Tensor], new: int, device: torch.device
) -> dict[str, Callable[[int], Tensor]]:
    """How each variant answers: all questions, or the i-th -> its new tokens (questions answered, new)."""
    ids = common.pad_left(questions, 0).to(device)
    mask = common.pad_left([torch.ones_like(question) for question in questions], 0).to(device)
    single = [question[None].to(device) for question in questions]
    return {
        "coconut": lambda _: model.generate(ids, mask, max_new_tokens=new)[:, -new:],
        "coconut_single": lambda i: model.generate(single[i], max_new_tokens=new)[:, -new:],
        "naive": lambda i: naive_generate(model.base_causallm, setting, single[i], new)[:, -new:],
    }


def timed(answer: Callable[[int], Tensor], question: int, device: torch.device) -> tuple[float, Tensor]:
    """Seconds per question, and the new tokens."""
    start = common.clock(device)
    tokens = answer(question)
    return (common.clock(device) - start) / len(tokens), tokens.cpu()


def floor(model: Coconut, questions: Sequence[Tensor], new: int, device: torch.device) -> float:
    """Seconds of the arithmetic of an answer, all layers at all positions; the last token is not read."""
    positions = statistics.mean(map(len, questions)) + new - 1
    layers = positions * operations_of_a_token(model.base_causallm, positions) / 3  # forward alone
    head = new * 2 * model.base_causallm.get_output_embeddings().weight.numel()
    return (layers + head) / matrix_rate(device, torch.float32)


def profiled(
    model: Coconut, setting: common.Setting, questions: Sequence[Tensor], new: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds of a batch by kind of operation, up to its first new token and in all."""

    def by_tokens(tokens: int) -> dict[str, float]:
        batch = answers(model, setting, questions, tokens, device)["coconut"]
        return by_kind(lambda question: 1e3 * len(questions) * timed(batch, question, device)[0])

    return {"first token": by_tokens(1), f"{new} tokens": by_tokens(new)}


def count_differences(measured: dict[str, list[tuple[float, Tensor]]]) -> int:
    """Questions to which two variants gave different tokens."""
    batch = measured["coconut"][0][1]
    different = {
        question
        for name in {"coconut_single", "naive"} & measured.keys()
        for question, (_, tokens) in enumerate(measured[name])
        if not torch.equal(tokens[0], batch[question])
    }
    return len(different)


def report(result: dict) -> str:
    seconds, memory = result["seconds_per_answer"], result["peak_memory_mib"]
    rows = [[name, f"{value:.3f}", memory.get(name, "-")] for name, value in seconds.items()]
    lines = [f"{name}: {value:.2f}" for name, value in result["ratios"].items()]
    lines.append(f"answers compared: {result['answers_compared']}, different: {result['answers_different']}")
    if result["by_kind"]:
        parts = [[name, *kinds.values()] for name, kinds in result["by_kind"].items()]
        lines.append(common.table(["the batch, ms", *KINDS, HOST], parts))
    return "\n".join([common.table(["variant", "s per answer", "peak MiB"], rows), *lines])


def main(argv: Sequence[str]) -> None:
    options = common.parser("Time and memory of answering questions.", batch_size=16, repeats=4)
    options.add_argument("--new-tokens", type=int, default=24)
    options.add_argument("--no-naive", action="store_true", help="leave out the naive variant, which takes most of the time")
    options.add_argument("--profile", action="store_true", help="where the time of a batch goes, by kind of operation")
    arguments = options.parse_args(argv)
    if arguments.repeats > arguments.batch_size:
        options.error("--repeats: each repeat answers another question of the batch, so at most --batch-size")
    variants = [name for name in VARIANTS if name != "naive" or not arguments.no_naive]
    memory = {} if arguments.memory_of or arguments.no_memory else common.peak_memories(__file__, argv, variants)
    setting, device = common.prepare(arguments)
    model = common.random_model(setting, device).eval()
    skip_unread_states(model)  # as run.py and test.py do
    questions = common.random_questions(setting, arguments.batch_size)
    of = answers(model, setting, questions, arguments.new_tokens, device)
    if arguments.memory_of:
        of[arguments.memory_of](max(range(len(questions)), key=lambda i: len(questions[i])))
        print(json.dumps({"peak_memory_mib": common.peak_memory(device)}))
        return
    runs = {name: lambda i, name=name: timed(of[name], i, device) for name in variants}
    measured = common.measure(runs, arguments.warmup, arguments.repeats)
    seconds = {name: statistics.median(time for time, _ in results) for name, results in measured.items()}
    seconds["floor"] = floor(model, questions, arguments.new_tokens, device)
    pairs = [("naive", "coconut"), ("naive", "coconut_single"), ("coconut", "floor"), ("coconut_single", "floor")]
    result = {
        **common.describe(setting, arguments, device),
        "seconds_per_answer": seconds,
        "ratios": {f"{one} / {other}": seconds[one] / seconds[other] for one, other in pairs if one in seconds},
        "peak_memory_mib": memory,
        "answers_compared": arguments.repeats,
        "answers_different": count_differences(measured),
        "by_kind": profiled(model, setting, questions, arguments.new_tokens, device) if arguments.profile else {},
        "all_seconds": {name: [time for time, _ in results] for name, results in measured.items()},
    }
    common.write(result, arguments.out)
    print(report(result))
    if result["answers_different"]:
        raise SystemExit("the variants do not give the same tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
