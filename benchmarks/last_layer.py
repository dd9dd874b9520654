"""What it saves to compute the last layer only at the positions that are read (`systems.last_layer`).

    python benchmarks/last_layer.py [--model configs/gpt2_124m --batch-size 4 --question-tokens 300]

A training step without thoughts and with them (forward, backward and AdamW; no dropout), and answers of 24 tokens: with the
whole last layer and with less of it, in turns. The ratio of two times next to each other counts: its median and range. Losses
(to 1e-4) and tokens must be the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import common  # first: it makes the repository importable
import torch
from train_step import training_batch, without_thoughts
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import Coconut
from systems.last_layer import skip_unread_states
from systems.models import fuse_activations
from systems.weight_gradients import gather_gradients

NEW_TOKENS = 24


def build(path: str, attention: str, setting: common.Setting, device: torch.device) -> Coconut:
    """A model with random weights, as run.py trains it on a CPU, without dropout."""
    config = AutoConfig.from_pretrained(common.ROOT / path)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(device).eval()
    fuse_activations(base)
    model = Coconut(base, setting.latent, setting.start_latent, setting.end_latent, setting.eos)
    skip_unread_states(model)
    gather_gradients(model)
    return model


def actions(model: Coconut, setting: common.Setting, rows: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed; each returns its loss or its tokens."""
    thoughts = training_batch(setting, rows, device)
    plain = without_thoughts(thoughts, setting.latent)
    prompt = [thoughts[key][:, : -setting.answer_tokens] for key in ("input_ids", "attention_mask")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # weights, and so losses, stay

    def step(batch: dict[str, torch.Tensor]) -> float:
        optimizer.zero_grad()
        loss = model(**batch, labelled_only=True).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return {
        "step without thoughts": lambda: step(plain),
        "step with thoughts": lambda: step(thoughts),
        "answers": lambda: model.generate(*prompt, max_new_tokens=NEW_TOKENS).tolist(),
    }


def main(argv: Sequence[str]) -> None:
    options = common.parser(__doc__.splitlines()[0], batch_size=4, repeats=5)
    options.add_argument("--model", default="configs/gpt2_124m", help="directory with the configuration of a model")
    options.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    options.add_argument("--question-tokens", type=int, default=300)
    arguments = options.parse_args(argv)
    setting, device = common.prepare(arguments)
    tokens = arguments.question_tokens
    vocabulary = AutoConfig.from_pretrained(common.ROOT / arguments.model).vocab_size
    setting = common.replace(setting, ordinary_tokens=vocabulary - 3, question_tokens=tokens, spread=tokens // 12)
    model = build(arguments.model, arguments.attention, setting, device)
    less = model.last_layer

    def timed(action: Callable[[], Any], last_layer: Any) -> tuple[float, Any]:
        model.last_layer = last_layer
        start = common.clock(device)
        found = action()
        return 1e3 * (common.clock(device) - start), found

    result: dict[str, Any] = {**common.describe(setting, arguments, device), "milliseconds": {}, "ratios": {}, "found": {}}
    for name, action in actions(model, setting, arguments.batch_size, device).items():
        variants = {"whole": lambda _, action=action: timed(action, None), "less": lambda _, action=action: timed(action, less)}
        measured = common.measure(variants, arguments.warmup, arguments.repeats)
        (whole, expected), (part, found) = (zip(*measured[key], strict=True) for key in variants)
        result["milliseconds"][name] = {"whole": median(whole), "less": median(part)}
        result["ratios"][name] = [one / other for one, other in zip(part, whole, strict=True)]
        result["found"][name] = {"whole": expected[0], "less": found[0]}
    common.write(result, arguments.out)
    rows = [
        [name, *times.values(), f"{median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"]
        for (name, times), ratios in zip(result["milliseconds"].items(), result["ratios"].values(), strict=True)
    ]
    print(common.table(["", "whole ms", "less ms", "less / whole", "range"], rows))
    for name, found in result["found"].items():
        one, other = found.values()
        if one != other and not (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-4)):
            raise SystemExit(f"{name}: not the same with less of the last layer")


if __name__ == "__main__":
    main(sys.argv[1:])
