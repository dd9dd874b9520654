"""FSDP2 in two processes: what is gathered and reduced how often, and that training is that of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, read_evaluation, read_rows
from processes import launch
from safetensors.torch import load_file
from same_run import equal, timeless_rows
from test_run import losses, start
from tiny_models import FAMILIES, tiny_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from coconut import Coconut
from config import RunConfig
from systems import convert, distributed, files

# run.py several times in the same two processes; each writes the collectives of its first optimizer steps.
SEVERAL = """
import contextlib, json, os, pathlib, sys
sys.path.insert(0, {root!r})
import run, training
from systems import distributed
from torch.utils._python_dispatch import TorchDispatchMode
class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {{}}))
step, steps = training.Trainer._optimizer_step, []
def counting(self, batches):
    with Collectives() as done:
        result = step(self, batches)
    steps.append([sum(name.startswith("c10d::" + kind) for name in done.names) for kind in ("_allgather", "_reduce_scatter")])
    return result
training.Trainer._optimizer_step = counting
with distributed.process_group() as device:
    distributed.process_group = lambda timeout: contextlib.nullcontext(device)
    for number, arguments in enumerate(json.loads(pathlib.Path({runs!r}).read_text())):
        steps.clear()
        run.main.__wrapped__(arguments)
        pathlib.Path({runs!r} + f".{{number}}.rank{{os.environ['RANK']}}").write_text(json.dumps(steps))
"""
BLOCKS = 2  # of the tiny model
GROUPS = BLOCKS + 1  # and the root


def several(tmp_path: Path, run_arguments: list[str], variants: dict[str, list[str]]) -> dict[str, list[dict[str, int]]]:
    """Train each variant under its name on two processes; the collectives of each optimizer step of rank 0."""
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps([[*run_arguments, *more, f"name={name}"] for name, more in variants.items()]))
    script = tmp_path / "several.py"
    script.write_text(SEVERAL.format(root=str(ROOT), runs=str(runs)))
    result = launch(2, [], script=script)
    assert result.returncode == 0, result.stderr
    counts = [
        [json.loads(Path(f"{runs}.{number}.rank{rank}").read_text()) for rank in range(2)] for number in range(len(variants))
    ]
    assert all(first == second for first, second in counts)  # the processes are in step
    return {name: one[0] for name, one in zip(variants, counts, strict=True)}


def test_sharded_training_is_that_of_one_process(run_arguments: list[str], tmp_path: Path) -> None:
    common = ["lr=1e-4", "num_epochs=3", "epochs_per_stage=2", "c_thought=2", "grad_clip=0.5", "batch_size_eval=2"]
    common += ["gradient_accumulation_steps=2", "pad_latent_to_max=false"]  # the processes' batches differ in latents
    common += ["save_only_improve=true", "reset_optimizer=epoch"]  # an optimizer is made after an evaluation without a save
    start(run_arguments, "name=one", "batch_size_training=4", *common)
    common += ["parallel=fsdp", "batch_size_training=2"]
    variants = {
        "pass": common,
        "step": [*common, "fsdp_gather=step"],
        "step-recomputed": [*common, "fsdp_gather=step", "activation_checkpointing=true"],
    }
    half = {"bf16": [*common, "fsdp_gather=step", "bf16=true"]}
    counts = several(tmp_path, run_arguments, {**variants, **half})
    directory = tmp_path / "checkpoints"
    expected = losses(directory / "one")
    for name in variants:
        assert losses(directory / name) == pytest.approx(expected, abs=1e-5), name
        for one, other in zip(*(read_rows(directory / n / "metrics.jsonl", "epoch") for n in ("one", name)), strict=True):
            assert other["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
            assert other["accuracy"] == one["accuracy"]
    assert set(map(tuple, counts["step"])) == set(map(tuple, counts["step-recomputed"])) == {(GROUPS, GROUPS)}
    for name in half:  # bfloat16 has 8 bits; the weights stay float32
        assert losses(directory / name) == pytest.approx(expected, abs=0.05)
        assert losses(directory / name) != pytest.approx(expected, abs=1e-4)
        saved = load_file(next((directory / name).glob("checkpoint_*")) / "model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float32}
    assert max(gathers for gathers, _ in counts["pass"]) > 8 * GROUPS  # two micro-batches of three passes, there and back


def test_ddp_reduces_only_the_last_micro_batch_and_looks_for_no_unused_parameters(tmp_path: Path) -> None:
    base, ids = tiny_model("llama")
    model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for last in (False, True):
            with distributed.gradient_sync(wrapped, last):
                assert wrapped.require_backward_grad_sync == last
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "world_size", lambda: 2)
            config = RunConfig(name="x", model_id="x", train_path="x", val_path="x", cot=True)
            assert not distributed.wrap(model, config.part(distributed.Parallelism), torch.device("cpu")).find_unused_parameters
    finally:
        dist.destroy_process_group()


FAMILIES_ALIKE = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import faulthandler; faulthandler.dump_traceback_later(200, exit=True)
import torch, torch.distributed as dist
from systems import activation_checkpointing, distributed
from coconut import Coconut
from tiny_models import FAMILIES, IDS, VOCABULARY, assert_near, tiny_model
from config import RunConfig

def coconut(family):
    base, ids = tiny_model(family)
    return Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)

def batch(rank):
    random = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, 60, (2, 14), generator=random)
    ids[:, 4] = IDS.start_latent
    ids[:, 5 : 6 + 2 * rank] = IDS.latent  # one latent in the first process, three in the second
    return ids

def gradients(model, ids, labels):
    output = model(ids, labels=labels, labelled_only=True, num_items_in_batch=8)
    output.loss.backward()
    return output.loss.detach()

with distributed.process_group() as device:
    ids = batch(dist.get_rank())
    labels = torch.where(torch.arange(14) < 10 + 2 * dist.get_rank(), -100, ids)
    for family in FAMILIES:
        plain = coconut(family)
        activation_checkpointing.MOST_LOGITS = 2**28
        loss = gradients(plain, ids, labels)
        activation_checkpointing.MOST_LOGITS = 3 * VOCABULARY  # three pieces in the first process, two in the second
        answer = plain.generate(ids[:, :9], max_new_tokens=4 + 2 * dist.get_rank())
        for gather in ("pass", "step"):
            config = RunConfig(name="x", model_id="x", train_path="x", val_path="x", cot=True, parallel="fsdp", fsdp_gather=gather,
                               activation_checkpointing=gather == "step")
            model = distributed.unwrap(distributed.wrap(coconut(family), config.part(distributed.Parallelism), device))
            with distributed.gradient_sync(model, True, gather):
                assert_near(gradients(model, ids, labels), loss, what=family)
            for (name, own), other in zip(plain.named_parameters(), model.parameters(), strict=True):
                assert (own.grad is None) == (other.grad is None), (family, name)
                if own.grad is not None:
                    mean = own.grad.clone()
                    dist.all_reduce(mean)
                    assert_near(other.grad.full_tensor(), mean / 2, what=f"{{family}} {{name}}")
            model.eval()
            assert torch.equal(model.generate(ids[:, :9], max_new_tokens=4 + 2 * dist.get_rank(), synced_gpus=True), answer), family
            distributed.reshard(model)
        print("equal", family, flush=True)
"""


