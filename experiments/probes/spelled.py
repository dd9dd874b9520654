"""What does thought k say? The second model that SIM-CoT trains along (`methods.step_supervision`) writes it down."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from experiments.probes.base import Probed, Series, empty
from methods import METHODS, StepDecoder
from systems.weights import STEP_DECODER, add_step_decoder, fill_step_decoder
from thoughts import gather_thoughts

STEPS = 4  # of a question that are looked at


def spelled(probed: Probed) -> Series:
    """For each thought and step whether the one is written from the other, word for word; nothing without a second model."""
    trained, model = probed.model.trained, probed.model
    checkpoint = Path(str(trained.config.load_model_path))
    if not (checkpoint / STEP_DECODER).is_file():
        return {}
    add_step_decoder(model)
    fill_step_decoder(model, checkpoint)
    decoder = cast("StepDecoder", model.step_decoder).eval()
    counted = METHODS[trained.config.method].step_vectors
    vectors = 1 if counted is None else counted(trained.config.curriculum)
    steps = [own[:STEPS] for own in probed.dataset["steps_tokenized"]]
    longest = max((len(step) for own in steps for step in own), default=0) + 1
    found: Series = {}
    for places, batch, thought in probed.batches():
        thoughts = gather_thoughts(probed.think(batch).inputs_embeds, thought)  # (B, N, D)
        for number, own in enumerate(thoughts.split(vectors, dim=1), start=1):
            for place, tokens in zip(places, decoder.write(own, model.embedding, longest).tolist(), strict=True):
                for step, wanted in enumerate(steps[place], start=1):
                    right = tokens[: len(wanted) + 1] == [*wanted, model.eos_token_id]
                    found.setdefault(f"thought {number} writes step {step}", empty(len(steps)))[place] = 100.0 * right
    model.step_decoder = None
    return found
