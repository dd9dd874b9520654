"""Noise in the thoughts: perturbations of hidden states, schedules over the latent passes, and how far noisy paths part.

Shapes: B rows of the batch, T positions, D width of the model, K branches, N thoughts of a row.

Everything is drawn and computed in float32. Norms are Euclidean, over the last dimension, position by position.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Scales = float | Sequence[float] | Tensor  # one for all rows, or one for each
Generators = torch.Generator | Sequence[torch.Generator] | None

DIRECTIONS = ("same", "opposite")
SCHEDULES = ("none", "constant", "linear", "cosine", "exponential", "adaptive")
DECAY = 0.5  # lambda of the exponential and the adaptive schedule
MOMENTUM = 0.9  # of the running mean norm of the adaptive schedule
OVERWHELMING_SNR = 1e-3  # what an snr of 0 or below stands for: noise of 1000 times the signal
SMALLEST_NORM = 1e-12  # denominators of reported ratios are at least this, so that a zero state has finite ones

_ABSOLUTE = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_RELATIVE = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_REMOVING = (0.0, 0.1, 0.2, 0.5, 0.9, 1.0)
RECOMMENDED_SCALES: dict[tuple[str, str | None], tuple[float, ...]] = {  # from the least noise to the most
    ("gaussian", None): _ABSOLUTE,
    ("gaussian_scaled", None): _RELATIVE,
    ("snr", None): (100.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.01),
    ("uniform", None): _ABSOLUTE,
    ("orthogonal", None): _RELATIVE,
    ("targeted", "same"): _RELATIVE,
    ("targeted", "opposite"): _REMOVING,
    ("dropout", None): _REMOVING,
}


def length(states: Tensor) -> Tensor:
    return torch.linalg.vector_norm(states, dim=-1, keepdim=True)


def _orthogonal(hidden: Tensor, draw: Tensor) -> Tensor:
    """The part of the draw at right angles to the hidden state, with length 1."""
    along = F.normalize(hidden, dim=-1)
    across = draw - (draw * along).sum(dim=-1, keepdim=True) * along
    # A draw is of length 1 or so: less than this is rounding, as in one dimension, where nothing is orthogonal.
    return F.normalize(across, dim=-1, eps=1e-5)


Perturbation = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, scale, draw -> what is added to hidden
FROM_NORMAL_DRAW: dict[str, Perturbation] = {
    "gaussian": lambda h, s, g: s * g,
    "gaussian_scaled": lambda h, s, g: s * length(h) * F.normalize(g, dim=-1),
    "snr": lambda h, s, g: length(h) / s.where(s > 0, OVERWHELMING_SNR) * F.normalize(g, dim=-1),
    "orthogonal": lambda h, s, g: s * length(h) * _orthogonal(h, g),
}
FROM_UNIFORM_DRAW: dict[str, Perturbation] = {
    "uniform": lambda h, s, u: s * (2 * u - 1),
    "dropout": lambda h, s, u: -h * (u <= s),
}
NOISE_TYPES = (*FROM_NORMAL_DRAW, *FROM_UNIFORM_DRAW, "targeted")


def apply_noise_to_hidden_states(
    hidden_states: Tensor,
    noise_scale: Scales,
    noise_type: str = "gaussian",
    noise_direction: str | None = None,
    generator: Generators = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Perturb hidden states of any floating dtype; the result has their shape and dtype.

    With h a hidden state, s the scale, g ~ N(0, I), u ~ U[0, 1), this is added to h:
    gaussian s g; gaussian_scaled s |h| g/|g|; snr |h|/s g/|g| (s is signal over noise; infinity is no noise, 0 or less
    overwhelming noise); uniform s (2u - 1); orthogonal s |h| p/|p| with p the part of g at right angles to h;
    targeted s h (direction same) or -s h (opposite); dropout sets h to 0 where u <= s, without rescaling.
    Scale 0 gives h itself, bit for bit (snr: scale infinity).

    Args:
        hidden_states: (..., D).
        noise_scale: one scale, or B of them for hidden states (B, ..., D), one for each row.
        noise_direction: for targeted noise one of `DIRECTIONS`; other types do not use it.
        generator: where the draws come from, torch's global one if None. With B of them row by row: a row then gets
            what it gets alone.

    Returns:
        The perturbed states and a description: noise_type, noise_scale, the mean norms over positions original_norm,
        noise_norm and perturbed_norm, and their ratios norm_change_ratio (perturbed by original) and scale_ratio (noise
        by original). Further: snr has target_snr, actual_snr, signal_power and noise_power (norms), orthogonal has
        orthogonality (mean absolute cosine of noise and signal), targeted has direction, dropout has dropout_prob. The
        noise is measured after the cast. Numbers for one scale; tensors (B,) for B scales.

    Raises:
        ValueError: an unknown type or direction; a negative (but for snr), infinite (but for snr) or undefined scale; a
            number of scales or generators other than B.
    """
    check_noise(noise_scale, noise_type, noise_direction)
    scale = _scale_per_row(noise_scale, hidden_states)
    signal = hidden_states.float()
    noise = _perturbation(signal, scale, noise_type, noise_direction, generator)
    no_noise = scale == (math.inf if noise_type == "snr" else 0)
    perturbed = torch.where(no_noise, hidden_states, (signal + noise).to(hidden_states.dtype))
    info = _describe(signal.detach(), perturbed.detach().float(), noise_scale, noise_type, noise_direction)
    return perturbed, info


