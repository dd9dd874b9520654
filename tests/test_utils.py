"""Configuration: precedence, and one clear line for everything that does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from config import RunConfig
from experiments.ablation import AblationConfig
from experiments.checks.branch_check import QuickBranchConfig
from experiments.checks.selfcheck import CheckConfig
from experiments.noise.settings import BranchConfig, FullConfig, SweepConfig
from experiments.probe import ProbeConfig
from methods import scheduled_stage
from systems.files import read_typed
from systems.writing import append_jsonl, save_config
from utils import UserError, check_environment, description, entry_point, load_config, no_such_file, read_text

PROGRAMS = {
    "run.py": RunConfig,
    "test.py": SweepConfig,
    "run_noisy_experiment.py": BranchConfig,
    "full_test.py": FullConfig,
    "experiments.ablation": AblationConfig,
    "experiments.probe": ProbeConfig,
}
COCONUT = ["method=coconut", "max_latent_stage=1"]
NEEDED = ["name=x", "model_id=m", "val_path=v.json", "train_path=t.json"]


def load(*arguments: str) -> RunConfig:
    return load_config(RunConfig, [*NEEDED, *arguments])


def test_command_line_beats_yaml_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("method: cot\nlr: !!float '1e-5'\nnum_epochs: 4\n")
    config = load_config(RunConfig, [*NEEDED, str(path), "num_epochs=7"])
    assert (config.lr, config.num_epochs, config.weight_decay) == (1e-5, 7, 0.01)


@pytest.mark.parametrize("path", sorted((ROOT / "args").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_in_args_loads_and_says_how_it_is_run(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    [program] = [name for name in PROGRAMS if f" {name} " in header[0]]
    config = load_config(PROGRAMS[program], [str(path)])
    assert getattr(config, "only_eval", False) == ("eval" in path.stem)
    assert any(f"args/{path.name}" in line for line in header)
    assert any("Hardware:" in line for line in header)
    assert any("Expected:" in line for line in header)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["val_path=data/gsm_valid.json"], 64),
        (["val_path=data/prosqa_valid.json"], 128),
        (["val_path=data/gsm_valid.json", "max_new_tokens=null"], 64),
        (["val_path=data/prosqa_valid.json", "max_new_tokens=None"], 128),
        (["val_path=data/gsm_valid.json", "max_new_tokens=7"], 7),
    ],
)
def test_answers_are_as_long_as_in_the_published_code(given: list[str], expected: int) -> None:
    """Its files have no key max_new_tokens."""
    config = load_config(RunConfig, ["name=x", "method=cot", "model_id=m", "train_path=t", *given])
    assert config.max_new_tokens == expected


def test_published_spellings_load() -> None:
    config = load("coconut=True", "cot=False", "load_model_path=None", 'lr=!!float "1e-4"', "bf16=False")
    assert config.method == "coconut"
    assert config.load_model_path is None
    assert config.lr == 1e-4
    assert load("method=no_cot").no_cot is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=cot", "weight_deacy=0.1"], "command line: unknown key 'weight_deacy'; did you mean 'weight_decay'?"),
        (["method=cot", "lr=fast"], "command line: lr: input should be a valid number"),
        (["method=cot", "num_epochs=0"], "num_epochs: input should be greater than or equal to 1, got 0"),
        (["method=cot", "num_epochs=2.5"], "num_epochs: input should be a valid integer"),
        (["method=cot", "lr=.nan"], "lr: input should be a finite number"),
        (["method=cot", "uniform_prob=1.5"], "uniform_prob: input should be less than or equal to 1"),
        (["method=cott"], "method: must be one of coconut, cot, "),
        (
            ["coconut=true", "cot=true"],
            "exactly one of coconut, cot, no_thoughts, no_cot, no_curriculum, pause, pause_as_thought, icot, codi, simcot, codi_simcot, codi_kv must be chosen, found coconut and cot",
        ),
        (["method=coconut", "cot=true"], "found cot and coconut"),
        ([], "must be chosen, found none"),
        (["method=cot", "thought_map=norm"], "thought_map: norm has no effect with method cot"),
        (["method=cot", "only_eval=true"], "only_eval needs load_model_path"),
        (["method=cot", "resume=3", "num_epochs=9", "from_scratch=true"], "resume and from_scratch contradict each other"),
        (["method=cot", "lora_alpha=8"], "lora_alpha needs lora_r"),
        (["method=cot", "lora_r=0"], "lora_r: input should be greater than or equal to 1, got 0"),
        (["method=cot", "lora_r=4", "lora_dropout=1"], "lora_dropout: input should be less than 1"),
        (["method=cot", "lora_r=4", "from_scratch=true"], "lora_r and from_scratch contradict each other"),
        (["method=cot", "lora_r=4", "bf16=pure"], "lora_r: bf16: pure would train"),
        (["method=cot", "lora_r=4", "parallel=fsdp"], "use parallel: ddp"),
        (["method=cot", "resume=9", "num_epochs=9", "load_model_path=x"], "resume: 9 leaves nothing to train: num_epochs is 9"),
        (["method=cot", "from_scratch=true", "load_model_path=x"], "from_scratch and load_model_path contradict each other"),
        (["method=coconut", "c_thought=0"], "c_thought: 0 leaves coconut without thoughts"),
        (["method=coconut", "num_epochs=2"], "max_latent_stage: 0 leaves coconut without thoughts"),
        (["method=cot", "icot_smoothing=3"], "icot_smoothing: 3.0 has no effect with method cot: leave it out"),
        (["method=cot", "codi_distillation_weight=7"], "codi_distillation_weight: 7.0 has no effect with method cot"),
        ([*COCONUT, "simcot_weight=3"], "simcot_weight: 3.0 has no effect with method coconut"),
        ([*COCONUT, "jacobi_iterations=5"], "jacobi_iterations: 5 has no effect with latent_mode sequential"),
        (["method=cot", "name=../../x"], "must be a folder below save_path"),
        (["method=cot", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["method=cot", "lr=[1"], "not valid YAML"),
        (["method=cot", "nonsense"], "neither a YAML file nor key=value"),
        (["method=cot", "parallel=dp"], "parallel: input should be 'ddp' or 'fsdp'"),
    ],
)
def test_wrong_configurations_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_and_wrong_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_id: missing; it must be set"):
        load_config(RunConfig, ["method=cot", "name=x", "val_path=v", "train_path=t"])
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match=r"list.yaml: expected `key: value` lines, found list"):
        load_config(RunConfig, [str(path)])
    path.write_text("lr: x\nmethod: cot\n")
    with pytest.raises(UserError, match=r"list.yaml: lr: input should be a valid number"):
        load_config(RunConfig, [*NEEDED, str(path)])


def test_saved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = load("method=no_thoughts", "bf16=pure", "grad_clip=1")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(RunConfig, [str(tmp_path / "config.yaml")]) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["load_model_path"] is None


def test_stages_follow_the_epochs_and_end_past_the_last() -> None:
    config = load("method=coconut", "epochs_per_stage=5", "max_latent_stage=2", "num_epochs=50")
    assert [scheduled_stage(config.curriculum, epoch) for epoch in (0, 4, 5, 10, 15, 20, 49)] == [0, 0, 1, 2, 3, 3, 3]
    assert scheduled_stage(load("method=cot", "num_epochs=50").curriculum, 49) == 0


# --- what people write who come from the published code ---


@pytest.mark.parametrize("kind", [*PROGRAMS.values(), CheckConfig, QuickBranchConfig], ids=lambda kind: kind.__name__)
def test_help_names_every_key_with_default_and_description(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(kind, ["x.yaml", "--help"], "About it.", "args/x.yaml")
    assert not stop.value.code
    text = capsys.readouterr().out
    assert text.startswith("About it.")
    assert "Without arguments: args/x.yaml." in text
    for name, field in kind.model_fields.items():
        if name not in getattr(kind, "unused", tuple)():
            assert len(description(kind, name)) > 5, name
            default = "needed" if field.is_required() else field.get_default(call_default_factory=True)
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            shown = "[" if isinstance(default, list) else shown
            assert f"  {name} ({shown}" in text


def test_without_arguments_the_default_file_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_config(SweepConfig, [], default="args/noise_sweep.yaml").name == "noise_scale"
    monkeypatch.chdir(tmp_path)  # from elsewhere too
    assert load_config(SweepConfig, [], default="args/noise_sweep.yaml").name == "noise_scale"
    with pytest.raises(UserError, match="name: missing; .*; args/noise_sweep.yaml has everything that is needed"):
        load_config(SweepConfig, ["noise_type=snr"], default="args/noise_sweep.yaml")


def test_a_number_alone_is_taken_for_a_number_of_questions() -> None:
    with pytest.raises(UserError, match="'1000' is neither a YAML file nor key=value; did you mean num_questions=1000"):
        load_config(QuickBranchConfig, ["1000"])


@pytest.mark.parametrize("text", ["1.10", "2024_01_01", "12:30:00", "010", "yes", "1e3", "0x10", "2024-01-01"])
def test_text_stays_as_it_is_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"method: cot\nname: {text}\ntrain_path: {text}\n")
    config = load_config(RunConfig, [*NEEDED, str(path)])
    assert (config.name, config.train_path) == (text, text)
    assert load("method=cot", f"name={text}").name == text
    assert load("method=cot", f"name='{text}'").name == text


@pytest.mark.parametrize(
    "text",
    [
        "num_epochs=010",
        "num_epochs=12:30:00",
        "num_epochs=0x10",
        "num_epochs=1_000",
        "num_epochs='1_000'",
        "lr=1_0.5",
        "lr=1:30.5",
        "lr=1_0e-4",
        "lr=!!float '1:30'",
    ],
)
def test_numbers_in_odd_notations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write the number in plain decimal digits"):
        load("method=cot", text)


def test_numbers_in_plain_notations_are_taken() -> None:
    for text, number in {"1e-4": 1e-4, "1.5e-4": 1.5e-4, "'1e-4'": 1e-4, ".5": 0.5, "5": 5.0}.items():
        assert load("method=cot", f"lr={text}").lr == number
    assert load_config(SweepConfig, ["name=x", "model_id=m", "benchmark=gsm8k", "noise_scales=[0.5, 1]"]).noise_scales == [
        0.5,
        1,
    ]
    with pytest.raises(UserError, match="write the number in plain decimal digits"):
        load_config(SweepConfig, ["name=x", "model_id=m", "benchmark=gsm8k", "noise_scales=[1_0.5]"])


def test_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load("method=cot", "save_path=~/runs", "load_model_path=")
    assert config.save_path == str(tmp_path / "runs")
    assert config.load_model_path is None
    assert load("method=cot", 'load_model_path=""').load_model_path is None
    for key in ("load_model_path", "model_id", "val_path", "save_path"):
        with pytest.raises(UserError, match=f"{key}: a placeholder of the published files: put your own path"):
            load("method=cot", f"{key}=YOUR_PATH_TO_COT_CHECKPOINT!")
    with pytest.raises(UserError, match="save_path: no such user"):
        load("method=cot", "save_path=~nobody_here/x")


def test_every_file_that_args_names_has_its_command() -> None:
    for path in (ROOT / "args").glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        for key in ("train_path", "val_path", "data_path"):
            if values.get(key):
                assert "` makes it" in no_such_file(Path(values[key])), values[key]
    assert "gsm_icot.bash" in no_such_file(Path("data/gsm_train.json"))
    assert no_such_file(Path("data/mine.json")) == "data/mine.json: no such file"
    assert "bash scripts/quickstart.sh" in no_such_file(Path("checkpoints/seed3/quick-coconut"))
    for slip, meant in {
        "args/prosqa_coconutt.yaml": "args/prosqa_coconut.yaml",
        "data/prosqa_tset.json": "data/prosqa_test.json",
    }.items():
        assert no_such_file(ROOT / slip).endswith(f"no such file; did you mean {ROOT / meant}?")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    uses = (
        lambda: load(str(pipe)),
        lambda: read_text(pipe),
        lambda: append_jsonl(pipe, {}),
        lambda: read_typed(pipe, dict[str, int]),
    )
    for use in uses:
        with pytest.raises(UserError, match=r"pipe\.yaml: not a regular file"):
            use()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "abc"}, "RANK=abc: a whole number of at least 0"),
        ({"RANK": "1"}, "RANK=1 of WORLD_SIZE=1 processes"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: a whole number of at least 1"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=2 of WORLD_SIZE=2 processes"),
    ],
)
def test_an_environment_that_torchrun_would_not_make(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    check_environment()
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match="2"):
        entry_point(lambda _: None)()
    [line] = capsys.readouterr().err.splitlines()  # whatever the rank
    assert message in line


def test_a_reader_that_has_gone_stops_the_run_as_sigterm_does() -> None:
    """The second line meets a closed pipe: the handler of SIGTERM runs, and what is written afterwards goes nowhere."""
    program = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: print("stopped", file=sys.stderr))
from utils import get_logger
get_logger().info("first")
sys.stdin.readline()
from systems.metrics import show
from rich.table import Table
show(Table("second"))
get_logger().info("third")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("go\n", timeout=60)
    assert (process.returncode, errors) == (0, "stopped\n")
