"""The benchmarks run, on a tiny model; the numbers themselves mean nothing here."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import launch

from methods import METHODS
from systems import activation_checkpointing
from systems.last_layer import LastLayer

run_command = subprocess.run
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark. Its own processes come from `processes.launch`, and only one variant's peak memory is measured."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    common = importlib.import_module("common")
    peak_memories = common.peak_memories
    monkeypatch.setattr(common, "peak_memories", lambda script, argv, variants: peak_memories(script, argv, variants[:1]))
    monkeypatch.setattr(subprocess, "run", forked)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def forked(command: list[str], **options) -> subprocess.CompletedProcess:
    """`python SCRIPT ...`, `python -m torch.distributed.run --standalone --nproc_per_node N SCRIPT ...`; others as they are."""
    if command[0] != sys.executable:
        return run_command(command, **options)
    at = next(place for place, word in enumerate(command) if word.endswith(".py"))
    processes = re.findall(r"\d+", " ".join(command[1:at])) or ["1"]
    result = launch(int(processes[0]), command[at + 1 :], script=Path(command[at]))
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return result


def run(benchmark, out: Path, *options: str) -> dict:
    benchmark.main(["--tiny", "--threads", "1", "--repeats", "1", "--warmup", "0", "--out", str(out), *options])
    return json.loads(out.read_text())


def test_train_step(load, tmp_path, capsys):
    train_step = load("train_step")
    result = run(train_step, tmp_path / "new" / "train.json", "--naive-rows", "3")
    assert set(result["milliseconds"]) == set(train_step.VARIANTS)
    for times in result["milliseconds"].values():
        assert 0 < times["forward_backward"] < times["step"]
    expected = result["milliseconds"]["naive"]["step"] / result["milliseconds"]["coconut"]["step"]
    assert result["ratios"]["naive / coconut"]["step"] == pytest.approx(expected)
    assert result["peak_memory_mib"]["coconut"] > 50
    assert result["loss_difference"] < 1e-5
    assert result["tokens_per_row"] == 24 + 8 + 10
    assert "peak MiB" in capsys.readouterr().out
    assert result["matrix_rate_share"]["coconut"] > 0
    half = run(train_step, tmp_path / "bf16.json", "--naive-rows", "0", "--bf16")
    assert 0 < half["loss_difference"] < 0.05
    assert (set(half["milliseconds"]), set(half["ratios"])) == ({"coconut", "plain"}, {"coconut / plain"})


def test_the_memory_of_a_loss(load, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "MOST_LOGITS", activation_checkpointing.MOST_LOGITS)  # put back afterwards
    result = run(load("loss_memory"), tmp_path / "loss.json", "--batch-size", "40")
    assert set(result["milliseconds"]) == set(result["losses"]) == {"1", "4", "16"}
    assert result["losses"]["16"] == pytest.approx(result["losses"]["1"])
    assert result["more_memory_mib"]["1"] >= 0
    assert "more MiB" in capsys.readouterr().out


def test_the_last_layer_with_less(load, tmp_path, capsys, monkeypatch):
    last_layer = load("last_layer")
    model = ["--model", "configs/llama_quick", "--attention", "eager", "--question-tokens", "20", "--batch-size", "2"]
    result = run(last_layer, tmp_path / "last_layer.json", *model)
    found = result["found"]
    assert set(found) == set(result["ratios"]) == {"step without thoughts", "step with thoughts", "answers"}
    assert found["answers"]["less"] == found["answers"]["whole"]
    for name in ("step without thoughts", "step with thoughts"):
        assert found[name]["less"] == pytest.approx(found[name]["whole"], rel=1e-5)
    assert "less / whole" in capsys.readouterr().out
    monkeypatch.setattr(LastLayer, "_places", lambda _self, states, _before: torch.zeros(len(states), 1, dtype=torch.long))
    with pytest.raises(SystemExit, match="step without thoughts: not the same"):
        run(last_layer, tmp_path / "last_layer.json", *model)


def test_generate(load, tmp_path, capsys, monkeypatch):
    generate = load("generate")
    result = run(generate, tmp_path / "generate.json", "--batch-size", "3", "--repeats", "3", "--new-tokens", "5")
    assert set(result["seconds_per_answer"]) == {*generate.VARIANTS, "floor"}
    seconds = result["seconds_per_answer"]
    assert result["ratios"]["coconut / floor"] == pytest.approx(seconds["coconut"] / seconds["floor"])
    assert result["answers_compared"] == 3
    assert result["answers_different"] == 0
    assert result["peak_memory_mib"]["coconut"] > 50
    assert "answers compared: 3, different: 0" in capsys.readouterr().out
    assert result["by_kind"] == {}
    options = ["--batch-size", "2", "--repeats", "1", "--new-tokens", "9", "--no-naive", "--no-memory", "--profile"]
    answered = []
    timed = generate.timed
    monkeypatch.setattr(generate, "timed", lambda *args: answered.append(timed(*args)) or answered[-1])
    short = run(generate, tmp_path / "short.json", *options)
    assert all(kinds["attention"] > 0 for kinds in short["by_kind"].values())
    assert list(short["by_kind"]) == ["first token", "9 tokens"]
    assert [tuple(tokens.shape) for _, tokens in answered[-2:]] == [(2, 1), (2, 9)]  # the profiled batches, the last ones
    assert "naive" not in short["seconds_per_answer"]
    assert short["answers_different"] == 0


def test_generate_reports_different_tokens(load, tmp_path, monkeypatch):
    generate = load("generate")
    monkeypatch.setattr(generate.common, "peak_memories", lambda *_: {})
    monkeypatch.setattr(generate, "naive_generate", lambda _base, _ids, prompt, new: torch.full((1, prompt.shape[1] + new), 7))
    with pytest.raises(SystemExit, match="do not give the same tokens"):
        run(generate, tmp_path / "generate.json", "--batch-size", "2")


def test_noise_sweep(load, tmp_path, monkeypatch, capsys):
    noise_sweep = load("noise_sweep")
    monkeypatch.setattr(noise_sweep.common, "peak_memories", lambda *_: {})  # the way there is that of the other benchmarks
    sizes = ["--batch-size", "2", "--scales", "0", "1", "5", "--branches", "2", "--new-tokens", "4", "--repeats", "6"]
    result = run(noise_sweep, tmp_path / "sweep.json", *sizes)
    seconds, sweep = result["seconds_per_branch"], result["seconds_per_sweep"]
    assert set(seconds) == set(noise_sweep.VARIANTS)
    assert result["branches_per_sweep"] == 2 * 3 * 2
    assert sweep["naive"] == pytest.approx(12 * seconds["naive"])
    assert result["ratios"]["naive / batch"] == pytest.approx(seconds["naive"] / seconds["batch"])
    output = capsys.readouterr().out
    assert "6 of 12 branches were decoded" in output
    assert "branches compared: 12, different: 0" in output
    monkeypatch.setattr(noise_sweep, "naive_branch", lambda *_: torch.full((4,), 7))
    with pytest.raises(SystemExit, match="do not give the same tokens"):
        run(noise_sweep, tmp_path / "sweep.json", *sizes, "--temperature", "0")
    monkeypatch.setattr(noise_sweep.common, "clock", lambda _: next(clock))
    clock = iter([5.0, 29.0])
    assert noise_sweep.timed(lambda _: torch.zeros(2, 3, 2, 4), None, 0)[0] == 24 / 12


def test_train_step_refuses_another_loss(load, tmp_path, monkeypatch):
    train_step = load("train_step")
    monkeypatch.setattr(train_step.common, "peak_memories", lambda *_: {})
    naive = train_step.naive_forward
    monkeypatch.setattr(train_step, "naive_forward", lambda *args, **kwargs: (naive(*args, **kwargs)[0] + 1,))
    with pytest.raises(RuntimeError, match="differs from that of the naive forward"):
        run(train_step, tmp_path / "train.json")


def test_rows_have_the_shape_they_say(load):
    common, train_step = load("common"), load("train_step")
    setting = common.Setting()
    batch = train_step.training_batch(setting, 4, torch.device("cpu"))
    assert batch["input_ids"].shape == (4, 342)
    assert ((batch["input_ids"] == setting.latent).sum(dim=1) == 6).all()
    assert ((batch["labels"] != -100).sum(dim=1) == 10).all()
    first = (batch["input_ids"] == setting.latent).int().argmax(dim=1)
    assert (first == first[0]).all()
    assert not (train_step.without_thoughts(batch, setting.latent)["input_ids"] == setting.latent).any()
    assert batch["attention_mask"].sum(dim=1).float().mean() == 300 + 8 + 10


def test_sharded_step(load, tmp_path, monkeypatch, capsys):
    """One variant is run; what the others would say is made up."""
    sharded_step = load("sharded_step")
    measured = sharded_step.run_variant
    known = {"milliseconds": 6.0, "peak_memory_mib": 1.0, "gathers": 9, "gathered_mib": 1.0, "machine": {}}
    monkeypatch.setattr(
        sharded_step, "run_variant", lambda name, *more: measured(name, *more) if name == "step, recomputed" else known
    )
    result = run(sharded_step, tmp_path / "sharded.json", "--rounds", "1")
    found = result["variants"]["step, recomputed"]
    assert found["gathers"] == 3  # two blocks and the root, once
    assert found["milliseconds"] > 0
    assert "pass / step: 1.00 in time" in capsys.readouterr().out


def test_start_memory(load, monkeypatch, capsys):
    start_memory = load("start_memory")
    monkeypatch.setattr("sys.argv", ["start_memory", "--layers", "1", "--width", "64"])
    start_memory.main()
    lines = list(filter(None, capsys.readouterr().out.splitlines()))
    assert [line for line in lines if not line.startswith(" ")] == [
        "every process makes the whole model",
        "the first one makes it",
    ]
    assert len(lines) == 6
    assert all(
        re.fullmatch(r"  process \d: [\d.]+ times the weights \([\d.]+ GiB\)", line) for line in [*lines[1:3], *lines[4:]]
    )


def test_two_checkouts(load, capsys):
    """This checkout against itself."""
    load("two_checkouts").main([str(FOLDER.parent), "--rounds", "1", "--repeats", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("llama", "gpt2"))]
    assert len(lines) == 6
    assert all(
        re.fullmatch(r"(llama_quick|gpt2_small), [a-z ]+: [\d.]+ s, by the other [\d.]+ \([\d.]+\)", line) for line in lines
    )


def test_overhead_counts_what_a_pass_adds_to_its_layers(load, tmp_path, capsys):
    """Counts are exact: they do not depend on how fast the machine is."""
    overhead = load("overhead")
    result = run(overhead, tmp_path / "overhead.json")
    for family in ("gpt2", "llama"):
        layer, rest = result[family]["operations_of_a_layer"], result[family]["operations_of_the_rest"]
        assert all(count == int(count) > 10 for count in layer)  # every layer alike
        assert 0 < rest[0] < layer[0]  # a pass adds less than a layer
    assert "the rest of a pass" in capsys.readouterr().out


def test_a_profile_names_all_of_a_step(load, tmp_path, capsys):
    profile_step = load("profile_step")
    assert profile_step.kind_of("aten::addmm") == profile_step.kind_of("aten::mkldnn_linear") == "matrix products"
    assert profile_step.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == "attention"
    assert profile_step.kind_of("aten::native_layer_norm") == "the rest"
    result = run(profile_step, tmp_path / "profile.json")
    for kinds in result["by_kind"].values():
        assert set(kinds) == {*profile_step.KINDS, profile_step.HOST}
        assert all(kinds[name] > 0 for name in ("matrix products", "attention", "optimizer", "copies"))
    assert result["ratios"]["coconut / plain"] > 0
    assert "matrix products" in capsys.readouterr().out


def test_the_step_of_every_method(load, tmp_path, capsys):
    result = run(load("method_steps"), tmp_path / "methods.json")
    assert set(result["milliseconds"]) == {*METHODS, "codi, jacobi"}
    assert all(value > 0 for value in result["milliseconds"].values())
    assert result["by_pause_as_thought"]["pause_as_thought"] == 1
    positions = result["positions"]
    assert positions["coconut"] == positions["pause_as_thought"] < positions["cot"]
    assert positions["codi"] - positions["coconut"] == 4 * (20 + 4 + 5 * 12 + 10)  # the teacher, without its last step
    assert positions["simcot"] - positions["coconut"] == 4 * 6 * (1 + 12 + 1)  # a thought, its step and the end, six times


def test_scaling_fits_laws_and_counts_what_fits(load, tmp_path, capsys):
    scaling = load("scaling")
    result = run(scaling, tmp_path / "scaling.json")
    assert set(result["laws"]) == {"thoughts", "question tokens", "width", "layers", "rows", "processes"}
    assert result["laws"]["rows"]["operations_exponent"] == pytest.approx(1)
    assert 0.9 < result["laws"]["rows"]["kept_exponent"] < 1.1  # of question lengths that differ with the number of rows
    assert 0.7 < result["laws"]["layers"]["operations_exponent"] < 1  # positions have weights, too
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    small, *_, large = scaling.SIZES
    assert small.fixed_bytes(1) == pytest.approx(16 * 124e6 + 2 * 124e6 / 12, rel=0.01)
    linear = torch.nn.Linear(4, 8)
    twice = torch.nn.Sequential(linear, torch.nn.Sigmoid())
    assert scaling.kept_bytes(twice, lambda: twice(torch.zeros(3, 4))) == 4 * (3 * 4 + 3 * 8)  # the input, the output
    assert scaling.kept_bytes(linear, lambda: 0) == 0
    assert large.parameters == pytest.approx(8.03e9, rel=0.01)
    width, inner = 4096, 14336  # norms, projections, attention and feed-forward by hand, two bytes each, the norms four
    assert large.row_bytes == pytest.approx(400 * 32 * (34 * width + 6 * inner), rel=0.1)
    assert large.rows(1) == 0 < large.rows(8) < large.rows(64)
    assert "none: does not fit" in capsys.readouterr().out