def check_noise(noise_scale: Scales, noise_type: str = "gaussian", noise_direction: str | None = None) -> None:
    """Raise ValueError if a type, a direction or a scale is none, naming the valid ones."""
    if noise_type not in NOISE_TYPES:
        raise ValueError(f"noise_type is {noise_type!r}; it must be one of {', '.join(NOISE_TYPES)}")
    if noise_direction not in DIRECTIONS and (noise_direction is not None or noise_type == "targeted"):
        raise ValueError(f"noise_direction is {noise_direction!r}; it must be one of {', '.join(DIRECTIONS)}")
    for scale in torch.as_tensor(noise_scale, dtype=torch.float32).flatten().tolist():
        if noise_type == "snr" and math.isnan(scale):
            raise ValueError(f"noise_scale is {scale}; a signal-to-noise ratio must be a number")
        if noise_type != "snr" and not (scale >= 0 and math.isfinite(scale)):
            raise ValueError(f"noise_scale is {scale:g}; it must be finite and not negative")


def _scale_per_row(noise_scale: Scales, hidden_states: Tensor) -> Tensor:
    """The scales as float32, shaped to multiply hidden states (B, ..., D)."""
    scale = torch.as_tensor(noise_scale, dtype=torch.float32).to(hidden_states.device)
    if scale.dim() == 0:
        return scale
    if scale.dim() > 1 or hidden_states.dim() < 2 or len(scale) != len(hidden_states):
        raise ValueError(f"scales of shape {tuple(scale.shape)} for hidden states of shape {tuple(hidden_states.shape)}")
    return scale.view(-1, *(1 for _ in hidden_states.shape[1:]))


def _perturbation(hidden: Tensor, scale: Tensor, noise_type: str, noise_direction: str | None, generator: Generators) -> Tensor:
    """What a noise type adds to float32 hidden states."""
    if noise_type == "targeted":
        return scale * hidden if noise_direction == "same" else -scale * hidden
    if noise_type in FROM_NORMAL_DRAW:
        return FROM_NORMAL_DRAW[noise_type](hidden, scale, _draw(torch.randn, hidden, generator))
    return FROM_UNIFORM_DRAW[noise_type](hidden, scale, _draw(torch.rand, hidden, generator))


def _draw(distribution: Callable[..., Tensor], like: Tensor, generator: Generators) -> Tensor:
    """Random numbers in the shape of a tensor, from one generator or each row from its own, on the generators' device."""
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return distribution(like.shape, generator=generator, device=device, dtype=torch.float32).to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"{len(generator)} generators for {len(like)} rows")
    shape = (1, *like.shape[1:])
    rows = [distribution(shape, generator=one, device=one.device, dtype=torch.float32) for one in generator]
    return torch.cat(rows).to(like.device)


