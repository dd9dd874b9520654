"""The check of noise against its formulas: right noise passes, every kind of wrong noise is caught."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chain_records, write_json
from tiny_models import assert_near
from torch import Tensor

import noise
from config import RunConfig
from dataset import get_question_latent_dataset
from experiments import noise_check
from experiments.checks.noise_laws import NoiseSetting, measure, measure_below_rounding, measure_zero, recommended_settings
from noise import apply_noise_to_hidden_states
from systems import convert, sources
from systems.models import build_model, latent_ids, load_tokenizer
from systems.tokens import get_dataset
from utils import UserError, load_config

COARSE = [torch.float16, torch.bfloat16]


def thoughts(count: int = 800, width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of different sizes, and far from any symmetry."""
    draw = torch.randn(count, width, generator=torch.Generator().manual_seed(1000))
    return ((draw + torch.linspace(-1, 2, width)) * torch.linspace(0.5, 3, count)[:, None]).to(dtype)


def source(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def failed(row: dict[str, Any]) -> list[str]:
    return [name for name, check in row["checks"].items() if not check["passed"]]


def label(value: Any) -> str | None:
    return f"{value.name}-{value.scale:g}" if isinstance(value, NoiseSetting) else None


# --- right noise ---


def test_the_recommended_settings_pass():
    for number, setting in enumerate(recommended_settings()):
        row = measure(thoughts(), setting, functools.partial(source, number))
        assert failed(row) == [], setting
        assert row["passed"]
        assert row["ratio"] == pytest.approx(row["expected_ratio"], rel=0.03)
        assert row["norm_change"] == pytest.approx(row["expected_norm_change"], rel=0.03)
        if row["expected_cosine"] is None:
            assert row["cosine"] is None
        else:  # of few dimensions
            assert row["cosine"] == pytest.approx(row["expected_cosine"], abs=0.08)


@pytest.mark.parametrize("dtype", COARSE)
def test_the_recommended_settings_pass_in_16_bits(dtype):
    hidden = thoughts(40, dtype=dtype)
    assert [failed(measure(hidden, setting, source)) for setting in recommended_settings()] == [[]] * 61
    small = measure_below_rounding(hidden, source)
    assert small["passed"]
    assert small["kept"] > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE])
def test_zero_thoughts_pass(dtype):
    assert all(measure_zero(16, dtype, setting)["passed"] for setting in recommended_settings())


def test_numbers_of_a_setting():
    """|h| = 2 in 16 dimensions, so that gaussian noise of scale 1/2 is as long as h."""
    hidden = torch.zeros(500, 16)
    hidden[:, 3] = 2
    row = measure(hidden, NoiseSetting("gaussian", None, 0.5), source)
    assert row["expected_ratio"] == pytest.approx(1)
    assert row["expected_norm_change"] == pytest.approx(math.sqrt(2))
    assert row["expected_cosine"] == pytest.approx(math.sqrt(0.5))
    assert row["ratio"] == pytest.approx(1, abs=0.05)
    assert row["name"] == "gaussian"
    assert row["p_value"] == min(check["p_value"] for check in row["checks"].values() if check["p_value"] is not None)
    assert row["checks"][row["test"]]["p_value"] == row["p_value"]


# --- wrong noise ---


def right(hidden: Tensor, scale: float, noise_type: str = "gaussian", direction: str | None = None, seed: int = 2) -> Tensor:
    return apply_noise_to_hidden_states(hidden, scale, noise_type, direction, source(seed))[0]


