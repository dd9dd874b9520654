"""What a latent pass costs besides the arithmetic: dispatched operations and host time, where no GPU is at hand.

    python benchmarks/overhead.py [--out results/benchmarks/overhead.json]

Operations of a pass over one position are the difference between steps with 7 and with 6 thoughts; those of a bare layer the
difference between models of 8 and of 4 layers; the rest is what masks, positions, caches, the thought map and the frame of
transformers add to each pass. At width 32 arithmetic takes no time: the seconds of a step are those of Python and dispatch.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from typing import Any

import common  # first: it makes the repository importable
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from coconut import Coconut
from systems.models import fuse_activations

START, LATENT, END, EOS, WORDS = 97, 98, 99, 1, 100
LAYERS = (4, 8)
THOUGHTS = (6, 7)


def gpt2(layers: int) -> PreTrainedModel:
    size = {"n_embd": 32, "n_head": 2, "n_positions": 128}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_layer=layers, **size, **drop, bos_token_id=EOS, eos_token_id=EOS))


def llama(layers: int) -> PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_hidden_layers=layers, max_position_embeddings=128, **size))


FAMILIES = {"gpt2": gpt2, "llama": llama}


class Counting(TorchDispatchMode):
    """Counts what is dispatched; views count, as each is a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


def batch(thoughts: int) -> dict[str, torch.Tensor]:
    """Four rows of 40 tokens; loss on what follows the thoughts."""
    ids = torch.randint(2, 90, (4, 40))
    ids[:, 20], ids[:, 21 : 21 + thoughts], ids[:, 21 + thoughts] = START, LATENT, END
    labels = ids.clone()
    labels[:, : 22 + thoughts] = -100
    return {"input_ids": ids, "labels": labels}


def counted(model: Coconut, thoughts: int) -> tuple[int, int]:
    """Operations of a step, forward and backward."""
    inputs = batch(thoughts)
    with Counting() as forward:
        loss = model(**inputs, labelled_only=True).loss
    with Counting() as backward:
        loss.backward()
    return sum(forward.operations.values()), sum(backward.operations.values())


def seconds(model: Coconut, thoughts: int, repeats: int) -> float:
    """Median of a step, forward and backward."""
    inputs = batch(thoughts)
    times = []
    for _ in range(repeats + 1):
        start = common.clock(torch.device("cpu"))
        model(**inputs, labelled_only=True).loss.backward()
        times.append(common.clock(torch.device("cpu")) - start)
    return statistics.median(times[1:])


def main(argv: list[str] | None = None) -> None:
    options = common.parser(__doc__.splitlines()[0], batch_size=4, repeats=30)
    arguments = options.parse_args(argv)
    _, _ = common.prepare(arguments)
    rows, result = [], {}
    for family, build in FAMILIES.items():
        passes, micros = {}, {}
        for layers in LAYERS:
            base = build(layers)
            fuse_activations(base)
            model = Coconut(base, LATENT, START, END, EOS)
            fewer, more = (counted(model, thoughts) for thoughts in THOUGHTS)
            passes[layers] = [one - other for one, other in zip(more, fewer, strict=True)]
            micros[layers] = 1e6 * seconds(model, THOUGHTS[0], arguments.repeats)
        small, large = (passes[layers] for layers in LAYERS)
        layer = [(one - other) / (LAYERS[1] - LAYERS[0]) for one, other in zip(large, small, strict=True)]
        rest = [one - LAYERS[0] * bare for one, bare in zip(small, layer, strict=True)]
        result[family] = {
            "operations_of_a_layer": layer,
            "operations_of_the_rest": rest,
            "microseconds_of_a_step": micros,
        }
        shown = [f"{forward:.0f} + {backward:.0f}" for forward, backward in (layer, rest)]
        rows.append([family, *shown, *(f"{micros[layers]:.0f}" for layers in LAYERS)])
    header = ["", "a layer, forward + backward", "the rest of a pass", *(f"us a step, {layers} layers" for layers in LAYERS)]
    print(common.table(header, rows))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        where = common.machine(torch.device("cpu"))
        arguments.out.write_text(json.dumps({"machine": where, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
