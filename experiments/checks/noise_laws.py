"""What the noise formulas promise, tested on any thoughts: exactly up to rounding, and by statistics.

Shapes: N thoughts, D (at least 3) their width. h is a thought, h' what noise made of it, n = h' - h, s the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from noise import NOISES, Generators, NoiseType, apply_noise_to_hidden_states, derived_generator, find_noise

SMALLEST_P = 1e-4  # a smaller p-value says that the formula does not hold
ARITHMETIC = 1e-5  # relative error that float32 arithmetic is allowed, besides the rounding of the result

Noise = Callable[..., tuple[Tensor, dict[str, Any]]]  # called as `noise.apply_noise_to_hidden_states` is
Source = Callable[[], Generators]  # gives generators that draw the same each time


class NoiseSetting(NamedTuple):
    """One way of making noise; see `noise.apply_noise_to_hidden_states`."""

    noise_type: str
    direction: str | None
    scale: float

    @property
    def name(self) -> str:
        return self.noise_type if self.direction is None else f"{self.noise_type} {self.direction}"

    @property
    def kind(self) -> NoiseType:
        return find_noise(self.noise_type, self.direction)


def recommended_settings() -> list[NoiseSetting]:
    return [NoiseSetting(row.noise_type, row.direction, scale) for row in NOISES.values() for scale in row.scales]


# --- what the formulas give ---


def expected_ratio(setting: NoiseSetting, inverse_square: Any, width: int) -> Any:
    """Root mean square of |n| / |h| over draws, for thoughts with this mean of 1 / |h|² (a number, or an array of them)."""
    return np.sqrt(setting.kind.square_ratio(setting.scale, inverse_square, width))


def expected_norm_change(setting: NoiseSetting, ratio: Any) -> Any:
    """Root mean square of |h'| / |h| over draws, from that of |n| / |h|."""
    return np.sqrt(np.maximum(0, 1 + 2 * setting.kind.cosine(ratio) * ratio + ratio**2))


@np.errstate(all="ignore")
def expected_cosine(setting: NoiseSetting, ratio: Any) -> Any:
    """Cosine of h and h', which many dimensions make the same for almost every draw; 0 where h' is zero."""
    change = expected_norm_change(setting, ratio)
    return np.where(change > 0, (1 + setting.kind.cosine(ratio) * ratio) / change, 0.0)


# --- one check ---


@dataclass
class Check:
    """A test's statistic and p-value; or, of what must hold exactly, the largest deviation by what is allowed."""

    statistic: float
    p_value: float | None = None

    @property
    def passed(self) -> bool:
        return self.statistic <= 1 if self.p_value is None else self.p_value >= SMALLEST_P


def follows(values: Any, distribution: Any) -> Check:
    """Kolmogorov and Smirnov's test of all values against a distribution of scipy.stats."""
    result = stats.kstest(np.ravel(values), distribution.cdf)
    return Check(float(result.statistic), float(result.pvalue))


def has_mean_zero(values: Any) -> Check:
    """Student's test; values that are all the same are compared as they are."""
    if np.ptp(values) == 0:
        return within(values, ARITHMETIC)
    result = stats.ttest_1samp(values, 0.0)
    return Check(float(result.statistic), float(result.pvalue))


def within(deviations: Any, allowed: Any) -> Check:
    """Whether no deviation is larger than allowed; a deviation that is no number is too large."""
    worst = float(np.max(np.abs(deviations) / allowed))
    return Check(worst if math.isfinite(worst) else math.inf)


def none_of(wrong: Any) -> Check:
    """Whether nothing is wrong; the statistic counts what is."""
    count = float(np.count_nonzero(wrong))
    return Check(count + 1 if count else 0.0)


# --- a setting at work ---


