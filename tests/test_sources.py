"""Where a run begins: which checkpoint, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import save_dir, start, stop_after, weights  # noqa: F401

import training
from config import RunConfig
from systems import files, sources
from systems.checkpoint import CheckpointError
from systems.storage import complete_checkpoints
from utils import UserError


def test_best_is_not_newest(run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """@best, also when the newest checkpoint is one of Ctrl-C inside the first epoch of a new stage."""
    accuracies = iter([0.9, 0.8, 0.3])
    original = training.Evaluator.evaluate

    def evaluate(self: Any, model: Any, stage: int) -> Any:
        result = original(self, model, stage)
        result.accuracy = next(accuracies)
        return result

    def found(name: str) -> str:
        start = {"name": "x", "model_id": "m", "method": "coconut", "val_path": "v", "only_eval": True}
        config = RunConfig(**start, load_model_path=str(save_dir / f"run{name}"))
        return Path(str(sources.resolve_paths(config).load_model_path)).name

    monkeypatch.setattr(training.Evaluator, "evaluate", evaluate)
    start(run_arguments, "num_epochs=2", "epochs_per_stage=2", "keep_last=1")
    steps = files.read_training_state(save_dir / "run" / "checkpoint_2")["state"]["global_step"]
    assert [found(""), found("@best")] == ["checkpoint_2", "checkpoint_1"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, steps + 2, signal.SIGINT)
        start(run_arguments, "num_epochs=3", "epochs_per_stage=2", "keep_last=1")
    assert [found(""), found("@best")] == [f"checkpoint_2_step{steps + 2}", "checkpoint_1"]
    weights = save_dir / "run" / "checkpoint_1" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint_1: model.safetensors has 1,000 bytes"):
        found("@best")
    weights.write_bytes(content)
    start(run_arguments, "num_epochs=3", "epochs_per_stage=2")
    assert [found(""), found("@best")] == ["checkpoint_3", "checkpoint_3"]  # of the last stage
    with pytest.raises(CheckpointError, match="nothing holds no checkpoint that was evaluated, so none is the best"):
        found("/nothing@best")


def test_best_accuracy_is_compared_within_one_stage(
    run_arguments: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.9, 0.9, 0.3, 0.2, 0.4, 0.1])  # as good as before is not better
    original = training.Evaluator.evaluate

    def evaluate(self: Any, model: Any, stage: int) -> Any:
        result = original(self, model, stage)
        result.accuracy = next(accuracies)
        return result

    monkeypatch.setattr(training.Evaluator, "evaluate", evaluate)
    start(run_arguments, "save_only_improve=true", "num_epochs=6", "epochs_per_stage=2")
    kept = [path.name for path in complete_checkpoints(save_dir / "run")]
    assert kept == ["checkpoint_1", "checkpoint_3", "checkpoint_5"]


def test_save_directories_of_another_method_or_damaged_state_are_refused(run_arguments: list[str], save_dir: Path) -> None:
    start(run_arguments, "num_epochs=1")
    with pytest.raises(UserError, match="was trained with method coconut, not no_thoughts: choose another name"):
        start(run_arguments, "method=no_thoughts", "num_epochs=2")
    (save_dir / "run" / "checkpoint_1" / "manifest.json").unlink()  # as versions before 0.2 wrote it
    (save_dir / "run" / "checkpoint_1" / "training_state.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"training_state.pt: damaged or of another version"):
        start(run_arguments, "num_epochs=2")


def test_a_model_path_without_a_model_is_named(run_arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load_model_path: .*nothing: no such file"):
        start(run_arguments, "from_scratch=false", f"load_model_path={tmp_path}/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither a model"):
        start(run_arguments, "from_scratch=false", f"load_model_path={tmp_path}/empty")


@pytest.mark.parametrize("known", [True, None])
def test_evaluation_uses_the_chat_template_of_the_training(tmp_path: Path, known: bool | None) -> None:
    facts = dataclasses.asdict(files.Facts("coconut", 1, 2, 3, True, 4, None, 5, 6, 7, 8, chat_template=True))
    if known is None:  # checkpoints of version 0.1 do not say
        del facts["chat_template"]
    (tmp_path / "coconut.json").write_text(json.dumps(facts))
    asked = RunConfig(
        name="x", model_id="m", method="coconut", val_path="v", only_eval=True, load_model_path=str(tmp_path), lora_r=4
    )
    config, stage, epoch = sources.evaluation_config(asked)
    assert (config.chat_template, stage, epoch) == (known is True, 1, 4)
    assert config.lora_r is None  # merged already