def described(perturb: Callable[[Tensor, float], Tensor]) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A function of states and scale as noise with a right description."""

    def wrong_noise(hidden, scale, noise_type, direction, generator):
        perturbed = perturb(hidden, scale).to(hidden.dtype)
        return perturbed, noise._describe(hidden.float(), perturbed.float(), scale, noise.find_noise(noise_type, direction))

    return wrong_noise


def normal(hidden: Tensor) -> Tensor:
    return torch.randn(hidden.shape, generator=source(3))


def lengths(states: Tensor) -> Tensor:
    return states.norm(dim=-1, keepdim=True)


def keep(hidden: Tensor, scale: float) -> Tensor:
    return torch.rand(hidden.shape, generator=source(3)) > scale


WRONG: list[tuple[NoiseSetting, Callable[[Tensor, float], Tensor], str]] = [
    (NoiseSetting("gaussian", None, 0.5), lambda h, s: right(h, 1.05 * s), "norms"),
    (NoiseSetting("gaussian", None, 0.5), lambda h, s: right(h, s * 0.756, "uniform") + right(h, s * 0.9) - h, "coordinates"),
    (NoiseSetting("gaussian", None, 0.5), lambda h, s: h + s * normal(h).abs(), "coordinates"),
    (NoiseSetting("gaussian", None, 0.5), lambda h, s: right(h, s, "gaussian_scaled"), "norms"),
    (NoiseSetting("gaussian", None, 0.5), lambda h, s: h + s * normal(h[:1]), "direction"),
    (NoiseSetting("gaussian_scaled", None, 0.5), lambda h, s: h + s * lengths(h) * normal(h) / 4, "ratio"),
    (NoiseSetting("gaussian_scaled", None, 0.5), lambda h, s: right(h, s, "orthogonal"), "angle to h"),
    (NoiseSetting("gaussian_scaled", None, 0.5), lambda h, s: h + s * lengths(h) / 4, "direction"),
    (NoiseSetting("snr", None, 5.0), lambda h, s: right(h, s, "gaussian_scaled"), "ratio"),
    (NoiseSetting("snr", None, 5.0), lambda h, s: right(h, math.sqrt(s), "snr"), "ratio"),  # a ratio of powers
    (NoiseSetting("uniform", None, 0.5), lambda h, s: (right(h, s, "uniform") + h + s) / 2, "coordinates"),
    (NoiseSetting("uniform", None, 0.5), lambda h, s: right(h, 1.01 * s, "uniform"), "range"),
    (NoiseSetting("uniform", None, 0.5), lambda h, s: h + (right(h, s, "uniform") - h).abs() * h.sign(), "along h"),
    (NoiseSetting("orthogonal", None, 0.5), lambda h, s: right(h, s, "gaussian_scaled"), "cosine with h"),
    (NoiseSetting("orthogonal", None, 0.5), lambda h, s: right(h, s, "orthogonal") * 1.001, "norm change"),
    (NoiseSetting("orthogonal", None, 0.5), lambda h, s: right(h, s, "orthogonal", seed=4).roll(1, dims=0), "ratio"),
    (NoiseSetting("targeted", "same", 0.5), lambda h, s: right(h, s, "targeted", "opposite"), "cosine with h"),
    (NoiseSetting("targeted", "opposite", 1.0), lambda h, s: -h, "ratio"),
    (NoiseSetting("dropout", None, 0.2), lambda h, s: h * keep(h, s) / (1 - s), "kept"),
    (NoiseSetting("dropout", None, 0.2), lambda h, s: h * keep(h, s / 2), "zeros"),
    (NoiseSetting("dropout", None, 0.2), lambda h, s: h * keep(h[:1], s), "spread"),
    (NoiseSetting("dropout", None, 1.0), lambda h, s: h * keep(h, 0.99), "zeros"),
    (NoiseSetting("gaussian", None, 0.0), lambda h, s: h + 1e-6, "identical"),
    (NoiseSetting("snr", None, 2.0), lambda h, s: torch.full_like(h, math.nan), "finite"),
]


@pytest.mark.parametrize(("setting", "perturb", "check"), WRONG, ids=label)
def test_wrong_noise_is_caught(setting, perturb, check):
    row = measure(thoughts(), setting, source, described(perturb))
    assert check in failed(row)
    assert not row["passed"]


def test_one_vector_for_all_thoughts_is_caught_across_h():
    """What is the same for every thought is random only once."""
    hidden = thoughts()
    one = torch.randn(16, generator=source(5))

    def shared(hidden, scale):
        along = hidden / lengths(hidden)
        across = one - (along @ one)[:, None] * along
        return hidden + scale * lengths(hidden) * across / lengths(across)

    assert failed(measure(hidden, NoiseSetting("orthogonal", None, 0.5), source, described(shared))) == ["direction"]


def test_noise_described_wrongly_is_caught():
    def boasting(*arguments):
        perturbed, info = apply_noise_to_hidden_states(*arguments)
        return perturbed, {**info, "noise_norm": 1.01 * info["noise_norm"]}

    assert failed(measure(thoughts(), NoiseSetting("uniform", None, 0.5), source, boasting)) == ["reported"]


@pytest.mark.parametrize("dtype", COARSE)
def test_noise_computed_in_16_bits_is_caught(dtype):
    def coarse(hidden, scale, noise_type, direction, generator):
        noise_vector = torch.randn(hidden.shape, generator=generator).to(hidden.dtype)
        perturbed = hidden + scale * noise_vector
        return perturbed, noise._describe(hidden.float(), perturbed.float(), scale, noise.find_noise(noise_type, direction))

    assert failed(measure(thoughts(40, dtype=dtype), NoiseSetting("gaussian", None, 0.3), source, coarse)) == [
        "as float32, rounded"
    ]


@pytest.mark.parametrize(("value", "check"), [(math.nan, "finite"), (1.0, "still zero")])
def test_wrong_zeros_are_caught(value, check):
    wrong = described(lambda hidden, scale: torch.full_like(hidden, value))
    assert check in failed(measure_zero(8, torch.float32, NoiseSetting("snr", None, 1.0), wrong))


# --- a checkpoint ---


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_json(tmp_path / "questions.json", chain_records(24))


def run_config(model: Path, method: str = "coconut") -> RunConfig:
    paths = [f"{key}={model}" for key in ("model_id", "load_model_path")]
    return load_config(RunConfig, [*paths, "name=x", "val_path=x", "only_eval=true", f"method={method}"])


def write_checkpoint(model_directory: Path, target: Path, method: str = "coconut", stage: int = 2) -> Path:
    """A random model as a trained checkpoint."""
    arguments = [
        "name=x",
        "val_path=x",
        "only_eval=true",
        "load_model_path=x",
        f"method={method}",
        f"model_id={model_directory}",
    ]
    config = load_config(RunConfig, arguments).model_copy(update={"from_scratch": True, "load_model_path": None})
    tokenizer = load_tokenizer(str(model_directory))
    torch.manual_seed(0)
    base = build_model(config, tokenizer, latent_ids(tokenizer, method)).base_causallm
    torch.save(base.state_dict(), target.with_suffix(".pt"))
    base.save_pretrained(model_directory)
    facts = {"method": method, "stage": stage, "c_thought": 2, "max_latent_stage": 2, "pad_latent_to_max": False, "epoch": 1}
    convert.convert(target.with_suffix(".pt"), target, str(model_directory), facts)
    return target


@pytest.fixture
def trained(model_directory: Path, tmp_path: Path) -> Path:
    return write_checkpoint(model_directory, tmp_path / "checkpoint_1")


def run(monkeypatch: Any, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["noise_check", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        noise_check.main()
    return int(stop.value.code or 0)


def test_thoughts_are_those_of_an_evaluation(trained: Path, data_file: Path):
    subject, questions = noise_check.load(trained, data_file, "prosqa", 7)
    found = noise_check.clean_thoughts(subject, questions)
    latents = [2 * min(len(record["steps"]), 2) for record in chain_records(7)]
    assert {index: len(path) for index, path in found.items()} == dict(enumerate(latents))
    config, stage, _ = sources.evaluation_config(run_config(trained))
    dataset = get_dataset(data_file, subject.tokenizer, 7)
    prompts = get_question_latent_dataset(stage, dataset, config, subject.ids.start, subject.ids.thought, subject.ids.end)
    for index in (0, 5):  # alone, as generation feeds them back
        prompt = torch.tensor([prompts[index]["input_ids"]])
        _, details = subject.model.generate(prompt, max_new_tokens=1, return_details=True)
        assert_near(found[index], details.thoughts[0])


def test_the_command(trained: Path, data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    out = tmp_path / "out"
    assert run(monkeypatch, trained, data_file, out, "--questions", 12, "--seed", 3) == 0
    result = json.loads((out / "noise_check.json").read_text())
    assert result["passed"]
    assert (result["questions"], result["seed"], result["failed"]) == (12, 3, 0)
    assert result["norms"]["all"]["count"] == sum(row["count"] for row in result["norms"]["by_pass"].values())
    assert result["norms"]["by_pass"]["1"]["count"] == 12
    assert [len(result[dtype]["settings"]) for dtype in ("float32", "float16", "bfloat16")] == [61] * 3
    shown = capsys.readouterr().out
    assert "float16: settings 61 of 61, zero thoughts 61 of 61, below rounding 1 of 1" in shown
    assert "wrong" not in shown
    assert [path.name for path in out.iterdir()] == ["noise_check.json"]


def test_the_command_fails_on_wrong_noise(trained: Path, data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    settings = [NoiseSetting("orthogonal", None, scale) for scale in (0.0, 0.5, 1.0)]
    monkeypatch.setattr(noise_check, "recommended_settings", lambda: settings)
    monkeypatch.setitem(noise.NOISES, "orthogonal", replace(noise.NOISES["orthogonal"], add=lambda h, s, g: math.nan * s * g))
    assert run(monkeypatch, trained, data_file, tmp_path, "--questions", 6) == 1
    result = json.loads((tmp_path / "noise_check.json").read_text())
    assert not result["passed"]
    assert result["failed"] == 3 * 4  # three dtypes, thoughts and zeros, two scales
    shown = capsys.readouterr().out
    assert "float32: settings 1 of 3, zero thoughts 1 of 3 as they should be" in shown
    assert "wrong: float16, settings, orthogonal at 0.5: finite" in shown
    assert "and 2 more" in shown


def test_refuses(trained: Path, model_directory: Path, data_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    other = write_checkpoint(model_directory, tmp_path / "no_cot", "no_cot", 0)
    start = write_checkpoint(model_directory, tmp_path / "start", "coconut", 0)
    cases = [
        ((tmp_path / "nothing", data_file, tmp_path / "out"), "nothing: no such file"),
        ((other, data_file, tmp_path / "out"), "no_cot was trained with method no_cot, which has no thoughts"),
        ((start, data_file, tmp_path / "out"), "start is of stage 0, which has no thoughts yet"),
        ((trained, tmp_path / "nothing.json", tmp_path / "out"), "nothing.json: no such file"),
        ((trained, data_file, data_file), "results cannot be written there"),
        (
            (trained, data_file, tmp_path / "out", "--questions", "0"),
            "num_questions: input should be greater than or equal to 1",
        ),
        ((trained, data_file, tmp_path / "out", "--benchmark", "chess"), "benchmark"),
    ]
    for arguments, message in cases:
        assert run(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    assert not (tmp_path / "out" / "noise_check.json").exists()


def test_damaged_weights_are_refused(trained: Path, data_file: Path):
    subject, questions = noise_check.load(trained, data_file, "prosqa", 4)
    torch.nn.init.constant_(subject.model.base_causallm.base_model.norm.weight, math.nan)
    with pytest.raises(UserError, match="a thought is zero or not finite"):
        noise_check.clean_thoughts(subject, questions)
