"""A training method with several sequences and a loss of named parts, added from outside: a small relative of CODI (arXiv 2502.21074)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn import functional as F

from methods import MAIN, METHODS, Batch, Loss, Parts, TokenSequence, Totals, before_answer, sequence


def teacher(parts: Parts) -> dict[str, TokenSequence]:
    """Beside question, thoughts and answer: question, all steps and answer, with loss on the latter."""
    return {"teacher": TokenSequence(parts.question, parts.steps + parts.answer)}


def distillation(model, batch: Batch, totals: Totals) -> Loss:
    """Both cross entropies, and how far the student's state before the answer is from the teacher's."""
    losses, states = {}, {}
    for name in ("teacher", MAIN):
        inputs = sequence(batch, name)
        outputs, details = model(**inputs, labelled_only=True, num_items_in_batch=totals.labels[name], return_details=True)
        losses[name], states[name] = outputs.loss, before_answer(details.hidden, batch, name)
    real = (batch["labels"] >= 0).any(dim=1)  # a row that fills up a batch has no label
    distances = F.l1_loss(states[MAIN], states["teacher"].detach(), reduction="none").mean(dim=1)
    parts = {"student": losses[MAIN], "teacher": losses["teacher"], "distillation": (distances * real).sum() / totals.examples}
    return Loss(sum(parts.values()), parts)


if __name__ == "__main__":
    import run

    METHODS["distilled"] = replace(METHODS["coconut"], label="distilled", loss=distillation, sequences=teacher)
    run.main()
