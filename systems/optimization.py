"""The optimizer, and its learning rate over a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

# What is left of the learning rate, by the share (0 to 1) of the last stage that is done.
LEARNING_RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: (1.0 + math.cos(math.pi * share)) / 2,
}


@dataclass(frozen=True)
class Optimization:
    """The part of a configuration about the optimizer; `RunConfig` explains the keys."""

    lr: float
    lr_schedule: str
    warmup_steps: int
    warmup_share: float
    adam_beta2: float
    weight_decay: float


def new_optimizer(model: nn.Module, config: Optimization) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (0.9, config.adam_beta2)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: Optimization, step: int, steps: int, share: float) -> float:
    """Of a step, counted from 0, of a training of `steps`. share (0 to 1): of the last stage that is done before it."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps, round(config.warmup_share * steps)))
    return config.lr * warm * LEARNING_RATES[config.lr_schedule](share)
