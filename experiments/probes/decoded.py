"""Thoughts through the language-model head (logit lens): does a thought say the step that it stands for, and in which layer?"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from experiments.plots import save_figure
from experiments.probes.base import Probed, Series, empty, in_order
from utils import UserError

STEPS = 4  # of a question that are looked at
OPERATOR = re.compile(r"<<[^>]*?\d\s*([-+*/])")  # the first one between two numbers of a step such as <<3*4=12>>
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm")  # names of the decoder's last norm
LONGEST = 12  # letters of a token that a cell of the figure shows


def decoded(probed: Probed) -> Series:
    """For each thought and step whether the thought's likeliest token ends that step, in percent.

    What ends a step is its last token with a letter or digit, such as "is a lempus." or "42": what the step finds out.
    """
    tokenizer = probed.evaluator.tokenizer
    ends = _ends(probed)
    most = max(map(len, ends), default=0)
    found = {_name(thought, step): empty(len(ends)) for thought in range(probed.thoughts) for step in range(most)}
    operators = [[OPERATOR.search(step) for step in own[:STEPS]] for own in probed.dataset["steps"]]
    for places, states in probed.states():
        said = probed.model.project(states).argmax(dim=-1).tolist()  # (B, N)
        for place, tokens in zip(places, said, strict=True):
            for thought, token in enumerate(tokens):
                for step, end in enumerate(ends[place]):
                    found[_name(thought, step)][place] = 100.0 * (token == end)
                for step, operator in enumerate(operators[place]):
                    if operator is not None:
                        name = f"thought {thought + 1} says the operator of step {step + 1}"
                        right = str(tokenizer.decode([token])).strip() == operator[1]
                        found.setdefault(name, empty(len(ends)))[place] = 100.0 * right
    return found


def _name(thought: int, step: int) -> str:
    return f"thought {thought + 1} says what step {step + 1} finds"


def _ends(probed: Probed) -> list[list[int | None]]:
    """Of each question's first steps the last token with a letter or digit; None where there is none."""

    def holds_word(token: int) -> bool:
        return any(map(str.isalnum, str(probed.evaluator.tokenizer.decode([token]))))

    steps = probed.dataset["steps_tokenized"]
    return [[next(filter(holds_word, reversed(step)), None) for step in own[:STEPS]] for own in steps]


def layers(probed: Probed) -> Series:
    """For each thought and layer whether the likeliest token is what one of the question's steps finds, in percent.

    A layer's state goes through the final norm first. Layer 0 is the input embedding.
    """
    ends = _ends(probed)
    found: Series = {}
    for places, states in probed.layers():
        said = _through_head(probed, states).argmax(dim=-1).tolist()
        for place, by_layer in zip(places, said, strict=True):
            for layer, tokens in enumerate(by_layer):
                for thought, token in enumerate(tokens) if {*ends[place]} - {None} else ():
                    name = f"thought {thought + 1}, layer {layer}"
                    found.setdefault(name, empty(len(ends)))[place] = 100.0 * (token in ends[place])
    return in_order(found)


def _through_head(probed: Probed, states: Tensor) -> Tensor:
    """Logits (B, L + 1, N, V) of the states of all layers (B, L + 1, N, D)."""
    norm = final_norm(probed.model.decoder)
    return probed.model.project(torch.cat([norm(states[:, :-1]), states[:, -1:]], dim=1))  # the last one has been through it


def final_norm(decoder: nn.Module) -> nn.Module:
    """Raises UserError where it has another name."""
    for holder in (decoder, getattr(decoder, "decoder", None)):  # OPT has its layers in an inner decoder
        for name in NORMS:
            if isinstance(norm := getattr(holder, name, None), nn.Module):
                return norm
    raise UserError(f"layers: the last norm of {type(decoder).__name__} is none of {', '.join(NORMS)}: leave this probe out")


def lens(probed: Probed, path: Path) -> None:
    """Of the first question the likeliest token of every layer at every thought, and its probability."""
    _, states = next(probed.layers())
    best = _through_head(probed, states[:1])[0].float().softmax(dim=-1).max(dim=-1)  # each (L + 1, N)
    count, thoughts = best.indices.shape
    figure, axes = plt.subplots(figsize=(1.5 + 1.3 * thoughts, 1 + 0.45 * count), layout="constrained")
    image = axes.imshow(best.values.cpu(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, tokens in enumerate(best.indices.tolist()):
        for thought, token in enumerate(tokens):
            text = str(probed.evaluator.tokenizer.decode([token]))
            said, colour = text.strip() or repr(text), "white" if best.values[layer, thought] > 0.6 else "black"
            axes.text(thought, layer, said[:LONGEST], ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(thoughts), [f"thought {number + 1}" for number in range(thoughts)])
    axes.set_yticks(range(count), ["embedding", *(f"layer {number + 1}" for number in range(count - 1))])
    axes.set_title(probed.dataset[0]["question"][-60:], fontsize=8)
    figure.colorbar(image, label="probability")
    save_figure(figure, path)
