"""The quick start's summary and figures, from metrics as run.py writes them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_json
from matplotlib import image

from config import RunConfig
from experiments import compare_methods, methods_page, plots, quickstart
from preprocessing.prosqa import chain_records
from systems.writing import append_jsonl, save_config
from utils import UserError, load_config


def write_run(directory: Path, accuracies: list[tuple[int, float]], test_accuracy: float, fixed: float | None = None) -> None:
    """Metrics of a finished training run and of its evaluation on 40 test questions. fixed: with as many latents for each."""
    evaluation = directory / "eval" / "test-run-checkpoint_4"
    evaluation.mkdir(parents=True)
    for number, (stage, accuracy) in enumerate(accuracies, start=1):
        row = {"epoch": number, "stage": stage, "accuracy": accuracy, "train_loss": 1 / number, "val_loss": 1.1 / number}
        row |= {"question_cosine": 0.25} if stage else {}
        append_jsonl(directory / "metrics.jsonl", {"kind": "step", "step": number, "loss": 1.0})
        append_jsonl(directory / "metrics.jsonl", {"kind": "epoch", **row, "examples": 64 * number, "seconds": 2.5})
    facts: dict[str, Any] = {}
    for which, accuracy in (("", test_accuracy), ("_fixed", test_accuracy if fixed is None else fixed)):
        scores = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.05}
        scores |= {"wrote_steps": 0.25, "accuracy_at_once": None if accuracy == 0.5 else accuracy - 0.01}
        facts |= {f"{key}{which}": value for key, value in scores.items()}
    facts |= {"questions": 40, "stage": 3, "new_tokens": 6.5}
    append_jsonl(evaluation / "metrics.jsonl", {"kind": "evaluation", **facts})
    for idx in range(40):
        append_jsonl(evaluation / "predictions_4.jsonl", {"idx": idx, "correct": idx < round(40 * test_accuracy)})
    if fixed is not None:
        append_jsonl(evaluation / "fixed_predictions_4.jsonl", {"idx": 0, "correct": False})


@pytest.fixture
def save_path(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs" / "quick-cot", [(0, 0.6)], 0.95)
    write_run(tmp_path / "runs" / "quick-coconut", [(1, 0.7), (2, 0.8), (3, 0.9)], 0.9, 0.7)
    write_run(tmp_path / "runs" / "quick-no-cot", [(0, 0.5)] * 4, 0.5)
    return tmp_path / "runs"


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    return write_json(tmp_path / "test.json", chain_records(40, 0, "test"))


def test_the_summary_says_what_was_measured(
    save_path: Path, test_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["quickstart", str(save_path), str(test_file), str(out), "--seconds", "123"])
    quickstart.main()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["coconut"]["accuracy"], summary["coconut"]["accuracy_fixed"]) == (0.9, 0.7)
    assert summary["coconut"]["examples"] == summary["no_cot"]["examples"] == 256
    assert summary["coconut"]["epochs_by_stage"] == {"0": 1, "1": 1, "2": 1, "3": 1}  # with those of its chain of thought
    assert (summary["cot"]["accuracy"], summary["cot"]["examples"]) == (0.95, 64)
    assert summary["no_cot"]["questions"] == 40
    assert summary["depth_shortcut"] == summary["chance"] == 0.5
    assert (summary["seconds_total"], summary["seconds_training"]) == (123, 20)
    for name in ("curves.png", "accuracy.png"):
        picture = image.imread(out / name)
        assert picture[..., :3].std() > 0.05  # something is drawn
    for method in ("coconut", "cot", "no_cot"):
        assert (out / f"metrics_{method}.jsonl").is_file()
        assert json.loads((out / f"predictions_{method}.jsonl").read_text().splitlines()[0])["correct"]
    assert not json.loads((out / "fixed_predictions_coconut.jsonl").read_text())["correct"]
    shown = capsys.readouterr().out
    assert re.search(r"gold thoughts +90.0% +80.0% to 95.0% +75.0% +89.0%", shown)
    assert re.search(r"fixed thoughts +70.0% +60.0% to 75.0% +75.0% +69.0%", shown)
    first = f"{summary['first_option']:.1%}"
    assert re.search(rf"always the first option\W+{re.escape(first)}", shown)


def test_an_evaluation_of_an_earlier_version_is_named(save_path: Path, test_file: Path) -> None:
    place = quickstart.evaluation_of(save_path / "quick-no-cot")
    (place / "metrics.jsonl").write_text('{"kind": "evaluation", "accuracy": 0.5}\n')
    with pytest.raises(UserError, match=f"{place}: evaluated by an earlier version"):
        quickstart.summarise(save_path, test_file, 1.0)


def test_the_summary_takes_the_evaluation_with_gold_thoughts(save_path: Path) -> None:
    """A later one with another number of thoughts has a folder of its own, and is not shown as the headline."""
    place = quickstart.evaluation_of(save_path / "quick-no-cot")
    other = place.with_name(f"{place.name}-latents_6")
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"kind": "evaluation", "eval_latents": 6, "accuracy": 0.1}\n')
    assert quickstart.evaluation_of(save_path / "quick-no-cot") == place


def test_an_evaluation_of_another_run_s_model_is_not_shown(save_path: Path) -> None:
    """Made with this run's configuration; its folder lies among this run's evaluations."""
    run = save_path / "quick-no-cot"
    place = quickstart.evaluation_of(run)
    other = place.with_name(f"{place.name}-other")
    other.mkdir()
    row = {"kind": "evaluation", "accuracy": 0.1, "model": str(save_path / "quick-cot" / "checkpoint_3")}
    (save_path / "quick-cot").mkdir(exist_ok=True)
    (other / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert quickstart.evaluation_of(run) == place
    for own in (run / "checkpoint_3", Path("moved", "quick-no-cot", "checkpoint_3")):
        (other / "metrics.jsonl").write_text(json.dumps({**row, "model": str(own)}) + "\n")
        assert quickstart.evaluation_of(run) == other


def test_a_missing_run_is_one_line(test_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(UserError, match=r"eval: no evaluation with gold thoughts"):
        quickstart.summarise(tmp_path, test_file, 1.0)
    monkeypatch.setattr(sys, "argv", ["quickstart", str(tmp_path), str(test_file), str(tmp_path / "out"), "--seconds", "1"])
    with pytest.raises(SystemExit) as caught:
        quickstart.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


# --- all methods ---


def write_comparison(save_path: Path, accuracies: dict[str, list[float]]) -> None:
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            directory = save_path / f"{method}-seed{seed}"
            write_run(directory, [(0, 0.5), (3, accuracy)], accuracy)
            zero = directory / "eval" / "test-run-checkpoint_4-latents_0"
            zero.mkdir()
            row = {
                "kind": "evaluation",
                "eval_latents": 0,
                "accuracy": accuracy - 0.3,
                "wrote_steps": 1.0,
                "accuracy_fixed": 0.0,
            }
            append_jsonl(zero / "metrics.jsonl", row)
            longer = directory / "eval" / "longer-run-checkpoint_4"  # the newest, on another file
            longer.mkdir()
            append_jsonl(longer / "metrics.jsonl", {"kind": "evaluation", "accuracy": accuracy - 0.4, "accuracy_fixed": 0.0})
            needed = [f"name={directory.name}", "model_id=m", "train_path=t", "val_path=v", "num_epochs=8"]
            curriculum = ["c_thought=2", "max_latent_stage=3", f"pad_latent_to_max={method in ('codi', 'pccot')}"]
            kind = {"pccot": ["method=codi", "latent_mode=jacobi", "jacobi_iterations=3"]}.get(method, [f"method={method}"])
            save_config(load_config(RunConfig, needed + curriculum + kind), directory / "config.yaml")
        timed = save_path / f"{method}-seed0-single" / "eval" / "valid-run-checkpoint_4"
        timed.mkdir(parents=True)
        append_jsonl(timed / "metrics.jsonl", {"kind": "evaluation", "seconds_per_question": 0.125, "accuracy_fixed": 0.0})


def write_others(directory: Path, right: list[bool]) -> None:
    """A noise experiment that gave each question another one's thoughts."""
    (directory / "progress").mkdir(parents=True)
    for index, one in enumerate(right):
        row = {"index": index, "error": None, "n_latents": 4, "seconds": 1.0}
        conditions = {"other/all": {"majority": {"correct": one}}}
        append_jsonl(directory / "progress" / "part-0.jsonl", {**row, "conditions": conditions})


