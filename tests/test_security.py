"""What a model, a checkpoint or a configuration must not be able to do: run code, leave the save directory, ask for input."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read_evaluation, read_rows, write_json
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import run
from config import RunConfig
from experiments.noise.settings import BranchConfig, FullConfig, SweepConfig
from systems import sources, storage
from utils import Config, UserError, load_config


def start(arguments: list[str], *more: str) -> None:
    run.main.__wrapped__([*arguments, *more])


@pytest.fixture
def weights(model_directory: Path) -> Path:
    """The tiny Llama with its weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_directory)).save_pretrained(model_directory)
    return model_directory


# --- code that comes with a model ---

CONFIGURATION = """
from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "tiny_with_code"
"""
MODELLING = """
from pathlib import Path

from transformers import LlamaForCausalLM

from .configuration_tiny import TinyConfig

Path({witness!r}).touch()


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}


@pytest.fixture
def own_code(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that brings its own code, which leaves the file tmp_path/ran when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])  # the cache is put there
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("standard input was asked"))
    (model_directory / "configuration_tiny.py").write_text(CONFIGURATION)
    (model_directory / "modeling_tiny.py").write_text(MODELLING.format(witness=str(tmp_path / "ran")))
    config = json.loads((model_directory / "config.json").read_text())
    config |= {"model_type": "tiny_with_code", "architectures": ["TinyForCausalLM"], "auto_map": AUTO_MAP}
    write_json(model_directory / "config.json", config)
    return model_directory


def test_a_models_own_code_is_not_run_unless_it_is_trusted(own_code: Path, run_arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it brings its own code.*set trust_remote_code: True if you have read it") as caught:
        start(run_arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_known_family_with_code_for_the_model_alone_is_not_run_either(
    own_code: Path, run_arguments: list[str], tmp_path: Path
) -> None:
    """The configuration is that of a family without a causal model, so that only the code could make one."""
    config = json.loads((own_code / "config.json").read_text())
    config |= {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]}}
    write_json(own_code / "config.json", config)
    with pytest.raises(UserError, match="trust_remote_code: True"):
        start(run_arguments)
    assert not (tmp_path / "ran").exists()


def test_a_trusted_model_trains_resumes_and_is_evaluated_from_its_checkpoint_alone(
    own_code: Path, run_arguments: list[str], tmp_path: Path
) -> None:
    trusted = ["trust_remote_code=true", "max_new_tokens=2", "max_latent_stage=1"]
    start(run_arguments, *trusted, "num_epochs=1")
    assert (tmp_path / "ran").exists()
    first = tmp_path / "checkpoints" / "run" / "checkpoint_1"
    assert {path.name for path in first.glob("*.py")} == {"configuration_tiny.py", "modeling_tiny.py"}
    assert json.loads((first / "config.json").read_text())["auto_map"] == AUTO_MAP
    start(run_arguments, *trusted, "num_epochs=2")
    second = first.with_name("checkpoint_2")
    assert {path.name for path in second.glob("*.py")} == {"configuration_tiny.py", "modeling_tiny.py"}
    assert not torch.equal(*(load_file(path / "model.safetensors")["model.norm.weight"] for path in (first, second)))
    evaluation = [*trusted, "from_scratch=false", "only_eval=true", f"load_model_path={second}", f"model_id={second}"]
    (tmp_path / "ran").unlink()
    with pytest.raises(UserError, match="trust_remote_code: True"):
        start(run_arguments, *evaluation, "name=refused", "trust_remote_code=false")
    assert not (tmp_path / "ran").exists()
    for path in own_code.glob("*.py"):
        path.unlink()
    start(run_arguments, *evaluation, "name=evaluated")
    row = read_evaluation(tmp_path / "checkpoints" / "evaluated")
    epochs = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "epoch")
    assert row["loss"] == pytest.approx(epochs[-1]["val_loss"], rel=1e-5)


def test_the_experiments_trust_a_model_the_same_way(own_code: Path, tmp_path: Path) -> None:
    from experiments.noise.subjects import load_subject

    torch.manual_seed(0)
    options = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(own_code, **options)
    AutoModelForCausalLM.from_config(config, **options).save_pretrained(own_code)
    (tmp_path / "ran").unlink()
    keys = ["name=x", "benchmark=prosqa", f"model_id={own_code}"]
    with pytest.raises(UserError, match="trust_remote_code: True"):
        load_subject(load_config(SweepConfig, keys), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    subject = load_subject(load_config(SweepConfig, [*keys, "trust_remote_code=true"]), torch.device("cpu"))
    assert type(subject.model.base_causallm).__name__ == "TinyForCausalLM"


@pytest.mark.parametrize("kind", [RunConfig, SweepConfig])
def test_attention_kernels_of_a_hub_are_code_too(kind: type[Config]) -> None:
    keys = {
        RunConfig: ["method=cot", "model_id=m", "val_path=v", "train_path=t"],
        SweepConfig: ["benchmark=prosqa", "model_id=m"],
    }
    arguments = ["name=x", *keys[kind], "attn_implementation=somebody/attention"]
    with pytest.raises(
        UserError, match="attn_implementation: 'somebody/attention' is code from a hub.*trust_remote_code: True"
    ):
        load_config(kind, arguments)
    assert load_config(kind, [*arguments, "trust_remote_code=true"]).attn_implementation == "somebody/attention"


# --- pickles ---


class Bomb:
    """Leaves a file behind when its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["bomb.bin", "bomb.pt", "bomb.pth", "plain.pt"])
