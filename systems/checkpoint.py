"""Checkpoints: written whole or not at all, found again, and resumed from exactly.

`python -m systems.checkpoint convert IN OUT --model-id ID --method coconut --stage 4 ...` makes a checkpoint
directory of a published single-file state dict; `python -m systems.checkpoint consolidate IN OUT` makes one with whole files
of a sharded one.

save_path/name/checkpoint_<epoch>/ holds the base model in Hugging Face form (model.safetensors, config.json, tokenizer),
coconut.json (what evaluation must know), training_state.pt (what training must know) and manifest.json (sizes and hashes).
checkpoint_<epoch>_step<n> is the same in the middle of an epoch. With sharded_checkpoints the weights and the optimizer's state
are in shards/, a part from each process.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
import yaml
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut import Coconut
from config import RunConfig
from methods import END_LATENT, LATENT, METHODS, START_LATENT, scheduled_stage
from systems import distributed
from systems.distributed import unwrap
from systems.files import FACTS, MANIFEST, STATE, Facts, TrainingState, read_facts, read_training_state
from systems.lora import adapter_state, is_adapted, load_adapter_state, merged_weights
from systems.models import LatentIds, build_model, from_shards, gguf_of, latent_ids, load_tokenizer
from systems.shards import SHARDS, read_shards, wait_for, whole_tensors, write_shards
from systems.storage import (
    CheckpointError,
    Writer,
    begin_directory,
    manifest_problem,
    newest_whole,
    remove_old,
    sha256,
    write_directory,
)
from systems.weights import THOUGHT_MAP, fill_map, read_map, whole_map, write_map
from utils import UserError, check_regular, entry_point, get_logger, no_such_file

BEST = "@best"  # after a run's directory
TRAINED_WITH = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max", "chat_template", "thought_map")  # of Facts
BASE = "base_causallm."
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# --- finding ---


def newest_for(config: RunConfig, data: dict[str, str]) -> Path | None:
    """The checkpoint from which a rerun of the same command goes on; None if there is none yet.

    Args:
        data: what `data_hashes` gives now.

    Raises:
        CheckpointError: it is of another method, the data changed since (unless allow_changed_data), or none is whole.
    """
    newest = None if config.debug else newest_whole(config.save_dir)
    facts = None if newest is None else read_facts(newest)
    if facts is None:
        return newest
    for key in ("method", "thought_map"):
        trained, asked = getattr(facts, key), getattr(config, key)
        if trained != asked:
            raise CheckpointError(f"{newest} was trained with {key} {trained}, not {asked}: choose another name")
    for key in sorted(data.keys() & facts.data.keys()):
        if data[key] != facts.data[key]:
            hashes = f"its SHA-256 is {data[key]}, it was {facts.data[key]}"
            changed = f"{key}: {getattr(config, key)} has changed since {newest} was saved: {hashes}"
            if not config.allow_changed_data:
                raise CheckpointError(f"{changed}; put the file back, choose another name, or set allow_changed_data: True")
            get_logger().warning(changed)
    return newest


def data_hashes(config: RunConfig) -> dict[str, str]:
    """The SHA-256 of each data file that the run reads, by its key. Raises UserError if one cannot be read."""
    hashes = {}
    for key in ("val_path",) if config.only_eval else ("train_path", "val_path"):
        path = Path(getattr(config, key))
        try:
            check_regular(path)
            hashes[key] = sha256(path)
        except FileNotFoundError:
            raise UserError(no_such_file(path)) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
    return hashes


def agreed_hashes(config: RunConfig) -> dict[str, str]:
    """`data_hashes`, the same on all nodes; called by all processes. Raises UserError on all of them if one node differs."""
    (first, expected), *others = distributed.run_on_each_node(lambda: data_hashes(config))
    for host, hashes in others:
        for key in expected:
            if hashes[key] != expected[key]:
                raise UserError(
                    f"{key}: {getattr(config, key)} is another file on node {host} (SHA-256 {hashes[key]}) than on node "
                    f"{first} ({expected[key]}): copy one of them to all nodes"
                )
    return expected


def resumed_source(config: RunConfig, checkpoint: Path) -> RunConfig:
    """Where the weights of a resumed run come from: the checkpoint; with LoRA the model that it adapts, as in the beginning."""
    if config.lora_r is not None:
        return resolve_paths(config)
    return config.model_copy(update={"load_model_path": str(checkpoint), "from_scratch": False})


def resolve_paths(config: RunConfig) -> RunConfig:
    """Replace a run's directory in `load_model_path` by its newest checkpoint, or, with @best after it, by its best one.

    Raises CheckpointError if there is nothing, or if it is not what was saved. A name that can only be local is not looked
    up on the hub.
    """
    for key in ("model_id", "load_model_path"):
        value = getattr(config, key)
        if value is None or _names_gguf_file(config, key) or Path(value).is_file():
            continue
        path = Path(value)
        if value.endswith(BEST) and not path.exists():
            best = best_whole(Path(value.removesuffix(BEST)), key)
            get_logger().info(f"{key}: {best} is the best checkpoint of its last stage")
            config = config.model_copy(update={key: str(best)})
        elif (path / "config.json").is_file():
            check_whole(path)
        elif newest := newest_whole(path):
            get_logger().info(f"{key}: {newest} is the newest checkpoint in {path}")
            config = config.model_copy(update={key: str(newest)})
        elif found := _gguf_files(path):
            raise CheckpointError(f"{key}: {path} holds GGUF files: set gguf_file to one of {', '.join(found)}")
        elif path.is_dir():
            raise CheckpointError(f"{key}: {path} holds neither a model (config.json) nor a whole checkpoint_<epoch>")
        elif "/" in value and (value.startswith((".", "/")) or value.count("/") > 1 or path.parent.is_dir()):
            raise CheckpointError(f"{key}: {path}: no such file or directory")
    return config


def best_whole(save_dir: Path, key: str) -> Path:
    """The checkpoint with the best validation accuracy of the last stage that a run has evaluated, the earlier one of equals.

    Raises CheckpointError, which names `key`, if there is none, or if it is not what was saved.
    """
    newest = newest_whole(save_dir)
    name = None if newest is None else read_training_state(newest, mmap=True)["state"]["best_checkpoint"]
    if name is None:
        raise CheckpointError(f"{key}: {save_dir} holds no checkpoint that was evaluated, so none is the best")
    if not (save_dir / name / FACTS).is_file():
        raise CheckpointError(f"{key}: {save_dir / name}, the best checkpoint, is missing: put it back, or name another one")
    check_whole(save_dir / name)
    return save_dir / name


def check_whole(directory: Path) -> None:
    """Raise CheckpointError if a checkpoint differs from its manifest, if it has one. Training's part may be gone."""
    if (directory / FACTS).is_file() and (problem := manifest_problem(directory, hashes=True, optional=STATE)):
        raise CheckpointError(
            f"{directory}: {problem}; put back a copy, or, if it was changed on purpose, remove {directory / MANIFEST}"
        )


