"""Files of sharded checkpoints: read again exactly, damage and foreign code refused, failures leave what was there."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import ROOT
from same_run import equal
from tiny_models import tiny_model
from torch.distributed.checkpoint.api import CheckpointException

from coconut import Coconut
from config import RunConfig
from systems import checkpoint, convert, shards
from systems.checkpoint import CheckpointError, Facts, TrainingState
from systems.models import from_shards, load_tokenizer
from systems.shards import read_shards, whole_tensors, write_shards
from utils import UserError, load_config


def tensors(seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    return {"model": {"a.b": torch.randn(4, 3, generator=random)}, "optimizer": {"a.b": {"step": torch.tensor(float(seed))}}}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", tensors(1))
    return tmp_path / "shards"


def test_tensors_come_back_as_they_were(written: Path) -> None:
    found = tensors(2)
    read_shards(written, found)
    assert equal(found, tensors(1))
    assert equal(whole_tensors(written, "optimizer"), {"a.b.step": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"model": {"a.b": torch.zeros(4, 2)}}, "model.a.b"),
        ({"model": {"c": torch.zeros(4, 3)}}, "model.c"),
    ],
)
def test_what_does_not_fit_is_named(written: Path, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"cannot be read: .*({message})"):
        read_shards(written, wanted)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_damaged_files_are_one_line(written: Path, name: str, damage: str) -> None:
    content = (written / name).read_bytes()
    (written / name).unlink()
    if damage != "gone":
        (written / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match="shards: cannot be read") as error:
        read_shards(written, tensors(2))
    assert "\n" not in str(error.value)


class Bomb:
    def __init__(self, command: tuple[Any, ...]) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return self.command


@pytest.mark.parametrize("name", ["pickle", "os", "ThreadPoolExecutor", "Callable", "Metadata.__init__"])
def test_metadata_names_nothing_but_its_own_classes(written: Path, name: str) -> None:
    (written / ".metadata").write_bytes(f"ctorch.distributed.checkpoint.filesystem\n{name}\n.".encode())
    with pytest.raises(UserError, match="which no checkpoint of tensors needs"):
        read_shards(written, tensors(2))


@pytest.mark.parametrize(
    "command",
    [
        (os.mkdir, ("hit",)),
        (eval, ("__import__('os').mkdir('hit')",)),
        (torch.load, ("hit",)),
    ],
)
def test_metadata_cannot_run_code(written: Path, command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written.parent)
    (written / ".metadata").write_bytes(pickle.dumps(Bomb(command)))
    with pytest.raises(UserError, match="which no checkpoint of tensors needs"):
        read_shards(written, tensors(2))
    assert not (written.parent / "hit").exists()


def test_entries_that_are_no_tensors_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with shards._quiet():
        dcp.save({"model": {"a": Bomb((os.mkdir, ("hit",)))}}, checkpoint_id=tmp_path / "shards")
    with pytest.raises(UserError, match="model.a is no tensor"):
        read_shards(tmp_path / "shards", {"model": {"a": object()}})
    assert not (tmp_path / "hit").exists()


# --- checkpoints with shards ---


def save(directory: Path, background: bool = False) -> Coconut:
    """A checkpoint of one process after one optimizer step."""
    base, ids = tiny_model("llama", dtype=torch.float32)
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    facts = Facts("cot", 0, 1, 0, True, 1, None, ids.start_latent, ids.end_latent, ids.latent, ids.eos)
    tokenizer = load_tokenizer(str(ROOT / "configs" / "llama_small"))
    writer = checkpoint.Writer(background)
    checkpoint.save(directory, model, optimizer, tokenizer, facts, TrainingState(), writer, in_shards=True)
    with torch.no_grad():
        saved = {name: value.clone() for name, value in base.state_dict().items()}
        for parameter in model.parameters():
            parameter.zero_()  # what comes after must not reach a file that is still being written
    writer.wait()
    base.load_state_dict(saved)
    return model


@pytest.fixture
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_in_shards_is_the_model(
    tmp_path: Path, background: bool, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, there, threads = dcp.FileSystemWriter.write_data, [], []

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        there.extend(path.name for path in tmp_path.iterdir())
        threads.append(threading.current_thread() is threading.main_thread())
        return write(*args, **kwargs)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", late)
    model = save(tmp_path / "checkpoint_1", background)
    assert equal(dict(from_shards(tmp_path / "checkpoint_1").state_dict()), dict(model.base_causallm.state_dict()))
    half = from_shards(tmp_path / "checkpoint_1", dtype=torch.bfloat16).state_dict()
    assert equal(dict(half), {key: value.bfloat16() for key, value in model.base_causallm.state_dict().items()})
    assert there == [".checkpoint_1.partial"]
    assert threads == [not background]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


@pytest.mark.parametrize("background", [False, True])
def test_shards_that_cannot_be_written_leave_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, process_group: None
) -> None:
    model = save(tmp_path / "checkpoint_1")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(CheckpointError, match=r"checkpoint_2: the checkpoint could not be written: .*No space left"):
        save(tmp_path / "checkpoint_2", background)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]
    assert equal(dict(from_shards(tmp_path / "checkpoint_1").state_dict()), dict(model.base_causallm.state_dict()))


def test_the_first_process_that_fails_is_named() -> None:
    error = CheckpointException("write", {3: (OSError(28, "No space left on device"), None), 1: (OSError("first\nline"), None)})
    assert shards._reason(error) == "first"


def test_consolidate_says_what_it_needs(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoint_1")
    with pytest.raises(UserError, match="is there already"):
        convert.consolidate(tmp_path / "run", tmp_path / "run")
    with pytest.raises(UserError, match="not a sharded checkpoint"):
        convert.consolidate(tmp_path / "nowhere", tmp_path / "new")
    (tmp_path / "run" / "checkpoint_1" / "shards" / ".metadata").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"\.metadata has 3 bytes"):
        convert.consolidate(tmp_path / "run" / "checkpoint_1", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sharded_checkpoints=true"], "sharded_checkpoints needs parallel: fsdp"),
        (["fsdp_gather=step"], "fsdp_gather: step needs parallel: fsdp"),
        (["parallel=fsdp", "compile=true"], "compile: it takes the decoder as one piece"),
        (["sharded_checkpoints=true", "parallel=fsdp", "trust_remote_code=true"], "is not kept beside shards"),
    ],
)
def test_options_that_could_not_work_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, ["name=x", "model_id=m", "train_path=t", "val_path=v", "cot=true", *arguments])
