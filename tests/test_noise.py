"""Noise: every formula, by statistics and exactly, and noise in the thoughts of a model against the naive reference."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import fill_thoughts, last_state, naive_decode, naive_diversity, naive_map, naive_noise, naive_perturb, naive_sampler
from scipy import stats
from test_coconut import LAYOUTS, PROMPTS, alone, build, draw, mapped, seeded, wrap
from tiny_models import IDS, assert_near, near, tiny_model
from torch.testing import assert_close

from generation import MAX_N_LATENT, insert_latents
from noise import (
    NOISES,
    SCHEDULES,
    apply_noise_to_hidden_states,
    noise_generator,
    noise_types,
    sampling_generator,
    schedule_factor,
    scheduled_scale,
)
from thoughts import Intervention, Noise, ThoughtInterventions, path_diversity

NOISE_TYPES = noise_types()
KINDS = [*itertools.product(sorted(set(NOISE_TYPES) - {"targeted"}), [None]), ("targeted", "same"), ("targeted", "opposite")]
RECOMMENDED_SCALES = {(row.noise_type, row.direction): row.scales for row in NOISES.values()}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=generator(seed))).to(dtype)


def added(hidden: torch.Tensor, scale: float, noise_type: str, direction: str | None = None) -> torch.Tensor:
    return apply_noise_to_hidden_states(hidden, scale, noise_type, direction, generator())[0] - hidden


# --- the formulas ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("noise_type", "direction"), KINDS)
def test_formula(noise_type, direction, dtype):
    """Any vector of any shape gets what the definition says."""
    hidden = states(48, dtype=dtype)
    expected = naive_noise(hidden, 0.3, noise_type, direction, generator())
    for shape in [(48,), (1, 48), (1, 1, 48)]:
        perturbed, _ = apply_noise_to_hidden_states(hidden.view(shape), 0.3, noise_type, direction, generator())
        assert perturbed.dtype == dtype
        # float64 states are computed in float32 too
        assert_close(perturbed.view(48), expected, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-5)


def test_gaussian_is_normal():
    noise = added(states(40, 50, 8), 0.7, "gaussian")
    assert stats.kstest(noise.flatten().numpy() / 0.7, "norm").pvalue > 0.01


def test_uniform_is_uniform():
    noise = added(states(40, 50, 8), 0.7, "uniform")
    assert stats.kstest(noise.flatten().numpy(), stats.uniform(-0.7, 1.4).cdf).pvalue > 0.01


@pytest.mark.parametrize(("noise_type", "size"), [("gaussian_scaled", 0.7), ("snr", 1 / 0.7)])
def test_relative_noise_has_its_norm_and_any_direction(noise_type, size):
    hidden = states(40, 50, 8)
    noise = added(hidden, 0.7, noise_type)
    assert_close(noise.norm(dim=-1), size * hidden.norm(dim=-1), rtol=1e-5, atol=1e-5)
    # A coordinate of a random unit vector in d dimensions: (1 + x)/2 is Beta((d-1)/2, (d-1)/2).
    cosine = (noise * hidden).sum(dim=-1) / noise.norm(dim=-1) / hidden.norm(dim=-1)
    assert stats.kstest((1 + cosine.flatten().numpy()) / 2, stats.beta(3.5, 3.5).cdf).pvalue > 0.01


def test_orthogonal_noise_has_any_direction_across():
    hidden = states(40, 50, 8)
    noise = added(hidden, 0.7, "orthogonal")
    assert_close(noise.norm(dim=-1), 0.7 * hidden.norm(dim=-1), rtol=1e-5, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(noise, hidden, dim=-1)
    assert cosine.abs().max() < 1e-5
    other = states(8, seed=9)
    other = other - (hidden @ other)[..., None] / hidden.pow(2).sum(dim=-1, keepdim=True) * hidden
    across = torch.nn.functional.cosine_similarity(noise, other, dim=-1)
    assert stats.kstest((1 + across.flatten().numpy()) / 2, stats.beta(3, 3).cdf).pvalue > 0.01


def test_nothing_is_orthogonal_in_one_dimension():
    assert added(states(100, 1), 1.0, "orthogonal").abs().max() < 1e-3


def test_targeted():
    hidden = states(5, 8)
    assert_close(apply_noise_to_hidden_states(hidden, 0.5, "targeted", "same")[0], 1.5 * hidden)
    assert_close(apply_noise_to_hidden_states(hidden, 0.5, "targeted", "opposite")[0], 0.5 * hidden)
    assert apply_noise_to_hidden_states(hidden, 1.0, "targeted", "opposite")[0].abs().max() == 0


@pytest.mark.parametrize(("scale", "probability"), [(0.2, 0.2), (0.9, 0.9), (1.0, 1.0), (5.0, 1.0)])
def test_dropout(scale, probability):
    hidden = states(40, 50, 8)
    perturbed, info = apply_noise_to_hidden_states(hidden, scale, "dropout", generator=generator())
    dropped = perturbed == 0
    assert torch.equal(perturbed[~dropped], hidden[~dropped])  # not rescaled
    assert stats.binomtest(int(dropped.sum()), dropped.numel(), probability).pvalue > 0.01
    assert info["dropout_prob"] == probability


# --- the edges ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("noise_type", "direction"), KINDS)
def test_no_noise_is_bit_identical(noise_type, direction, dtype):
    hidden = states(3, 8, dtype=dtype)
    hidden[0, :4] = torch.tensor([0.0, -0.0, math.nan, math.inf])
    none = math.inf if noise_type == "snr" else 0.0
    for scale in (none, torch.tensor([none, none, none]), [none, 1.0, none]):
        perturbed, _ = apply_noise_to_hidden_states(hidden, scale, noise_type, direction, generator())
        clean = perturbed[[0, 2]].view(torch.uint8), hidden[[0, 2]].view(torch.uint8)
        assert torch.equal(*clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("noise_type", "direction"), KINDS)
def test_a_zero_state_stays_finite(noise_type, direction, dtype):
    tiny = torch.full((1, 8), torch.finfo(dtype).tiny, dtype=dtype)
    for scale in (0.0, 1e-3, 1.0, 10.0):
        for hidden in (torch.zeros(2, 3, 8, dtype=dtype), tiny, tiny * 1e-2):
            perturbed, info = apply_noise_to_hidden_states(hidden, scale, noise_type, direction, generator())
            assert perturbed.isfinite().all()
            assert all(math.isfinite(value) for value in info.values() if isinstance(value, float))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -1.0, -math.inf])
def test_snr_of_nothing_is_overwhelming(scale, dtype):
    hidden = states(2, 3, 64, dtype=dtype)
    perturbed, info = apply_noise_to_hidden_states(hidden, scale, "snr", generator=generator())
    assert perturbed.isfinite().all()
    noise = (perturbed.double() - hidden.double()).norm(dim=-1)
    assert (noise >= 10 * hidden.double().norm(dim=-1)).all()
    assert info["target_snr"] == scale
    assert info["actual_snr"] <= 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_type": "gausian"}, "noise_type is 'gausian'; it must be one of gaussian, gaussian_scaled, snr, orthogonal"),
        ({"noise_type": "targeted"}, "noise_direction is None; it must be one of same, opposite"),
        ({"noise_type": "targeted", "noise_direction": "up"}, "noise_direction is 'up'; it must be one of same, opposite"),
        ({"noise_direction": "up"}, "noise_direction is 'up'; it must be one of same, opposite"),
        ({"noise_scale": -0.1}, r"noise_scale is -0\.1; it must be finite and not negative"),
        ({"noise_scale": [0.1, -0.1]}, r"noise_scale is -0\.1"),
        ({"noise_scale": math.inf, "noise_type": "uniform"}, "noise_scale is inf; it must be finite"),
        ({"noise_scale": math.nan}, "noise_scale is nan; it must be finite"),
        ({"noise_scale": math.nan, "noise_type": "snr"}, "noise_scale is nan; a signal-to-noise ratio must be a number"),
        ({"noise_scale": [0.1, 0.2, 0.3]}, r"scales of shape \(3,\) for hidden states of shape \(2, 8\)"),
        ({"generator": seeded(0, 1, 2)}, "3 generators for 2 rows"),
    ],
    ids=lambda value: str(value).split(" object at")[0],  # an address differs in each worker
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        apply_noise_to_hidden_states(**{"hidden_states": states(2, 8), "noise_scale": 0.1, **arguments})


@pytest.mark.parametrize("noise_type", sorted(set(NOISE_TYPES) - {"snr"}))
def test_refuses_negative_scales_of_every_type_but_snr(noise_type):
    with pytest.raises(ValueError, match="noise_scale is -1"):
        apply_noise_to_hidden_states(states(2, 8), -1, noise_type, "same")


# --- the description ---

ALWAYS = {
    "noise_type", "noise_scale", "original_norm", "noise_norm", "perturbed_norm", "norm_change_ratio", "scale_ratio",
}  # fmt: skip
FURTHER = {
    "snr": {"target_snr", "actual_snr", "signal_power", "noise_power"},
    "orthogonal": {"orthogonality"},
    "targeted": {"direction"},
    "dropout": {"dropout_prob"},
}


@pytest.mark.parametrize(("noise_type", "direction"), KINDS)
def test_info(noise_type, direction):
    hidden = states(2, 5, 16)
    perturbed, info = apply_noise_to_hidden_states(hidden, 0.4, noise_type, direction, generator())
    assert info.keys() == ALWAYS | FURTHER.get(noise_type, set())
    signal, noise, after = (x.norm(dim=-1).mean().item() for x in (hidden, perturbed - hidden, perturbed))
    expected = {
        "noise_type": noise_type, "noise_scale": 0.4, "original_norm": signal, "noise_norm": noise, "perturbed_norm": after,
        "norm_change_ratio": after / signal, "scale_ratio": noise / signal, "target_snr": 0.4, "actual_snr": signal / noise,
        "signal_power": signal, "noise_power": noise, "direction": direction, "dropout_prob": 0.4, "orthogonality": 0.0,
    }  # fmt: skip
    for key, value in info.items():
        assert value == (pytest.approx(expected[key], rel=1e-5, abs=1e-6) if isinstance(value, float) else expected[key])
    if noise_type == "snr":
        assert info["actual_snr"] == pytest.approx(0.4, rel=1e-5)


def test_orthogonality_does_not_cancel_out():
    """Cosines of both signs do not average to a small number: what a coarse dtype does to the angle is seen."""
    info = apply_noise_to_hidden_states(states(64, 16, dtype=torch.bfloat16), 0.01, "orthogonal", generator=generator())[1]
    assert info["orthogonality"] > 1e-3


def test_info_reports_what_was_fed_back():
    """Noise that bfloat16 rounds away is not reported."""
    info = apply_noise_to_hidden_states(torch.full((4, 8), 100.0, dtype=torch.bfloat16), 1e-3, generator=generator())[1]
    assert info["noise_norm"] == 0


# --- rows ---

SCALES = st.floats(0, 10, width=32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    scales=st.lists(SCALES, min_size=1, max_size=5),
    inner=st.lists(st.integers(1, 3), max_size=2),
    width=st.integers(2, 33),
    size=st.floats(0, 30),
    seed=st.integers(0, 2**40),
)
def test_rows_are_independent(kind, dtype, scales, inner, width, size, seed):
    """A batch with a scale and a generator for each row: same shape and dtype, finite, and row by row the same bits."""
    hidden = (size * states(len(scales), *inner, width, seed=seed)).clamp(-50, 50).to(dtype)
    if dtype == torch.float16 and kind[0] == "snr":
        scales = [max(scale, 0.05) for scale in scales]  # 1000 times a signal can be more than float16 holds
    generators = [noise_generator(seed, row, 0, 1) for row in range(len(scales))]
    perturbed, info = apply_noise_to_hidden_states(hidden, torch.tensor(scales), *kind, generators)
    assert perturbed.shape == hidden.shape
    assert perturbed.dtype == dtype
    assert perturbed.isfinite().all()
    for row, scale in enumerate(scales):
        one, alone = apply_noise_to_hidden_states(hidden[row : row + 1], scale, *kind, noise_generator(seed, row, 0, 1))
        assert torch.equal(perturbed[row : row + 1], one)
        assert alone.keys() == info.keys()
        for key, value in alone.items():
            assert value == pytest.approx(info[key][row].item(), rel=1e-5) if isinstance(value, float) else value == info[key]


def test_gradients_go_through():
    hidden = states(3, 8).requires_grad_()
    for noise_type, direction in KINDS:
        perturbed, _ = apply_noise_to_hidden_states(hidden, 0.5, noise_type, direction, generator())
        (gradient,) = torch.autograd.grad(perturbed.sum(), hidden)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    apply_noise_to_hidden_states(states(3, 8), 1.0, generator=generator())
    noise_generator(1, 2, 3, 4)
    assert torch.equal(torch.get_rng_state(), before)


# --- generators ---


def test_derived_generators_are_as_documented():
    """Recorded results can be repeated only as long as this stays."""
    seed = int.from_bytes(hashlib.sha256(b"noise/7/11/2/3").digest()[:8], "big")
    assert noise_generator(7, 11, 2, 3).initial_seed() == seed
    seed = int.from_bytes(hashlib.sha256(b"sampling/7/11/2").digest()[:8], "big")
    assert sampling_generator(7, 11, 2).initial_seed() == seed


def test_derived_generators_differ():
    keys = [*itertools.product(range(3), range(12), range(3), range(1, 4))]
    sources = [noise_generator(*key) for key in keys] + [sampling_generator(*key) for key in {key[:3] for key in keys}]
    draws = {torch.rand(2, generator=source).tolist()[0] for source in sources}
    assert len(draws) == len(sources)


# --- schedules ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", [0, 0, 0, 0]),
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.8535534, 0.5, 0.1464466]),
        ("exponential", [1, 0.6065307, 0.3678794, 0.2231302]),
        # Norms 2, 4, 1, 3: means 2, 2.2, 2.08, 2.172.
        ("adaptive", [1, 0.6065307 * 4 / 2.2, 0.3678794 / 2.08, 0.2231302 * 3 / 2.172]),
    ],
)
def test_schedule(schedule, expected):
    norms = [2.0, 4.0, 1.0, 3.0]
    factors = [schedule_factor(schedule, step, 4, norms[: step + 1]) for step in range(4)]
    assert factors == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("noise_type", "scale"), [*itertools.product(NOISE_TYPES, [2.0, 0.01, 0.0]), ("snr", -1.0)])
@pytest.mark.parametrize("schedule", ["none", "linear", "cosine", "exponential"])
def test_schedules_make_the_noise_shrink(schedule, noise_type, scale):
    hidden, sizes = states(4, 256), []
    for factor in [1.0] + [schedule_factor(schedule, step, 4) for step in range(4)]:
        scaled = scheduled_scale(scale, factor, noise_type)
        sizes.append(apply_noise_to_hidden_states(hidden, scaled, noise_type, "same", generator())[1]["noise_norm"])
    if scale > 0 or noise_type == "snr":
        if not (noise_type == "dropout" and scale == 2.0):  # half of a clipped probability may be clipped too
            assert sizes[-1] < 0.5 * sizes[0]
        assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    else:
        assert sizes == [0.0] * 5


def test_adaptive_schedule_of_zero_thoughts():
    assert schedule_factor("adaptive", 1, 2, [0.0, 0.0]) == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quadratic", 0, 3), f"schedule is 'quadratic'; it must be one of {', '.join(SCHEDULES)}"),
        (("linear", 3, 3), "step is 3; it must be in 0 ... 2"),
        (("adaptive", 1, 3, [1.0]), "1 norms for step 1; the adaptive schedule needs 2"),
    ],
)
def test_schedule_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule_factor(*arguments)


# --- recommended scales ---


def test_recommended_scales_go_from_the_least_noise_to_the_most():
    assert {*RECOMMENDED_SCALES} == {*KINDS}
    for (noise_type, direction), scales in RECOMMENDED_SCALES.items():
        infos = [apply_noise_to_hidden_states(states(9, 64), s, noise_type, direction, generator())[1] for s in scales]
        sizes = [info["noise_norm"] for info in infos]
        assert sizes == sorted(sizes)
        assert noise_type == "snr" or scales[0] == 0


# --- diversity ---


def test_path_diversity():
    thoughts = states(4, 6, 8)
    result = path_diversity(thoughts, 2)
    assert result.diversity == pytest.approx(naive_diversity(list(thoughts), 2), rel=1e-5)
    assert result.all_steps == pytest.approx(naive_diversity(list(thoughts), 0), rel=1e-5)
    assert result.late_half == pytest.approx(naive_diversity(list(thoughts), 4), rel=1e-5)
    assert result.normalised == pytest.approx(result.diversity / thoughts[:, 2:].norm(dim=-1).mean().item(), rel=1e-5)
    pairs = [naive_diversity([thoughts[i], thoughts[j]], 2) for i, j in itertools.combinations(range(4), 2)]
    assert result.pairwise == pytest.approx(pairs, rel=1e-5)
    assert path_diversity(2 * thoughts, 2).normalised == pytest.approx(result.normalised, rel=1e-5)
    assert path_diversity(thoughts[:, :5], 2).late_half == pytest.approx(naive_diversity(list(thoughts[:, :5]), 3), rel=1e-5)


@pytest.mark.parametrize("paths", [states(1, 6, 8), states(0, 6, 8), states(1, 8).expand(3, 6, 8), torch.zeros(3, 6, 8)])
def test_no_diversity(paths):
    result = path_diversity(paths, 2)
    assert result[:4] == (0.0, 0.0, 0.0, 0.0)
    assert result.pairwise == [0.0] * math.comb(len(paths), 2)


def test_diversity_without_a_step_after_the_branch_point():
    result = path_diversity(states(3, 2, 8), 2)
    assert result.diversity == result.late_half == result.normalised == 0
    assert result.all_steps > 0


# --- noise in the thoughts of a model ---

NOISE = [
    {"noise_type": "gaussian", "noise_scale": 0.5},
    {"noise_type": "snr", "noise_scale": 2.0},
    {"noise_type": "orthogonal", "noise_scale": 0.7},
    {"noise_type": "targeted", "noise_scale": 0.5, "noise_direction": "opposite"},
    {"noise_type": "dropout", "noise_scale": 0.3},
]


def naive_of(noise: dict, passes: int, seed: int, question: int, all_passes: bool):
    """The naive perturbation of one row of a batch without branches."""
    return naive_perturb(
        lambda number: noise_generator(seed, question, 0, number),
        noise["noise_scale"],
        passes,
        noise["noise_type"],
        noise.get("noise_direction"),
        schedule="constant" if all_passes else "none",
    )


def assert_forward_matches_naive(model, layout: list[str], noise: dict, all_passes: bool, thought_of=last_state) -> None:
    batch, questions = draw(layout), [5, 900, 2, 7][: len(layout)]
    how = {"apply_noise_to_all_passes": all_passes, "seed": 3, "question_index": questions}
    outputs, details = model(**batch, **noise, **how, return_details=True)
    for row, question in enumerate(questions):
        real = batch["attention_mask"][row].bool()
        ids, mask, positions = (batch[key][row : row + 1, real] for key in ("input_ids", "attention_mask", "position_ids"))
        passes = int((ids == IDS.latent).sum())
        perturb = naive_of(noise, passes, 3, question, all_passes)
        embeds = fill_thoughts(model.base_causallm, IDS, ids, mask, positions, thought_of, perturb)
        assert_near(outputs.inputs_embeds[row, real], embeds[0])
        logits = model.base_causallm(inputs_embeds=embeds, position_ids=positions).logits
        assert_near(outputs.logits[row, real], logits[0])
        assert details.steps[row] == passes
        assert_near(details.thoughts[row, :passes], embeds[0, ids[0] == IDS.latent])
        assert details.thoughts[row, passes:].abs().sum() == 0
        expected = list(range(1, passes + 1)) if all_passes else [1][:passes]
        assert [info["pass"] for info in details.noise[row]] == expected


@pytest.mark.parametrize("all_passes", [False, True])
@pytest.mark.parametrize("noise", NOISE, ids=lambda noise: noise["noise_type"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_forward_with_noise_matches_naive(family, noise, all_passes):
    assert_forward_matches_naive(build(family), LAYOUTS["ragged"], noise, all_passes)


@pytest.mark.parametrize("layout", ["aligned", "scattered", "no latents", "many", "last column"])
def test_forward_with_noise_in_other_layouts(layout):
    assert_forward_matches_naive(build("llama"), LAYOUTS[layout], NOISE[0], True)


def test_forward_with_noise_at_another_layer():
    base = tiny_model("llama")[0]
    model = mapped(base, {"name": "layer", "layer": 1})
    assert_forward_matches_naive(model, LAYOUTS["ragged"], NOISE[2], True, naive_map(base, "layer", 1))


def test_noise_as_one_argument():
    model, batch = build("llama"), draw(LAYOUTS["ragged"])
    published = model(**batch, noise_scale=0.5, noise_type="orthogonal", apply_noise_to_all_passes=True, seed=1)
    assert torch.equal(model(**batch, noise=Noise(0.5, "orthogonal", schedule="constant"), seed=1).loss, published.loss)
    assert not torch.equal(model(**batch, noise=Noise(0.5, "orthogonal", first_pass=2), seed=1).loss, published.loss)


@pytest.mark.parametrize("noise", [{}, {"noise_scale": 0.0}, {"noise_scale": math.inf, "noise_type": "snr"}], ids=str)
def test_no_noise_changes_nothing(noise):
    model, batch, prompts = build("gpt2"), draw(LAYOUTS["ragged"]), draw(PROMPTS)
    outputs, _ = model(**batch, **noise, apply_noise_to_all_passes=True, return_details=True)
    assert all(torch.equal(*pair) for pair in zip(outputs, model(**batch), strict=True))
    arguments = prompts["input_ids"], prompts["attention_mask"], 8
    assert torch.equal(model.generate(*arguments, **noise), model.generate(*arguments))


def test_a_scale_for_each_row():
    model, batch = build("llama"), draw(LAYOUTS["ragged"])
    scales = [0.0, 0.5, 2.0, 1.0]
    clean, together = model(**batch), model(**batch, noise_scale=scales, seed=1)
    assert torch.equal(together.logits[0], clean.logits[0])
    for row in (1, 2):
        separate = model(**batch, noise_scale=scales[row], seed=1)
        assert_near(together.logits[row], separate.logits[row])
        assert not near(together.logits[row], clean.logits[row])
    assert torch.equal(together.logits[3], clean.logits[3])  # has no latent
    with pytest.raises(ValueError, match="3 scales for 4 rows"):
        model(**batch, noise_scale=scales[:3])


def test_noise_reaches_the_fed_back_position_alone():
    """The states before the first latent stay, bit for bit, and so do the embeddings everywhere but at the latents."""
    model, batch = build("llama"), draw(LAYOUTS["single row"])
    clean, cached = model.think(batch["input_ids"], keep_cache=True), []
    model.base_causallm.base_model.register_forward_hook(
        lambda _module, _args, outputs: cached.append(outputs.past_key_values.layers[0].keys.clone())
    )
    noise = ThoughtInterventions(batch["input_ids"] == IDS.latent, [Intervention(Noise(5.0))], [0], [0])
    noisy = model.think(batch["input_ids"], keep_cache=True, interventions=noise)
    first = LAYOUTS["single row"][0].index("L")
    changed = (noisy.inputs_embeds != clean.inputs_embeds).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [first, first + 1, first + 2]
    assert torch.equal(noisy.hidden[:, :first], clean.hidden[:, :first])
    for layer, reference in zip(noisy.cache.layers, clean.cache.layers, strict=True):
        assert torch.equal(layer.keys[:, :, :first], reference.keys[:, :, :first])
        assert not torch.equal(layer.keys[:, :, first:], reference.keys[:, :, first:])
    assert_close(noise.infos[0][0]["original_norm"], clean.hidden[0, first - 1].norm().item())
    distance = (noisy.inputs_embeds - clean.inputs_embeds)[0, first].norm().item()
    assert noise.infos[0][0]["noise_norm"] == pytest.approx(distance, rel=1e-5)


def test_training_with_noise():
    model, batch = build("llama"), draw(LAYOUTS["ragged"])
    loss = model(**batch, labelled_only=True, noise_scale=0.5, noise_type="orthogonal", apply_noise_to_all_passes=True).loss
    loss.backward()
    assert loss != model(**batch, labelled_only=True).loss
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


HOW = {"temperature": 1.0, "top_p": 0.9, "noise_scale": 1.0, "apply_noise_to_all_passes": True, "seed": 2}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate_with_noise_matches_naive(family):
    base, batch = tiny_model(family, tie_word_embeddings=False)[0], draw(PROMPTS)
    questions = [4, 0, 77, 3, 10]
    generated = wrap(base).generate(batch["input_ids"], batch["attention_mask"], 8, **HOW, question_index=questions)
    for row, question in enumerate(questions):
        prompt = alone(batch, row)
        noise = {"noise_type": "gaussian", "noise_scale": 1.0}
        perturb = naive_of(noise, int((prompt == IDS.latent).sum()), 2, question, True)
        choose = naive_sampler(1.0, 0.9, sampling_generator(2, question, 0))
        expected = naive_decode(base, IDS, prompt, 8, perturb, choose).tokens[0, prompt.shape[1] :].tolist()
        assert generated[row, len(PROMPTS[0]) :][: len(expected)].tolist() == expected


def test_generated_noise_does_not_depend_on_the_batch():
    base, batch = tiny_model("llama", tie_word_embeddings=False)[0], draw(PROMPTS)
    model = wrap(base, IDS._replace(eos=-1))
    arguments = batch["input_ids"], batch["attention_mask"], 8
    together, details = model.generate(*arguments, **HOW, question_index=[9, 8, 7, 6, 5], return_details=True)
    for row in range(5):
        single, own = model.generate(alone(batch, row), max_new_tokens=8, **HOW, question_index=9 - row, return_details=True)
        assert together[row, -8:].tolist() == single[0, -8:].tolist()
        assert_near(details.thoughts[row, : own.thoughts.shape[1]], own.thoughts[0])
    assert not torch.equal(together, model.generate(*arguments, **HOW))  # other indices: other noise
    assert not torch.equal(together, model.generate(*arguments, **{**HOW, "seed": 3}, question_index=[9, 8, 7, 6, 5]))


def test_return_types_of_generate():
    model, prompt = build("llama"), alone(draw(PROMPTS), 0)
    ids = model.generate(prompt)
    assert isinstance(ids, torch.Tensor)
    both, embeds, details = model.generate(prompt, output_embedding=True, return_details=True)
    assert torch.equal(ids, both)
    assert torch.equal(details.thoughts[0], embeds[0, : prompt.shape[1]][prompt[0] == IDS.latent])
    assert details.noise == [[]]


def test_generate_refuses_noise():
    model, batch = build("gpt2"), draw(PROMPTS)
    with pytest.raises(ValueError, match="2 question indices for 5 rows"):
        model.generate(batch["input_ids"], batch["attention_mask"], noise_scale=1.0, question_index=[1, 2])
    with pytest.raises(ValueError, match="noise_type is 'pink'"):
        model(**draw(LAYOUTS["no latents"]), noise_scale=1.0, noise_type="pink")


# --- latents for models that were not trained with them ---


def test_insert_latents():
    batch = draw(["qqqse", "..qse", "qqsLe", "qqseq", "qqqqq", ".seqs"])
    ids, mask = insert_latents(batch["input_ids"], batch["attention_mask"], IDS.start_latent, IDS.end_latent, IDS.latent, 3)
    expected = ["qqqsLLLe", "..qsLLLe", "...qqsLe", "qqsLLLeq", "...qqqqq", ".sLLLeqs"]
    kinds = {IDS.start_latent: "s", IDS.end_latent: "e", IDS.latent: "L"}
    drawn = ["".join(kinds.get(t, "q") if m else "." for t, m in zip(*pair, strict=True)) for pair in zip(ids.tolist(), mask.tolist(), strict=True)]  # fmt: skip
    assert drawn == expected
    real, before = mask.bool(), batch["attention_mask"].bool()
    for row in range(len(ids)):  # nothing but the latents is new
        inserted = ids[row, real[row]].tolist()
        given = batch["input_ids"][row, before[row]].tolist()
        assert [t for t in inserted if t != IDS.latent] == [t for t in given if t != IDS.latent]


def test_insert_latents_where_there_is_no_place():
    batch = draw(["qqsLe", ".qsqe"])
    ids, mask = insert_latents(batch["input_ids"], batch["attention_mask"], IDS.start_latent, IDS.end_latent, IDS.latent)
    assert torch.equal(ids, batch["input_ids"])
    assert torch.equal(mask, batch["attention_mask"])


@pytest.mark.parametrize("branching", [False, True])
def test_generate_with_inserted_latents(branching):
    model = build("llama", tie_word_embeddings=False)
    layout = ["...qqqse", "qqqqqqqq", "qqqqqqse"]
    batch = draw(layout)
    written = draw([row.replace("se", "s" + MAX_N_LATENT * "L" + "e").rjust(16, ".") for row in layout])
    for row in range(3):  # both layouts draw their own tokens
        written["input_ids"][row, written["attention_mask"][row].bool() & (written["input_ids"][row] != IDS.latent)] = batch[
            "input_ids"
        ][row, batch["attention_mask"][row].bool()]
    generate = model.generate_with_branching if branching else model.generate
    new = generate(batch["input_ids"], batch["attention_mask"], 6, noise_scale=1.0, inserted_latents=MAX_N_LATENT)
    expected = generate(written["input_ids"], written["attention_mask"], 6, noise_scale=1.0)
    if branching:
        assert torch.equal(new, expected)
        return
    assert torch.equal(new[:, 8:], expected[:, 16:])
    assert torch.equal(new[:, :8], batch["input_ids"])
    assert not torch.equal(new, model.generate(batch["input_ids"], batch["attention_mask"], 6, noise_scale=1.0))
    with pytest.raises(ValueError, match="0 latents to insert"):
        model.generate(batch["input_ids"], inserted_latents=0)