def _names_gguf_file(config: RunConfig, key: str) -> bool:
    """Whether a key names a model in a GGUF file. Raises CheckpointError if a local one is not there, or is something else."""
    source = Path(getattr(config, key))
    if source.is_file() and source.suffix == ".gguf":
        raise CheckpointError(f"{key}: {source} is a GGUF file: set {key} to its directory and gguf_file: {source.name}")
    name = gguf_of(config, getattr(config, key))
    if name is None or not source.is_dir():
        return name is not None
    path = source / name
    if key == "model_id" and config.load_model_path is not None and Path(config.load_model_path).is_dir():
        return True  # a checkpoint has its own weights and tokenizer
    if not path.is_file():
        there = ", ".join(_gguf_files(source)) or "no GGUF file at all"
        raise CheckpointError(f"gguf_file: {path}: no such file; {source} holds {there}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"gguf_file: {path}: not a GGUF file; it does not begin with the letters GGUF")
    return True


def _gguf_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.gguf")) if directory.is_dir() else []


def load_run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: of the checkpoint that it starts from, else of the model.

    Raises UserError as load_tokenizer, or if the checkpoint's facts name other markers than its tokenizer.
    """
    source = tokenizer_source(config)
    tokenizer = load_tokenizer(source, gguf_of(config, source), config.trust_remote_code)
    facts = read_facts(Path(source))
    known = {START_LATENT: "start_latent_id", END_LATENT: "end_latent_id", LATENT: "latent_token_id"}
    for marker in METHODS[facts.method].markers if facts is not None else ():
        key, expected = known.get(marker), tokenizer.convert_tokens_to_ids(marker)
        if key and getattr(facts, key) != expected:
            said = f"{key} is {getattr(facts, key)}, its tokenizer has {marker} as {expected}"
            raise CheckpointError(f"{Path(source) / FACTS}: damaged or of another version: {said}")
    return tokenizer


def tokenizer_source(config: RunConfig) -> str:
    """A checkpoint directory brings its own tokenizer; otherwise it is the model's."""
    if config.load_model_path is not None and (Path(config.load_model_path) / "tokenizer_config.json").is_file():
        return config.load_model_path
    return config.model_id


def evaluation_config(config: RunConfig) -> tuple[RunConfig, int, int]:
    """(configuration, stage, finished epochs) for evaluating `load_model_path`.

    A checkpoint knows its method, stage and number of latents; those of the configuration count only for published
    single-file checkpoints and plain models, whose stage follows from `resume`.
    """
    config = config.model_copy(update={"from_scratch": False, "lora_r": None})  # a checkpoint holds merged weights
    source = Path(str(config.load_model_path))
    facts = read_facts(source)
    if facts is None:
        stage = scheduled_stage(config.curriculum, config.resume)
        get_logger().info(f"{source} does not say how it was trained: stage {stage} from resume {config.resume}")
        return config, stage, config.resume
    known = {key: getattr(facts, key) for key in TRAINED_WITH}
    if changed := [f"{key} {value}" for key, value in known.items() if getattr(config, key) != value]:
        get_logger().info(f"{source} was trained with {', '.join(changed)}: evaluated so, whatever the configuration says")
    return config.model_copy(update=known), facts.stage, facts.epoch


# --- saving ---


def save(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    state: TrainingState,
    writer: Writer | None = None,
    keep_last: int | None = None,
    in_shards: bool = False,
) -> None:
    """Write one checkpoint, then remove old ones; called by all processes, written by rank 0.

    in_shards: each process writes its part of the weights and of the optimizer's state, and none gathers them.
    Raises CheckpointError and keeps what was there; if `writer` works in the background, by its next `wait`.
    """
    writer = writer or Writer()
    training = {"state": asdict(state), "rng": distributed.gather_objects(_rng_state())}
    best = state.best_checkpoint
    begun, shards = None, None
    if in_shards:
        begun = distributed.run_on_main(lambda: begin_directory(directory))
        fill, shards = _begin_shards(begun, model, optimizer, tokenizer, facts, training, writer)
    else:
        fill = _gathered(model, optimizer, tokenizer, facts, training, writer.background)

    def write() -> None:
        write_directory(directory, fill, begun)
        remove_old(directory, keep_last, best)

    writer.start(write, shards)


def _gathered(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    training: dict[str, Any],
    background: bool,
) -> Callable[[Path], None]:
    """Gather everything in rank 0; what writes it there."""
    base = unwrap(model).base_causallm
    weights, thought_map = _plain_weights(model), whole_map(unwrap(model))
    # An optimizer that has not stepped yet has no state; asking for it would make one up by a step with zero gradients.
    optimizer_state = get_optimizer_state_dict(unwrap(model), optimizer, options=_WHOLE) if optimizer.state else None
    training = {**training, "optimizer": optimizer_state, "adapter": adapter_state(base)}
    if background and distributed.rank() == 0:
        weights, training = copy.deepcopy((weights, training))  # the next step changes them

    def fill(partial: Path) -> None:
        _fill_model(partial, base, weights, thought_map, tokenizer, facts)
        torch.save(training, partial / STATE)

    return fill


def _begin_shards(
    begun: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    training: dict[str, Any],
    writer: Writer,
) -> tuple[Callable[[Path], None], Future | None]:
    """Write this process's tensors; what writes the rest in rank 0, and what to wait for in the background."""
    base = unwrap(model).base_causallm
    thought_map = whole_map(unwrap(model))
    tensors: dict[str, Any] = {"model": _named_weights(get_model_state_dict(unwrap(model)))}
    training = {**training, "optimizer": None, "adapter": None}
    if optimizer.state:
        training["optimizer"] = get_optimizer_state_dict(unwrap(model), optimizer)
        tensors["optimizer"] = training["optimizer"].pop("state")
    shards, failure = None, None
    try:
        shards = write_shards(begun / SHARDS, tensors, writer.group)
    except OSError as error:
        failure = error

    def fill(partial: Path) -> None:
        if failure is not None:
            raise failure
        if shards is not None:
            wait_for(shards)
        _fill_model(partial, base, None, thought_map, tokenizer, facts, with_weights=False)
        torch.save(training, partial / STATE)

    return fill, shards


def _fill_model(
    partial: Path,
    base: PreTrainedModel,
    weights: dict[str, Any] | None,
    thought_map: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    with_weights: bool = True,
) -> None:
    """Everything of a checkpoint but the training state; `weights` None are the base model's own."""
    if with_weights:
        base.save_pretrained(partial, state_dict=weights)
    else:
        base.config.save_pretrained(partial)
    write_map(partial, thought_map)
    tokenizer.save_pretrained(partial)
    _portable_tokenizer(partial / "tokenizer_config.json")
    (partial / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")


def _plain_weights(model: nn.Module) -> dict[str, Any]:
    """The whole state dict of the base model on the CPU, LoRA merged."""
    base = unwrap(model).base_causallm
    if is_adapted(base):
        return merged_weights(base)
    return _named_weights(get_model_state_dict(unwrap(model), options=_WHOLE))


def _named_weights(state: dict[str, Any]) -> dict[str, Any]:
    """Those of the base model, by its own names."""
    return {key.removeprefix(BASE): value for key, value in state.items() if key.startswith(BASE)}


def _portable_tokenizer(path: Path) -> None:
    """transformers 5 names its fast tokenizer by a class that transformers 4 does not have; both know the older name."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        path.write_text(json.dumps({**values, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), encoding="utf-8")


# --- resuming ---


def restore(directory: Path, loaded: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """LoRA weights, optimizer and random number generators as they were; `loaded` is what `read_training_state` gave.

    With another number of processes generators start anew. Raises UserError if the LoRA weights or the optimizer do not fit.
    """
    inner = unwrap(model)
    load_adapter_state(inner.base_causallm, loaded["adapter"])
    if is_adapted(inner.base_causallm):  # which was loaded from where the run began; elsewhere the map came with the weights
        fill_map(inner.thought_map, read_map(directory), str(directory / THOUGHT_MAP))
    if loaded["optimizer"] is None:
        pass  # it had not stepped yet
    elif (directory / SHARDS).is_dir():
        own = get_optimizer_state_dict(unwrap(model), optimizer)
        read_shards(directory / SHARDS, {"optimizer": own["state"]})
        set_optimizer_state_dict(unwrap(model), optimizer, {**loaded["optimizer"], "state": own["state"]})
    else:
        _check_shapes(directory, loaded["optimizer"]["state"], model)
        set_optimizer_state_dict(unwrap(model), optimizer, loaded["optimizer"], options=_WHOLE)
    if len(loaded["rng"]) == distributed.world_size():
        _set_rng_state(loaded["rng"][distributed.rank()])
    else:
        get_logger().info(
            f"resuming with {distributed.world_size()} processes, saved with {len(loaded['rng'])}: same data order, "
            "but dropout draws other numbers"
        )


def _check_shapes(directory: Path, state: dict[str, dict[str, torch.Tensor]], model: nn.Module) -> None:
    """Raise UserError if AdamW's averages have other shapes than the parameters: a fused step would write past their end."""
    parameters = cast("dict[str, torch.Tensor]", get_model_state_dict(unwrap(model)))
    for name, moments in state.items():
        for quantity, value in moments.items():
            wanted = None if name not in parameters else torch.Size() if quantity == "step" else parameters[name].shape
            if value.shape != wanted:
                needed = "the model has no such parameter" if wanted is None else f"{list(wanted)} is needed"
                found = f"the optimizer's {quantity} of {name} has shape {list(value.shape)}; {needed}"
                raise CheckpointError(f"{directory / STATE}: damaged or of another model: {found}")


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --- converting published single-file checkpoints ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m systems.checkpoint --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m systems.checkpoint",
        description="Checkpoints of other forms to checkpoint directories.",
        formatter_class=argparse.RawTextHelpFormatter,
        epilog="""examples:
  python -m systems.checkpoint convert FILE DIRECTORY --stage 4 --c-thought 2 --max-latent-stage 3
  python -m systems.checkpoint consolidate checkpoints/NAME DIRECTORY""",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "convert", help="a single-file state dict (torch or safetensors) to a directory that run.py evaluates and trains"
    )
    command.add_argument("source", metavar="IN", type=Path)
    command.add_argument("target", metavar="OUT", type=Path, help="a directory that does not exist yet")
    command.add_argument("--model-id", default="openai-community/gpt2", help="the base model (default: %(default)s)")
    command.add_argument("--method", choices=METHODS, default="coconut", help="how it was trained (default: %(default)s)")
    command.add_argument("--stage", type=_count, required=True, help="the stage at which it was saved; 0 for cot and no_cot")
    command.add_argument("--c-thought", type=_count, default=1, help="latent tokens per step (default: %(default)s)")
    command.add_argument("--max-latent-stage", type=_count, help="default: the stage")
    command.add_argument("--epoch", type=_count, default=0, help="finished epochs (default: %(default)s)")
    command.add_argument("--no-pad-latent-to-max", dest="pad_latent_to_max", action="store_false")
    command.add_argument(
        "--thought-map", type=yaml.safe_load, default="identity", help="as the key thought_map (default: %(default)s)"
    )
    command = commands.add_parser("consolidate", help="a sharded checkpoint to a directory that transformers loads, too")
    command.add_argument("source", metavar="IN", type=Path, help="checkpoint_<epoch>, or a run's directory for its newest one")
    command.add_argument("target", metavar="OUT", type=Path, help="a directory that does not exist yet")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number that is not negative, got {text!r}")
    return int(text)


def convert(source: Path, target: Path, model_id: str, facts: dict[str, Any]) -> None:
    """Write a single-file state dict as a checkpoint directory, without a training state.

    Args:
        facts: the entries of `Facts` that such a file does not know: method, stage, c_thought, max_latent_stage,
            pad_latent_to_max, epoch, thought_map.

    Raises:
        UserError: no such file, not a state dict, one that does not fit the model, facts that contradict each other, or
            `target` is there already.
    """
    _check_absent(target)
    method, stage = facts["method"], facts["stage"]
    config = RunConfig(
        name="convert",
        val_path="",
        only_eval=True,
        model_id=model_id,
        load_model_path=str(source),
        method=method,
        max_latent_stage=facts["max_latent_stage"],
        thought_map=facts.get("thought_map", "identity"),
    )
    last = METHODS[method].schedule.last(config.curriculum)
    if stage > last:
        hint = f", as max-latent-stage is {last - 1}" if last else ""
        raise UserError(f"--stage {stage}: the last stage of method {method} is {last}{hint}")
    if METHODS[method].markers and stage and not facts["c_thought"]:
        raise UserError(f"--c-thought 0 leaves stage {stage} of {method} without thoughts: set at least 1")
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file; a state dict in one file is needed")
    tokenizer = load_run_tokenizer(resolve_paths(config))
    ids = latent_ids(tokenizer, config.method)
    model = build_model(config, tokenizer, ids)
    known = Facts(accuracy=None, **id_facts(ids), **facts)
    write_model(target, model, tokenizer, known)
    get_logger().info(f"{target}: {known.method}, stage {known.stage}; load it with load_model_path={target}")


def write_model(target: Path, model: Coconut, tokenizer: PreTrainedTokenizerBase, facts: Facts) -> None:
    """A checkpoint directory without a training state. Raises CheckpointError if `target` is there already."""
    _check_absent(target)
    base, thought_map = model.base_causallm, whole_map(model)
    write_directory(target, lambda partial: _fill_model(partial, base, None, thought_map, tokenizer, facts))


def consolidate(source: Path, target: Path) -> None:
    """Write a sharded checkpoint with its weights and its optimizer's state in whole files; a run can go on from it too.

    Raises UserError if there is none, it is not what was saved, or `target` is there already.
    """
    _check_absent(target)
    source = source if (source / FACTS).is_file() else newest_whole(source) or source
    facts = read_facts(source)
    if facts is None or not (source / SHARDS).is_dir():
        raise CheckpointError(f"{source}: not a sharded checkpoint; a checkpoint_<epoch> with {SHARDS}/ is needed")
    check_whole(source)
    base, tokenizer = from_shards(source), load_tokenizer(str(source))
    training = read_training_state(source) if (source / STATE).is_file() else None
    if training is not None and training["optimizer"] is not None:
        state: dict[str, dict[str, Any]] = {}
        for name, value in whole_tensors(source / SHARDS, "optimizer").items():
            parameter, _, quantity = name.rpartition(".")
            state.setdefault(parameter, {})[quantity] = value
        training["optimizer"]["state"] = state

    def fill(partial: Path) -> None:
        _fill_model(partial, base, None, read_map(source), tokenizer, facts)
        if training is not None:
            torch.save(training, partial / STATE)

    write_directory(target, fill)
    get_logger().info(f"{target}: {source} with whole files")


def _check_absent(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} is there already: choose another directory, or remove it")


def id_facts(ids: LatentIds) -> dict[str, Any]:
    """The entries of `Facts` for token ids."""
    return {
        "start_latent_id": ids.start,
        "end_latent_id": ids.end,
        "latent_token_id": ids.latent,
        "eos_token_id": ids.eos,
    }


@entry_point
def main(arguments: list[str]) -> None:
    values = vars(_parser().parse_args(arguments))
    if values.pop("command") == "consolidate":
        consolidate(**values)
        return
    if values["max_latent_stage"] is None:
        values["max_latent_stage"] = values["stage"]
    convert(values.pop("source"), values.pop("target"), values.pop("model_id"), values)


if __name__ == "__main__":
    main()
