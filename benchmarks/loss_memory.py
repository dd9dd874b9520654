"""What a loss over many positions takes, with all logits at once and in pieces that the backward pass computes again.

    python benchmarks/loss_memory.py [--batch-size 4096 --bf16]

--batch-size is the number of labelled positions. Their last states are random, and the head is GPT-2's. Variants are the pieces
that the positions are cut into; training does so by itself above `systems.activation_checkpointing.MOST_LOGITS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import median

import common  # first: it makes the repository importable
import torch
from torch import nn

from systems import activation_checkpointing, distributed
from systems.activation_checkpointing import summed_cross_entropy

PIECES = ("1", "4", "16")


def main(argv: Sequence[str]) -> None:
    options = common.parser(__doc__.splitlines()[0], batch_size=4096, repeats=3)
    options.add_argument("--bf16", action="store_true", help="as run.py with this key")
    arguments = options.parse_args(argv)
    memory = {} if arguments.memory_of or arguments.no_memory else common.peak_memories(__file__, argv, PIECES)
    setting, device = common.prepare(arguments)
    head = nn.Linear(setting.n_embd, setting.ordinary_tokens, bias=False, device=device)
    states = torch.randn(arguments.batch_size, setting.n_embd, device=device, requires_grad=True)
    targets = torch.randint(setting.ordinary_tokens, (arguments.batch_size,), device=device)
    before = common.peak_memory(device)
    losses = {}

    def milliseconds(pieces: str) -> float:
        rows = -(-arguments.batch_size // int(pieces))
        activation_checkpointing.MOST_LOGITS = rows * setting.ordinary_tokens
        head.zero_grad()
        start = common.clock(device)
        with distributed.autocast(arguments.bf16, "ddp", device):
            loss = summed_cross_entropy(head, states, targets, setting.ordinary_tokens)
        loss.backward()
        losses[pieces] = loss.item() / arguments.batch_size
        return 1e3 * (common.clock(device) - start)

    if arguments.memory_of:
        milliseconds(arguments.memory_of)
        print(json.dumps({"peak_memory_mib": common.peak_memory(device) - before}))
        return
    variants = {pieces: lambda _, pieces=pieces: milliseconds(pieces) for pieces in PIECES}
    times = common.measure(variants, arguments.warmup, arguments.repeats)
    result = {
        **common.describe(setting, arguments, device),
        "milliseconds": {pieces: median(values) for pieces, values in times.items()},
        "more_memory_mib": memory,
        "losses": losses,
    }
    rows = [[pieces, result["milliseconds"][pieces], memory.get(pieces, "-"), f"{losses[pieces]:.6f}"] for pieces in PIECES]
    print(common.table(["pieces", "forward+backward ms", "more MiB", "loss"], rows))
    common.write(result, arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