@dataclass
class Sample:
    """Thoughts before and after noise, float64 (N, D), of a dtype that rounds by a relative `epsilon`.

    compass: (D,), a direction that has nothing to do with the thoughts.
    """

    setting: NoiseSetting
    hidden: np.ndarray
    perturbed: np.ndarray
    epsilon: float

    def __post_init__(self) -> None:
        self.noise = self.perturbed - self.hidden
        self.size, self.noise_size, self.perturbed_size = (
            np.linalg.norm(states, axis=1) for states in (self.hidden, self.noise, self.perturbed)
        )
        self.ratio = self.noise_size / self.size  # (N,)
        self.change = self.perturbed_size / self.size
        self.width = self.hidden.shape[1]
        generator = derived_generator("compass", self.width)
        self.compass = torch.randn(self.width, generator=generator, dtype=torch.float64).numpy()

    @property
    def rounding(self) -> np.ndarray:
        """(N,): by how much |n| / |h| can be off as h' was rounded, and computed in float32."""
        return self.epsilon * np.maximum(self.change, 1e-3) + ARITHMETIC * np.maximum(self.expected_ratios, 1e-3)

    @property
    def expected_ratios(self) -> np.ndarray:
        """(N,): of every thought."""
        return np.broadcast_to(expected_ratio(self.setting, 1 / self.size**2, self.width), self.size.shape)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of (N, D) with (N, D) or (D,)."""
    return (first * second).sum(axis=-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)


def exact_checks(sample: Sample) -> dict[str, Check]:
    """What holds for every single thought, up to rounding."""
    kind = sample.setting.kind
    checks: dict[str, Check] = {}
    if "ratio" in kind.exact:
        checks["ratio"] = within(sample.ratio - sample.expected_ratios, sample.rounding)
    if "cosine" in kind.exact:
        cosine = kind.cosine(sample.expected_ratios)
        checks["cosine with h"] = within(cosines(sample.noise, sample.hidden) - cosine, sample.rounding / sample.ratio)
        changes = expected_norm_change(sample.setting, sample.expected_ratios)
        checks["norm change"] = within(sample.change - changes, sample.rounding)
    return checks | EXACTLY.get(kind.name, lambda sample: {})(sample)


def statistical_checks(sample: Sample) -> dict[str, Check]:
    """Distributions over all thoughts and coordinates; only where rounding is far below the noise, as in float32."""
    checks = DISTRIBUTIONS.get(sample.setting.kind.name, lambda sample: {})(sample)
    if "cosine" not in sample.setting.kind.exact:
        expected = expected_norm_change(sample.setting, sample.expected_ratios)
        checks["norm change"] = has_mean_zero(sample.change**2 - expected**2)
    return checks


def _on_sphere(dimension: int) -> Any:
    """The law of (1 + x) / 2 for the cosine x of a random direction in so many dimensions with a given one."""
    return stats.beta((dimension - 1) / 2, (dimension - 1) / 2)


def _any_direction(sample: Sample) -> dict[str, Check]:
    law = _on_sphere(sample.width)
    return {
        "direction": follows((1 + cosines(sample.noise, sample.compass)) / 2, law),
        "angle to h": follows((1 + cosines(sample.noise, sample.hidden)) / 2, law),
    }


def _gaussian(sample: Sample) -> dict[str, Check]:
    scale = sample.setting.scale
    return {
        "coordinates": follows(sample.noise / scale, stats.norm),
        "norms": follows(sample.noise_size / scale, stats.chi(sample.width)),
        **_any_direction(sample),
    }


def _any_direction_across(sample: Sample) -> dict[str, Check]:
    """Any direction at right angles to h: measured from the part of the compass that is."""
    along = sample.hidden / sample.size[:, None]
    across = sample.compass - (along @ sample.compass)[:, None] * along
    return {"direction": follows((1 + cosines(sample.noise, across)) / 2, _on_sphere(sample.width - 1))}


def _uniform(sample: Sample) -> dict[str, Check]:
    scale = sample.setting.scale
    return {
        "coordinates": follows(sample.noise, stats.uniform(-scale, 2 * scale)),
        "norms": has_mean_zero((sample.noise_size / scale) ** 2 - sample.width / 3),
        "along h": has_mean_zero((sample.noise * sample.hidden).sum(axis=1) / sample.size / scale),
    }


def _dropout(sample: Sample) -> dict[str, Check]:
    """The number of zeros, and whether they fall on all coordinates alike."""
    probability = min(sample.setting.scale, 1.0)
    there = sample.hidden != 0
    dropped = there & (sample.perturbed == 0)
    zeros = stats.binomtest(int(dropped.sum()), int(there.sum()), probability)
    checks = {"zeros": Check(float(zeros.statistic), float(zeros.pvalue))}
    if probability < 1:
        expected = probability * there.sum(axis=0)  # (D,)
        spread = float(((dropped.sum(axis=0) - expected) ** 2 / (expected * (1 - probability))).sum())
        law = stats.chi2(sample.width)
        checks["spread"] = Check(spread, 2 * float(min(law.sf(spread), law.cdf(spread))))
    return checks


def _in_range(sample: Sample) -> dict[str, Check]:
    allowed = sample.setting.scale * (1 + ARITHMETIC) + sample.epsilon * np.abs(sample.perturbed)
    return {"range": within(sample.noise, allowed)}


def _kept(sample: Sample) -> dict[str, Check]:
    return {"kept": none_of((sample.perturbed != 0) & (sample.perturbed != sample.hidden))}


# What is further known of a type, by its name in `noise.NOISES`; a type that is not here is held against its row alone.
EXACTLY = {"uniform": _in_range, "dropout": _kept}
DISTRIBUTIONS = {
    "gaussian": _gaussian,
    "gaussian_scaled": _any_direction,
    "snr": _any_direction,
    "orthogonal": _any_direction_across,
    "uniform": _uniform,
    "dropout": _dropout,
}

# --- measuring ---

SMALL = 1 / 64  # of the spacing of the numbers near a thought's coordinates


@np.errstate(all="ignore")  # noise that is wrong may divide by zero
def measure(
    hidden: Tensor, setting: NoiseSetting, source: Source, noise: Noise = apply_noise_to_hidden_states
) -> dict[str, Any]:
    """One setting on thoughts (N, D) of float32, float16 or bfloat16, none of them zero: numbers, checks, and `passed`.

    ratio and norm_change are root mean squares over the thoughts of |n| / |h| and |h'| / |h|; cosine is the mean cosine of h
    and h', None where h' is zero. In 16 bits the noise must be what float32 gives on the same thoughts, rounded, and no
    distribution is tested.
    """
    perturbed, info = noise(hidden, setting.scale, setting.noise_type, setting.direction, source())
    epsilon = torch.finfo(hidden.dtype).eps
    sample = Sample(setting, _array(hidden), _array(perturbed), epsilon)
    checks = {"finite": none_of(~np.isfinite(sample.perturbed)), "reported": _reported(sample, info)}
    without = setting.scale == setting.kind.no_noise
    if without:
        checks["identical"] = differing_bits(perturbed, hidden)
    else:
        checks |= exact_checks(sample)
    if hidden.dtype != torch.float32:
        in_float32, _ = noise(hidden.float(), setting.scale, setting.noise_type, setting.direction, source())
        checks["as float32, rounded"] = differing_bits(perturbed, in_float32.to(hidden.dtype))
    elif not without:
        checks |= statistical_checks(sample)
    return _row(sample, checks)


def _array(states: Tensor) -> np.ndarray:
    return states.double().numpy()


def differing_bits(first: Tensor, second: Tensor) -> Check:
    return none_of((first.contiguous().view(torch.uint8) != second.contiguous().view(torch.uint8)).numpy())


def _reported(sample: Sample, info: dict[str, Any]) -> Check:
    """What the description says, against what was measured."""
    sizes = {"original_norm": sample.size, "noise_norm": sample.noise_size, "perturbed_norm": sample.perturbed_size}
    deviations = [info[key] - values.mean() for key, values in sizes.items()]
    return within(np.array(deviations), 1e-4 * np.array([values.mean() + 1e-9 for values in sizes.values()]))


def _row(sample: Sample, checks: dict[str, Check]) -> dict[str, Any]:
    setting = sample.setting
    ratio = float(expected_ratio(setting, (1 / sample.size**2).mean(), sample.width))
    tested = {name: check for name, check in checks.items() if check.p_value is not None}
    lowest = min(tested, key=lambda name: tested[name].p_value or 0.0, default=None)
    alive = sample.perturbed_size > 0
    return {
        **_judged(setting, checks),
        "ratio": float(np.sqrt((sample.ratio**2).mean())),
        "expected_ratio": ratio,
        "cosine": float(cosines(sample.perturbed[alive], sample.hidden[alive]).mean()) if alive.any() else None,
        "expected_cosine": float(np.mean(expected_cosine(setting, sample.expected_ratios))) if alive.any() else None,
        "norm_change": float(np.sqrt((sample.change**2).mean())),
        "expected_norm_change": float(expected_norm_change(setting, ratio)),
        "test": lowest,
        "statistic": tested[lowest].statistic if lowest else None,
        "p_value": tested[lowest].p_value if lowest else None,
    }


def _judged(setting: NoiseSetting, checks: dict[str, Check]) -> dict[str, Any]:
    listed = {name: {**asdict(check), "passed": check.passed} for name, check in checks.items()}
    passed = all(check.passed for check in checks.values())
    return {"name": setting.name, **setting._asdict(), "checks": listed, "passed": passed}


def measure_below_rounding(hidden: Tensor, source: Source, noise: Noise = apply_noise_to_hidden_states) -> dict[str, Any]:
    """Gaussian noise so small that 16 bits lose most of it; `kept` is the share of coordinates that stay as they were."""
    coordinate = hidden.double().square().mean().sqrt().item()
    setting = NoiseSetting("gaussian", None, SMALL * torch.finfo(hidden.dtype).eps * coordinate)
    perturbed, _ = noise(hidden, setting.scale, setting.noise_type, setting.direction, source())
    return {**measure(hidden, setting, source, noise), "kept": float((perturbed == hidden).double().mean())}


def measure_zero(
    width: int, dtype: torch.dtype, setting: NoiseSetting, noise: Noise = apply_noise_to_hidden_states
) -> dict[str, Any]:
    """Thoughts that are zero stay finite, and zero where noise is relative to them."""
    hidden = torch.zeros(4, width, dtype=dtype)
    generator = derived_generator("zero", width)
    perturbed, info = noise(hidden, setting.scale, setting.noise_type, setting.direction, generator)
    numbers = np.array([value for value in info.values() if isinstance(value, float)])
    checks = {"finite": none_of(~np.isfinite([*_array(perturbed).ravel(), *numbers]))}
    if setting.kind.relative:
        checks["still zero"] = none_of(_array(perturbed))
    return _judged(setting, checks)