def test_a_state_dict_with_code_is_refused(weights: Path, run_arguments: list[str], tmp_path: Path, name: str) -> None:
    bomb = {"model.norm.weight": Bomb(tmp_path / "ran")}
    if name.startswith("plain"):
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, tmp_path / name)
    with pytest.raises(UserError, match="not a state dict of tensors"):
        start(run_arguments, "from_scratch=false", f"load_model_path={tmp_path / name}")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_model_directory_with_a_pickle_of_code_is_refused(weights: Path, run_arguments: list[str], tmp_path: Path) -> None:
    (weights / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(tmp_path / "ran")}, weights / "pytorch_model.bin")
    with pytest.raises(UserError, match="no causal language model could be loaded"):
        start(run_arguments, "from_scratch=false")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_training_state_with_code_is_refused(run_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*run_arguments, "max_new_tokens=2"]
    start(arguments, "num_epochs=1")
    directory = tmp_path / "checkpoints" / "run" / "checkpoint_1"
    torch.save({"state": {}, "optimizer": Bomb(tmp_path / "ran"), "rng": [], "adapter": None}, directory / "training_state.pt")
    (directory / storage.MANIFEST).unlink()
    storage.write_manifest(directory)  # whoever plants a file can write that too
    with pytest.raises(UserError, match="training_state.pt: damaged"):
        start(arguments, "num_epochs=2")
    assert not (tmp_path / "ran").exists()
    assert not list(directory.parent.glob(".*"))


def test_safetensors_are_loaded_where_there_are_pickles_too(weights: Path, run_arguments: list[str], tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Bomb(tmp_path / "ran")}, weights / "pytorch_model.bin")
    state = load_file(weights / "model.safetensors")
    state["model.norm.weight"] += 3
    save_file(state, weights / "model.safetensors", metadata={"format": "pt"})
    config = load_config(RunConfig, [*run_arguments, "from_scratch=false"])
    tokenizer = sources.load_run_tokenizer(config)
    from systems.models import build_model, latent_ids

    model = build_model(config, tokenizer, latent_ids(tokenizer, config.method))
    assert torch.equal(model.base_causallm.get_parameter("model.norm.weight"), state["model.norm.weight"])
    assert not (tmp_path / "ran").exists()


def test_every_pickle_is_read_as_weights_only() -> None:
    for path in [*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py"), *(ROOT / "preprocessing").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True"), path.name
        for word in (
            "pickle.load",
            "shell=True",
            "os.system(",
            "yaml.unsafe",
            "yaml.full_load",
            "yaml.Loader",
            "allow_pickle=True",
        ):
            assert word not in text, f"{path.name}: {word}"


# --- names ---

KINDS: dict[str, tuple[type[Config], list[str]]] = {
    "run.py": (RunConfig, ["method=cot", "model_id=m", "val_path=v", "train_path=t"]),
    "test.py": (SweepConfig, ["benchmark=prosqa", "model_id=m"]),
    "run_noisy_experiment.py": (BranchConfig, ["benchmark=prosqa", "model_id=m"]),
    "full_test.py": (FullConfig, ["benchmark=prosqa", "model_id=m"]),
}
OUTSIDE = [
    "../../x",
    "..",
    "/x",
    "//x",
    "a/../../b",
    "a/..",
    "",
    " ",
    ".",
    "./.",
    "a\nb",
    "a\0b",
    "a\rb",
    "\x1b[2J",
]


def test_an_ablation_has_the_same_keys() -> None:
    ablation = pytest.importorskip("experiments.ablation", exc_type=ImportError)  # not with the oldest requirements
    assert issubclass(ablation.AblationConfig, SweepConfig)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_a_name_is_a_folder_below(kind: str, name: str, tmp_path: Path) -> None:
    model, keys = KINDS[kind]
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({"name": name}))  # YAML reads what JSON writes
    with pytest.raises(UserError, match=r"name: .*(must be a folder below|a path cannot hold)") as caught:
        load_config(model, [str(path), *keys])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_names_are_folders(kind: str) -> None:
    model, keys = KINDS[kind]
    for name in ("x", "a/b", "a.b-c_1", "..x", "ö", "two words"):
        assert load_config(model, [*keys, f"name={name}"]).name == name  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", ["model_id", "load_model_path", "train_path", "val_path", "save_path", "gguf_file"])
def test_a_path_that_is_none_is_one_line(run_arguments: list[str], tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({key: "a\0b"}))
    with pytest.raises(UserError, match=f"x.yaml: {key}: a path cannot hold"):
        start(run_arguments, str(path))


# --- shells ---


def test_what_a_configuration_holds_reaches_no_shell(tmp_path: Path) -> None:
    """The arguments of a script come to the program as they are."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n')
    python.chmod(0o755)
    hostile = ["name=$(touch ran)", "name=`touch ran`", "name=a; touch ran", 'name="; touch ran', "name=* ?", "name='"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "PROCESSES": "1", "ARGUMENTS": str(tmp_path / "arguments")}
    for script in ("run_experiment.sh", "run_simple_experiment.sh", "run_branch_experiment.sh"):
        command = ["bash", str(root / "scripts" / script), *hostile]
        subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=60)
        assert (tmp_path / "arguments").read_text().splitlines()[-len(hostile) :] == hostile
        assert not list(tmp_path.rglob("ran"))


def test_errors_do_not_reach_the_terminal_as_commands(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "\x1b[2J\nerror: twice\u2028.yaml"])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line == "error: \\x1b[2J error: twice .yaml: no such file"
    assert line.isprintable()
