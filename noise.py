"""Noise in the thoughts: perturbations of hidden states, schedules over the latent passes, and how far noisy paths part.

Shapes: B rows of the batch, T positions, D width of the model, K branches, N thoughts of a row.

Everything is drawn and computed in float32. Norms are Euclidean, over the last dimension, position by position.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scales = float | Sequence[float] | Tensor  # one for all rows, or one for each
Generators = torch.Generator | Sequence[torch.Generator] | None

DIRECTIONS = ("same", "opposite")
SCHEDULES = ("none", "constant", "linear", "cosine", "exponential", "adaptive")
DECAYING = ("exponential", "adaptive")
DECAY = 0.5  # lambda of these two
MOMENTUM = 0.9  # of the running mean norm of the adaptive schedule
OVERWHELMING_SNR = 1e-3  # what an snr of 0 or below stands for: noise of 1000 times the signal
SMALLEST_NORM = 1e-12  # denominators of reported ratios are at least this, so that a zero state has finite ones

_ABSOLUTE = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_RELATIVE = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_REMOVING = (0.0, 0.1, 0.2, 0.5, 0.9, 1.0)


def length(states: Tensor) -> Tensor:
    return torch.linalg.vector_norm(states, dim=-1, keepdim=True)


def _orthogonal(hidden: Tensor, draw: Tensor) -> Tensor:
    """The part of the draw at right angles to the hidden state, with length 1."""
    along = F.normalize(hidden, dim=-1)
    across = draw - (draw * along).sum(dim=-1, keepdim=True) * along
    # A draw is of length 1 or so: less than this is rounding, as in one dimension, where nothing is orthogonal.
    return F.normalize(across, dim=-1, eps=1e-5)


class Measured(NamedTuple):
    """What a noise type may report from: the float32 states before, the noise in them, their mean norms, and the scale.

    mean: of values (..., 1) over positions; of each row where each row has a scale of its own.
    """

    signal: Tensor
    noise: Tensor
    signal_norm: Tensor
    noise_norm: Tensor
    scale: Any
    mean: Callable[[Tensor], Tensor]


def _snr_report(found: Measured) -> dict[str, Any]:
    actual = (found.signal_norm / found.noise_norm).where(found.signal_norm > 0, 0.0)
    return {"actual_snr": actual, "signal_power": found.signal_norm, "noise_power": found.noise_norm, "target_snr": found.scale}


def _orthogonality(found: Measured) -> dict[str, Any]:
    return {"orthogonality": found.mean(F.cosine_similarity(found.noise, found.signal, dim=-1).abs()[..., None])}


def _dropout_report(found: Measured) -> dict[str, Any]:
    return {"dropout_prob": found.scale.clamp(max=1) if isinstance(found.scale, Tensor) else min(found.scale, 1.0)}


@dataclass(frozen=True)
class NoiseType:
    """One way of making noise: everything that sets it apart.

    The formula: `add(hidden, scale, draw)` is added to hidden states (..., D), with `draw` from `torch.randn`, `torch.rand`, or
    None. written: the same for a reader, with h the state, s the scale. scales: recommended ones, from the least noise to the
    most. direction: of the published key noise_direction; several rows may share the published name `noise_type`.
    no_noise: the scale that changes nothing. amount: a scale on an axis on which more is more noise. reciprocal: larger scales
    are less noise, and any number is one.
    reports: what its description says besides the norms.

    Its law, for the checks and the figures, with r = |n| / |h| the noise by the state:
    square_ratio(s, mean of 1 / |h|^2, D) is the mean of r^2; cosine(r) is the cosine of noise and state; exact says whether
    "ratio" and "cosine" hold for each draw or over many. relative: noise in a zero state is zero. scale_for(r, q) is the
    scale of a wanted r, with q = |h| / sqrt(D); None where there is none.
    """

    noise_type: str
    add: Callable[[Tensor, Tensor, Any], Tensor]
    draw: Callable[..., Tensor] | None
    scales: tuple[float, ...]
    written: str
    direction: str | None = None
    no_noise: float = 0.0
    amount: Callable[[float], float] = float
    reciprocal: bool = False
    reports: Callable[[Measured], dict[str, Any]] | None = None
    square_ratio: Callable[[float, Any, int], Any] = lambda s, inverse_square, width: s**2
    cosine: Callable[[Any], Any] = lambda ratio: 0 * ratio
    exact: tuple[str, ...] = ()
    relative: bool = True
    scale_for: Callable[[float, float], float | None] = lambda ratio, norm_per_entry: ratio

    @property
    def name(self) -> str:
        """As in condition keys and figures: "gaussian", "targeted-opposite"."""
        return self.noise_type if self.direction is None else f"{self.noise_type}-{self.direction}"


_ROWS = (
    NoiseType(
        "gaussian",
        add=lambda h, s, g: s * g,
        draw=torch.randn,
        scales=_ABSOLUTE,
        written="h + s g",
        square_ratio=lambda s, inverse_square, width: s**2 * width * inverse_square,
        relative=False,
        scale_for=lambda ratio, norm_per_entry: ratio * norm_per_entry,
    ),
    NoiseType(
        "gaussian_scaled",
        add=lambda h, s, g: s * length(h) * F.normalize(g, dim=-1),
        draw=torch.randn,
        scales=_RELATIVE,
        written="h + s ‖h‖ g/‖g‖",
        exact=("ratio",),
    ),
    NoiseType(
        "snr",
        add=lambda h, s, g: length(h) / s.where(s > 0, OVERWHELMING_SNR) * F.normalize(g, dim=-1),
        draw=torch.randn,
        scales=(100.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.01),
        written="h + ‖h‖/s g/‖g‖",
        no_noise=math.inf,
        amount=lambda s: 1 / s if s > 0 else 1 / OVERWHELMING_SNR,
        reciprocal=True,
        reports=_snr_report,
        square_ratio=lambda s, inverse_square, width: (1 / s if s > 0 else math.nan) ** 2,
        exact=("ratio",),
        scale_for=lambda ratio, norm_per_entry: 1 / ratio,
    ),
    NoiseType(
        "orthogonal",
        add=lambda h, s, g: s * length(h) * _orthogonal(h, g),
        draw=torch.randn,
        scales=_RELATIVE,
        written="h + s ‖h‖ p/‖p‖, p ⊥ h",
        reports=_orthogonality,
        exact=("ratio", "cosine"),
    ),
    NoiseType(
        "uniform",
        add=lambda h, s, u: s * (2 * u - 1),
        draw=torch.rand,
        scales=_ABSOLUTE,
        written="h + s (2u - 1)",
        square_ratio=lambda s, inverse_square, width: s**2 * width / 3 * inverse_square,  # the variance of 2u - 1 is 1/3
        relative=False,
        scale_for=lambda ratio, norm_per_entry: ratio * norm_per_entry * math.sqrt(3),
    ),
    NoiseType(
        "dropout",
        add=lambda h, s, u: -h * (u <= s),
        draw=torch.rand,
        scales=_REMOVING,
        written="h where u > s, else 0",
        reports=_dropout_report,
        square_ratio=lambda s, inverse_square, width: min(s, 1.0),
        cosine=lambda ratio: -ratio,
        scale_for=lambda ratio, norm_per_entry: ratio**2 if ratio <= 1 else None,  # it takes away at most the whole state
    ),
    NoiseType(
        "targeted",
        add=lambda h, s, _: s * h,
        draw=None,
        scales=_RELATIVE,
        written="h + s h",
        direction="same",
        cosine=lambda ratio: 0 * ratio + 1,
        exact=("ratio", "cosine"),
    ),
    NoiseType(
        "targeted",
        add=lambda h, s, _: -s * h,
        draw=None,
        scales=_REMOVING,
        written="h - s h",
        direction="opposite",
        cosine=lambda ratio: 0 * ratio - 1,
        exact=("ratio", "cosine"),
    ),
)
NOISES: dict[str, NoiseType] = {row.name: row for row in _ROWS}


def noise_types() -> list[str]:
    """The published names, each once."""
    return list(dict.fromkeys(row.noise_type for row in NOISES.values()))


def noise_rows(noise_type: str, direction: str | None = None) -> list[NoiseType]:
    """The rows of a published name: of its direction, or of all where none is given. ValueError: there is none."""
    rows = [row for row in NOISES.values() if row.noise_type == noise_type]
    if not rows:
        raise ValueError(f"noise_type is {noise_type!r}; it must be one of {', '.join(noise_types())}")
    return [row for row in rows if direction is None or row.direction in (None, direction)]


def find_noise(noise_type: str, direction: str | None = None) -> NoiseType:
    """The row of a published name and direction. ValueError: there is none, or the direction is missing."""
    rows = noise_rows(noise_type, direction)
    if len(rows) != 1 or (direction is not None and direction not in DIRECTIONS):
        raise ValueError(f"noise_direction is {direction!r}; it must be one of {', '.join(DIRECTIONS)}")
    return rows[0]


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
    kind = find_noise(noise_type, noise_direction)
    scale = _scale_per_row(noise_scale, hidden_states)
    signal = hidden_states.float()
    noise = kind.add(signal, scale, None if kind.draw is None else _draw(kind.draw, signal, generator))
    perturbed = torch.where(scale == kind.no_noise, hidden_states, (signal + noise).to(hidden_states.dtype))
    return perturbed, _describe(signal.detach(), perturbed.detach().float(), noise_scale, kind)


def check_noise(noise_scale: Scales, noise_type: str = "gaussian", noise_direction: str | None = None) -> None:
    """Raise ValueError if a type, a direction or a scale is none, naming the valid ones."""
    kind = find_noise(noise_type, noise_direction)
    for scale in torch.as_tensor(noise_scale, dtype=torch.float32).flatten().tolist():
        if kind.reciprocal and math.isnan(scale):
            raise ValueError(f"noise_scale is {scale}; a signal-to-noise ratio must be a number")
        if not kind.reciprocal and not (scale >= 0 and math.isfinite(scale)):
            raise ValueError(f"noise_scale is {scale:g}; it must be finite and not negative")


def _scale_per_row(noise_scale: Scales, hidden_states: Tensor) -> Tensor:
    """The scales as float32, shaped to multiply hidden states (B, ..., D)."""
    scale = torch.as_tensor(noise_scale, dtype=torch.float32).to(hidden_states.device)
    if scale.dim() == 0:
        return scale
    if scale.dim() > 1 or hidden_states.dim() < 2 or len(scale) != len(hidden_states):
        raise ValueError(f"scales of shape {tuple(scale.shape)} for hidden states of shape {tuple(hidden_states.shape)}")
    return scale.view(-1, *(1 for _ in hidden_states.shape[1:]))


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


def _describe(original: Tensor, perturbed: Tensor, noise_scale: Scales, kind: NoiseType) -> dict[str, Any]:
    """The description that `apply_noise_to_hidden_states` returns, from float32 states before and after."""
    by_row = torch.as_tensor(noise_scale).dim() == 1

    def mean(values: Tensor) -> Tensor:
        return values.flatten(1).mean(dim=1) if by_row else values.mean()

    noise = perturbed - original
    signal_norm, noise_norm, perturbed_norm = (mean(length(states)) for states in (original, noise, perturbed))
    floor = signal_norm.clamp(min=SMALLEST_NORM)
    scale = torch.as_tensor(noise_scale, dtype=torch.float64) if by_row else float(noise_scale)  # type: ignore[arg-type]
    further = kind.reports(Measured(original, noise, signal_norm, noise_norm, scale, mean)) if kind.reports else {}
    measured = {
        "original_norm": signal_norm,
        "noise_norm": noise_norm,
        "perturbed_norm": perturbed_norm,
        "norm_change_ratio": perturbed_norm / floor,
        "scale_ratio": noise_norm / floor,
        **{key: value for key, value in further.items() if isinstance(value, Tensor) and value is not scale},
    }
    given = {key: value for key, value in further.items() if key not in measured}
    if not by_row:
        measured = dict(zip(measured, torch.stack([*measured.values()]).tolist(), strict=True))
    if kind.direction is not None:
        given["direction"] = kind.direction
    return {"noise_type": kind.noise_type, "noise_scale": scale, **measured, **given}


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
    """The scale that gives `factor` times the noise: the product; where less noise is a larger scale, the quotient."""
    if not noise_rows(noise_type)[0].reciprocal:
        return noise_scale * factor
    ratio = noise_scale if noise_scale > 0 else OVERWHELMING_SNR
    return ratio / factor if factor > 0 else math.inf


def noise_generator(seed: int, question_index: int, branch: int, latent_pass: int) -> torch.Generator:
    """The source of the noise of one question, branch and latent pass (counted from 1), see `derived_generator`."""
    return derived_generator("noise", seed, question_index, branch, latent_pass)


def dropout_generator(seed: int, question_index: int, branch: int, latent_pass: int) -> torch.Generator:
    """The source of the dropout at a latent, whose pass is counted from 1, see `derived_generator`."""
    return derived_generator("dropout", seed, question_index, branch, latent_pass)


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


# --- dropout in the passes ---


@contextlib.contextmanager
def block_dropout(blocks: Sequence[nn.Module], kept: Tensor) -> Iterator[None]:
    """In it each block adds to the residual stream only what is kept: its output is input + kept * (output - input).

    blocks: L modules that map states (B, T, D), their first argument, to states. kept: (L, B, T, D).
    """

    def weighed(factors: Tensor) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            states, *rest = output if isinstance(output, tuple) else (output,)
            states = given + factors.to(states) * (states - given)
            return (states, *rest) if isinstance(output, tuple) else states

        return hook

    with contextlib.ExitStack() as hooks:
        for block, factors in zip(blocks, kept, strict=True):
            hooks.callback(block.register_forward_hook(weighed(factors), with_kwargs=True).remove)
        yield
