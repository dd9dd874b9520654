"""Checkpoint directories of other forms: a published state dict in one file, or a sharded checkpoint."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from transformers import AutoConfig

from config import RunConfig
from methods import METHODS
from systems.arguments import Parser
from systems.checkpoint import check_absent, id_facts, write_model
from systems.codi_format import is_codi, plain_state
from systems.files import FACTS, STATE, Facts, read_facts, read_training_state
from systems.models import build_model, from_shards, latent_ids, load_tokenizer
from systems.shards import SHARDS, whole_tensors
from systems.sources import check_whole, load_run_tokenizer, resolve_paths
from systems.storage import CheckpointError, newest_whole
from systems.weights import THOUGHT_MAP, read_map, read_state_dict, weights_beside
from utils import UserError, entry_point, get_logger

EXAMPLES = (
    "convert FILE DIRECTORY --stage 4 --c-thought 2 --max-latent-stage 3",
    """convert FILE DIRECTORY --method codi --stage 4 --c-thought 2 --max-latent-stage 3 \\
      --lora-alpha 32 --thought-map "{name: projection, width: 768}\"""",
    "consolidate checkpoints/NAME DIRECTORY",
)


def _parser() -> Parser:
    parser = Parser("python -m systems.checkpoint", "Checkpoints of other forms to checkpoint directories.", EXAMPLES)
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
    command.add_argument("--lora-alpha", type=float, help="of a file of CODI's form, whose LoRA weights are merged")
    command = commands.add_parser("consolidate", help="a sharded checkpoint to a directory that transformers loads, too")
    command.add_argument("source", metavar="IN", type=Path, help="checkpoint_<epoch>, or a run's directory for its newest one")
    command.add_argument("target", metavar="OUT", type=Path, help="a directory that does not exist yet")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number that is not negative, got {text!r}")
    return int(text)


def convert(source: Path, target: Path, model_id: str, facts: dict[str, Any], lora_alpha: float | None = None) -> None:
    """Write a single-file state dict as a checkpoint directory, without a training state.

    A file of CODI's form (`systems.codi_format`) is turned into a plain one first.

    facts: the entries of `Facts` that such a file does not know: method, stage, c_thought, max_latent_stage,
    pad_latent_to_max, epoch, thought_map. lora_alpha: of LoRA weights in the file.
    Raises UserError if there is no such file, it is no state dict or does not fit the model, or `target` is there already.
    """
    check_absent(target)
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
    with tempfile.TemporaryDirectory() as directory:
        if is_codi(state := read_state_dict(source)):
            plain = Path(directory) / "model.safetensors"
            vocabulary = AutoConfig.from_pretrained(model_id).get_text_config().vocab_size
            save_file(plain_state(source, state, lora_alpha, vocabulary), plain)
            config = config.model_copy(update={"load_model_path": str(plain)})
        elif lora_alpha is not None:
            raise UserError(f"--lora-alpha: {source} is not of CODI's form, and has no LoRA weights to merge: leave it out")
        model = build_model(config, tokenizer, ids)
    known = Facts(accuracy=None, **id_facts(ids), **facts)
    write_model(target, model.base_causallm, weights_beside(model), tokenizer, known)
    get_logger().info(f"{target}: {known.method}, stage {known.stage}; load it with load_model_path={target}")


def consolidate(source: Path, target: Path) -> None:
    """Write a sharded checkpoint with its weights and its optimizer's state in whole files; a run can go on from it too.

    Raises UserError if there is none, it is not what was saved, or `target` is there already.
    """
    check_absent(target)
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
    write_model(target, base, {THOUGHT_MAP: read_map(source)}, tokenizer, facts, training)
    get_logger().info(f"{target}: {source} with whole files")


@entry_point
def main(arguments: list[str]) -> None:
    values = vars(_parser().parse_args(arguments))
    if values.pop("command") == "consolidate":
        consolidate(**values)
        return
    if values["max_latent_stage"] is None:
        values["max_latent_stage"] = values["stage"]
    alpha = values.pop("lora_alpha")
    convert(values.pop("source"), values.pop("target"), values.pop("model_id"), values, alpha)
