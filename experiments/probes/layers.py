"""Where in the model does a thought come about? Every layer at its position, through the language-model head (logit lens)."""

from __future__ import annotations

import torch
from torch import nn

from experiments.probes.base import Probed, Series, empty
from experiments.probes.decoded import STEPS, finding
from utils import UserError

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm")  # names of the decoder's last norm


def layers(probed: Probed) -> Series:
    """For each thought and layer whether the likeliest token is what one of the question's steps finds, in percent.

    A layer's state goes through the final norm first. Layer 0 is the input embedding.
    """
    tokenizer = probed.evaluator.tokenizer
    ends = [{finding(step, tokenizer) for step in own[:STEPS]} for own in probed.dataset["steps_tokenized"]]
    norm = final_norm(probed.model.decoder)
    found: Series = {}
    for places, states in probed.layers():  # (B, L + 1, N, D)
        lensed = torch.cat([norm(states[:, :-1]), states[:, -1:]], dim=1)  # the last one has been through it
        said = probed.model.project(lensed).argmax(dim=-1).tolist()
        for place, by_layer in zip(places, said, strict=True):
            for layer, tokens in enumerate(by_layer):
                for thought, token in enumerate(tokens):
                    name = f"thought {thought + 1}, layer {layer}"
                    found.setdefault(name, empty(len(ends)))[place] = 100.0 * (token in ends[place])
    return dict(sorted(found.items()))


def final_norm(decoder: nn.Module) -> nn.Module:
    """Raises UserError where it has another name."""
    for holder in (decoder, getattr(decoder, "decoder", None)):  # OPT has its layers in an inner decoder
        for name in NORMS:
            if isinstance(norm := getattr(holder, name, None), nn.Module):
                return norm
    raise UserError(f"layers: the last norm of {type(decoder).__name__} is none of {', '.join(NORMS)}: leave this probe out")