def _describe(
    original: Tensor,
    perturbed: Tensor,
    noise_scale: Scales,
    noise_type: str,
    noise_direction: str | None,
) -> dict[str, Any]:
    """The description that `apply_noise_to_hidden_states` returns, from float32 states before and after."""
    by_row = torch.as_tensor(noise_scale).dim() == 1

    def mean(values: Tensor) -> Tensor:
        return values.flatten(1).mean(dim=1) if by_row else values.mean()

    noise = perturbed - original
    signal_norm, noise_norm, perturbed_norm = (mean(length(states)) for states in (original, noise, perturbed))
    floor = signal_norm.clamp(min=SMALLEST_NORM)
    measured = {
        "original_norm": signal_norm,
        "noise_norm": noise_norm,
        "perturbed_norm": perturbed_norm,
        "norm_change_ratio": perturbed_norm / floor,
        "scale_ratio": noise_norm / floor,
    }
    if noise_type == "snr":
        actual = (signal_norm / noise_norm).where(signal_norm > 0, 0.0)
        measured |= {"actual_snr": actual, "signal_power": signal_norm, "noise_power": noise_norm}
    if noise_type == "orthogonal":
        measured["orthogonality"] = mean(F.cosine_similarity(noise, original, dim=-1).abs()[..., None])
    if not by_row:
        measured = dict(zip(measured, torch.stack([*measured.values()]).tolist(), strict=True))
    scale = torch.as_tensor(noise_scale, dtype=torch.float64) if by_row else float(noise_scale)  # type: ignore[arg-type]
    given: dict[str, dict[str, Any]] = {
        "snr": {"target_snr": scale},
        "dropout": {"dropout_prob": scale.clamp(max=1) if isinstance(scale, Tensor) else min(scale, 1.0)},
        "targeted": {"direction": noise_direction},
    }
    return {"noise_type": noise_type, "noise_scale": scale, **measured, **given.get(noise_type, {})}


def schedule_factor(schedule: str, step: int, steps: int, norms: Sequence[float] = (), decay: float = DECAY) -> float:
    """The share of its scale that noise keeps in a pass after the first noisy one.

    With t = `step`, counted from 0 at the first pass after the first noisy one, and T = `steps` such passes:
    none 0; constant 1; linear 1 - t/T; cosine (1 + cos(pi t/T))/2; exponential exp(-decay t); adaptive: exponential times
    the thought's norm by the running mean of the norms so far, m(0) = n(0), m(t) = 0.9 m(t-1) + 0.1 n(t).

    Args:
        norms: of the thoughts n(0) ... n(t) before their noise; read by the adaptive schedule alone.

    Raises:
        ValueError: an unknown schedule; a step outside 0 ... T - 1; norms missing.
    """
    check_schedule(schedule)
    if not 0 <= step < steps:
        raise ValueError(f"step is {step}; it must be in 0 ... {steps - 1}")
    if schedule == "adaptive":
        if len(norms) != step + 1:
            raise ValueError(f"{len(norms)} norms for step {step}; the adaptive schedule needs {step + 1}")
        return math.exp(-decay * step) * _by_running_mean(norms)
    factors = {
        "none": 0.0,
        "constant": 1.0,
        "linear": 1 - step / steps,
        "cosine": (1 + math.cos(math.pi * step / steps)) / 2,
        "exponential": math.exp(-decay * step),
    }
    return factors[schedule]


def check_schedule(schedule: str) -> None:
    """Raise ValueError if there is no such schedule, naming the valid ones."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")


def _by_running_mean(norms: Sequence[float]) -> float:
    """The last norm divided by the running mean that already contains it; 1 where all are 0."""
    mean = norms[0]
    for norm in norms[1:]:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * norm
    return norms[-1] / mean if mean > 0 else 1.0


def scheduled_scale(noise_scale: float, factor: float, noise_type: str) -> float:
    """The scale that gives `factor` times the noise: the product; for snr, where less noise is a larger scale, the quotient."""
    if noise_type != "snr":
        return noise_scale * factor
    ratio = noise_scale if noise_scale > 0 else OVERWHELMING_SNR
    return ratio / factor if factor > 0 else math.inf


def noise_generator(seed: int, question_index: int, branch: int, latent_pass: int) -> torch.Generator:
    """The source of the noise of one question, branch and latent pass (counted from 1), see `derived_generator`."""
    return derived_generator("noise", seed, question_index, branch, latent_pass)


def sampling_generator(seed: int, question_index: int, branch: int) -> torch.Generator:
    """The source of the token samples of one question and branch, see `derived_generator`."""
    return derived_generator("sampling", seed, question_index, branch)


def derived_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU that depends on its key alone: not on the batch, the order, the process or the device.

    Its seed is the first 8 bytes, big-endian, of the SHA-256 digest of the key's parts joined by "/". The scale is no part
    of any key, so a sweep perturbs a question in the same direction at every scale. torch's CPU generator keeps the lower
    32 bits of a seed: among millions of keys a few share their numbers.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
