"""Configuration: precedence, and one clear line for everything that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from experiments.ablation import AblationConfig
from experiments.settings import BranchConfig, FullConfig, SweepConfig
from utils import RunConfig, UserError, load_config, save_config

PROGRAMS = {
    "run.py": RunConfig,
    "test.py": SweepConfig,
    "run_noisy_experiment.py": BranchConfig,
    "full_test.py": FullConfig,
    "experiments.ablation": AblationConfig,
}
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
        (["method=cott"], "method: input should be"),
        (
            ["coconut=true", "cot=true"],
            "exactly one of coconut, cot, no_thoughts, no_cot, no_curriculum, pause, pause_as_thought, icot must be chosen, found coconut and cot",
        ),
        (["method=coconut", "cot=true"], "found cot and coconut"),
        ([], "must be chosen, found none"),
        (["method=cot", "only_eval=true"], "only_eval needs load_model_path"),
        (["method=cot", "resume=3", "num_epochs=9", "from_scratch=true"], "resume: 3 starts from a model that was trained"),
        (["method=cot", "lora_alpha=8"], "lora_alpha needs lora_r"),
        (["method=cot", "lora_r=0"], "lora_r: input should be greater than or equal to 1, got 0"),
        (["method=cot", "lora_r=4", "lora_dropout=1"], "lora_dropout: input should be less than 1"),
        (["method=cot", "lora_r=4", "from_scratch=true"], "lora_r and from_scratch contradict each other"),
        (["method=cot", "lora_r=4", "bf16=pure"], "lora_r: bf16: pure would train"),
        (["method=cot", "lora_r=4", "parallel=fsdp"], "use parallel: ddp"),
        (["method=cot", "resume=9", "num_epochs=9", "load_model_path=x"], "resume: 9 leaves nothing to train: num_epochs is 9"),
        (["method=cot", "from_scratch=true", "load_model_path=x"], "from_scratch and load_model_path contradict each other"),
        (["method=coconut", "c_thought=0"], "c_thought: 0 leaves coconut without thoughts"),
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
    assert [config.scheduled_stage(epoch) for epoch in (0, 4, 5, 10, 15, 20, 49)] == [0, 0, 1, 2, 3, 3, 3]
    assert load("method=cot", "num_epochs=50").scheduled_stage(49) == 0