def compare(save_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    test_file = write_json(save_path / "test.json", chain_records(10, seed=0, split="test", hops=[2]))
    monkeypatch.setattr(sys, "argv", ["compare_methods", str(save_path), str(test_file), str(out), *more])
    compare_methods.main()


def test_comparison_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_path, out = tmp_path / "runs", tmp_path / "out"
    write_comparison(save_path, {"coconut": [0.9, 1.0], "no_cot": [0.5, 0.5]})
    for seed in (0, 1):
        write_others(out / f"coconut-seed{seed}", [True, False, False, False])
    more = ["--seeds", "0", "1", "--methods", "coconut", "no_cot", "--further", "longer.json"]
    compare(save_path, out, monkeypatch, *more)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["methods"]["coconut"]["accuracy"] == pytest.approx(0.95)
    assert summary["methods"]["coconut"]["deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert summary["methods"]["coconut"]["thoughts"] == 4  # two steps each, two thoughts a step
    assert summary["methods"]["no_cot"]["thoughts"] == 0
    assert summary["methods"]["coconut"]["further"] == {"longer": pytest.approx([0.5, 0.6])}
    assert summary["methods"]["coconut"]["passes"] == 1 + 4 + 6.5 - 1  # the question, its thoughts, the other tokens
    assert summary["methods"]["no_cot"]["passes"] == 6.5
    assert summary["methods"]["coconut"]["question_cosine"] == 0.25
    assert summary["methods"]["coconut"]["training_minutes"] == pytest.approx(2 * 2.5 / 60)
    assert summary["depth_shortcut"] == 0.5
    table = (out / "table.md").read_text().splitlines()
    assert table[2].startswith(
        "| Coconut (`coconut`) | 95.0 (82.5 to 100.0) |  | 90.0, 100.0 | 55.0 | 65.0 (100%) | 25.0 | 25.0% | 6.5 | 4.0 | 10.5 | 0.25 |"
        " 0.1250 | 0 to 0 |"
    )
    assert table[3].startswith("| no-CoT (`no_cot`) | 50.0 (35.0 to 65.0) | -45.0 (")
    assert "| 50.0, 50.0 | 10.0 |  |  | 25.0% |" in table[3]  # it has no thoughts
    assert len({line.count("|") for line in table}) == 1
    for name in ("accuracy", "learning_curves"):
        assert image.imread(out / f"{name}.png").shape[0] > 300
    assert (out / "metrics" / "no_cot-seed1-test.jsonl").is_file()


def test_a_run_is_counted_as_the_method_of_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_path, out = tmp_path / "runs", tmp_path / "out"
    write_comparison(save_path, {"codi": [0.5], "pccot": [0.6]})
    for method in ("codi", "pccot"):
        write_others(out / f"{method}-seed0", [True, False])
    compare(save_path, out, monkeypatch, "--seeds", "0", "--methods", "codi", "pccot")
    methods = json.loads((out / "summary.json").read_text())["methods"]
    assert (methods["codi"]["label"], methods["pccot"]["label"]) == ("CODI", "CODI + Jacobi")
    assert methods["codi"]["passes"] - methods["pccot"]["passes"] == methods["codi"]["thoughts"] - (1 + 3)
    assert "| CODI + Jacobi (`pccot`) | 60.0 (" in (out / "table.md").read_text()


def test_packed_runs_make_the_same_table_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scripts/keep_runs.sh, and `tar xf` in another clone."""
    there, here = tmp_path / "there", tmp_path / "here"
    more = ["--seeds", "0", "--methods", "coconut"]
    for place in (there, here):
        place.mkdir()
    monkeypatch.chdir(there)
    write_comparison(Path("runs"), {"coconut": [0.9]})
    write_others(Path("out/coconut-seed0"), [True, False])
    (weights := Path("runs/coconut-seed0/checkpoint_4")).mkdir()
    (weights / "model.safetensors").write_text("large")
    Path("runs/coconut-seed0/finished").touch()
    script = [str(shutil.which("bash")), str(ROOT / "scripts" / "keep_runs.sh"), str(tmp_path / "kept.tar.gz")]
    folders = ["runs/coconut-seed0", "runs/coconut-seed0-single", "out/coconut-seed0"]
    subprocess.run([*script, *folders], check=True, capture_output=True)
    compare(Path("runs"), Path("out"), monkeypatch, *more)

    monkeypatch.chdir(here)
    subprocess.run([str(shutil.which("tar")), "xf", str(tmp_path / "kept.tar.gz")], check=True)
    compare(Path("runs"), Path("out"), monkeypatch, *more)
    assert Path("out/table.md").read_text() == (there / "out" / "table.md").read_text()
    assert Path("runs/coconut-seed0/finished").exists()
    assert not Path("runs/coconut-seed0/checkpoint_4").exists()

    missing = subprocess.run([*script, "runs/coconut-seed1"], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (2, "error: runs/coconut-seed1: no such folder\n")


def test_learning_curves_are_medians_over_seeds_by_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    short, long, middle = ([{"examples": 1000 * n, "accuracy": a * n / 10} for n in (1, 2)] for a in (1, 5, 2))
    plots.learning_curves({"Coconut": [short, long, middle]}, 0.5, tmp_path / "x.png", "title")
    [axes] = drawn[0].axes
    thick = [line for line in axes.get_lines() if line.get_label() == "Coconut"]
    assert thick[0].get_xydata().tolist() == [[1, 20], [2, 40]]
    assert len(axes.get_lines()) == 3 + 1 + 1  # the seeds, their median, chance


def test_comparison_names_the_run_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_comparison(tmp_path / "runs", {"cot": [0.9]})
    with pytest.raises(SystemExit) as caught:
        compare(tmp_path / "runs", tmp_path / "out", monkeypatch, "--seeds", "0", "--methods", "cot", "icot")
    assert caught.value.code == 2
    assert "icot-seed0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_of_methods_is_what_the_code_says() -> None:
    """Made anew by `python -m experiments.methods_page docs/METHODS.md`."""
    assert (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8") == methods_page.page()


def test_the_page_of_methods_shows_every_stage_and_what_carries_loss() -> None:
    page = methods_page.section("coconut").splitlines()
    stages = [line for line in page if line.startswith("    without loss")]
    assert [line.count("<|latent|>") for line in stages] == [0, 2, 4, 4]
    targets = [line for line in page if line.startswith("    with loss")]
    assert [line.count("⏎") for line in targets] == [3, 2, 1, 0]