def test_every_family_is_sharded_by_its_blocks(tmp_path: Path) -> None:
    """Losses, gradients and answers of two processes, whose batches have 1 and 3 latents and answers other lengths."""
    script = tmp_path / "families.py"
    script.write_text(FAMILIES_ALIKE.format(root=str(ROOT)))
    result = launch(2, [], script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == 2 * len(FAMILIES)


def test_shards_are_saved_resumed_from_and_made_whole(run_arguments: list[str], tmp_path: Path) -> None:
    """Saved by two processes, in the background and not; continued by two and by one; made one file again."""
    common = ["num_epochs=2", "save_every_steps=2", "batch_size_training=4", "parallel=fsdp", "reset_optimizer=false"]
    shards = [*common, "sharded_checkpoints=true"]
    several(tmp_path, run_arguments, {"whole": common, "shards": shards, "late": [*shards, "async_save=true"]})
    directory = tmp_path / "checkpoints"
    for name in ("again", "alone"):
        shutil.copytree(directory / "late", directory / name)
        shutil.rmtree(directory / name / "checkpoint_2")
    several(tmp_path, run_arguments, {"again": shards})
    start(run_arguments, "name=alone", *common, "batch_size_training=8", "parallel=ddp")
    whole = directory / "whole" / "checkpoint_2"
    for name in ("shards", "late", "again"):
        assert not list((directory / name / "checkpoint_2").glob("*.safetensors"))
        convert.consolidate(directory / name, tmp_path / name)
        assert same_files(whole, tmp_path / name), name
        assert timeless_rows(directory / name) == timeless_rows(directory / "whole")
    assert losses(directory / "alone") == pytest.approx(losses(directory / "whole"), abs=1e-5)
    start(run_arguments, "name=eval", "only_eval=true", f"load_model_path={directory / 'shards'}")
    row = read_evaluation(directory / "eval")
    assert row["loss"] == pytest.approx(read_rows(directory / "shards" / "metrics.jsonl", "epoch")[-1]["val_loss"], abs=1e-5)


def same_files(one: Path, two: Path) -> bool:
    """Whether weights and training state are equal bit for bit."""
    states = [files.read_training_state(path) for path in (one, two)]
    for state in states:
        del state["state"]["epoch_seconds"]
    weights = [
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, two)
    ]  # a tied head may be there or not
    return equal(*(dict(one) for one in weights)) and equal(*states)
