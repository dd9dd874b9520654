"""Where a run begins: which checkpoint or model, and whether its data are what they were."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from config import RunConfig
from methods import END_LATENT, LATENT, METHODS, START_LATENT, scheduled_stage
from systems import distributed
from systems.files import FACTS, MANIFEST, STATE, read_facts, read_training_state
from systems.models import gguf_of, load_tokenizer
from systems.storage import CheckpointError, manifest_problem, newest_whole, sha256
from utils import UserError, check_regular, get_logger, no_such_file

BEST = "@best"  # after a run's directory
# Of Facts: what the weights were trained for.
MODEL_KEYS = ("method", "thought_map", "latent_mode", "jacobi_iterations", "attend_padding")
TRAINED_WITH = (*MODEL_KEYS, "c_thought", "max_latent_stage", "pad_latent_to_max", "chat_template")


def newest_for(config: RunConfig, data: dict[str, str]) -> Path | None:
    """The checkpoint from which a rerun of the same command goes on; None if there is none yet.

    data: what `data_hashes` gives now. Raises CheckpointError if it is of another method, the data changed since (unless
    allow_changed_data), or none is whole.
    """
    newest = None if config.debug else newest_whole(config.save_dir)
    facts = None if newest is None else read_facts(newest)
    if facts is None:
        return newest
    for key in MODEL_KEYS:
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
    """`data_hashes`, the same on all nodes; called by all processes.

    Raises UserError on all of them, so that none waits, if a node cannot read a file or has another one.
    """
    own: Any = None
    if distributed.local_rank() == 0:
        try:
            own = (socket.gethostname(), data_hashes(config))
        except UserError as error:
            own = (socket.gethostname(), error)
    nodes = [found for found in distributed.gather_objects(own) if found is not None]
    first, expected = nodes[0]
    for host, hashes in nodes:
        if isinstance(hashes, UserError):
            raise hashes if len(nodes) == 1 else UserError(f"node {host}: {hashes}")
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
        elif "/" in value and (value.startswith((".", "/", "checkpoints/")) or value.count("/") > 1 or path.parent.is_dir()):
            raise CheckpointError(f"{key}: {no_such_file(path)}")
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
    """Whether a key names a model in a GGUF file. Raises CheckpointError if a local one is not there."""
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
    return True


def _gguf_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.gguf")) if directory.is_dir() else []


def load_run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: of the checkpoint that it starts from, else of the model.

    Raises UserError as load_tokenizer, or if the checkpoint's facts name other markers than its tokenizer.
    """
    source = config.load_model_path
    if source is None or not (Path(source) / "tokenizer_config.json").is_file():
        source = config.model_id
    tokenizer = load_tokenizer(source, gguf_of(config, source), config.trust_remote_code)
    facts = read_facts(Path(source))
    known = {START_LATENT: "start_latent_id", END_LATENT: "end_latent_id", LATENT: "latent_token_id"}
    for marker in METHODS[facts.method].markers if facts is not None else ():
        key, expected = known.get(marker), tokenizer.convert_tokens_to_ids(marker)
        if key and getattr(facts, key) != expected:
            said = f"{key} is {getattr(facts, key)}, its tokenizer has {marker} as {expected}"
            raise CheckpointError(f"{Path(source) / FACTS}: damaged or of another version: {said}")
    return tokenizer


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
