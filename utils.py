"""Configuration (defaults < YAML file < key=value on the command line), errors for users, seeding, logging on one rank."""

from __future__ import annotations

import bisect
import contextlib
import difflib
import errno
import functools
import io
import json
import logging
import math
import os
import random
import re
import reprlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import numpy as np
import torch
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

METHOD_KEYS = ("coconut", "cot", "no_thoughts", "no_cot")  # booleans of the published files
Method = Literal["coconut", "cot", "no_thoughts", "no_cot", "no_curriculum", "pause", "pause_as_thought", "icot"]
METHODS: tuple[str, ...] = get_args(Method)
STAGED_METHODS = ("coconut", "no_thoughts", "pause_as_thought")  # steps are removed stage by stage
ALL_TOKENS = 1_000_000  # the stage of icot in which no token of the steps is left
# What only a slip of the finger exceeds, and what would take all memory or forever.
MOST_EPOCHS, MOST_EXAMPLES, MOST_THOUGHTS, MOST_WORKERS = 100_000, 10_000_000, 10_000, 512
DEBUG_TRAIN, DEBUG_VALID = 5000, 32  # records that `debug: True` keeps, as in the published code


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux and macOS
LONGEST_PROJECT = 128  # characters, of wandb
LONGEST_LINE = 2000  # characters of an error
MOST_BITS = 1024  # of a whole number in a file: Python does not write those of more than 4,300 digits
LARGEST = 2**31 - 1  # of whole numbers: beyond it they no longer fit everywhere
MEBIBYTE = 2**20


class UserError(ValueError):
    """Something the user can put right. Entry points print it as one line and exit with code 2."""


def _null(value: Any) -> Any:
    return None if value in ("None", "") else value  # the published YAML files write None, which YAML reads as a string


def _usable_path(value: str | None) -> str | None:
    if value is None:
        return None
    if "YOUR_" in value:
        raise ValueError("a placeholder of the published files: put your own path in its place")
    if value.startswith("~"):
        try:
            value = str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError("no such user's home directory") from None
    parts = os.fsencode(value).split(b"/")
    if b"\0" in b"".join(parts):
        raise ValueError("a path cannot hold the character NUL")
    if max(map(len, parts)) > LONGEST_NAME or sum(map(len, parts)) + len(parts) > LONGEST_PATH:
        raise ValueError(f"longer than a path can be ({LONGEST_NAME} bytes a name, {LONGEST_PATH} in all)")
    return value


OptionalText = Annotated[str | None, BeforeValidator(_null)]
PathText = Annotated[str, AfterValidator(_usable_path)]
OptionalPath = Annotated[str | None, BeforeValidator(_null), AfterValidator(_usable_path)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
# How many latents a question gets when it is answered, see dataset.stage_shape.
EvalLatents = Literal["gold", "max"] | Annotated[int, Field(ge=1, le=MOST_THOUGHTS)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def check_folder_name(name: str, below: str) -> None:
    """Raise ValueError unless it names a folder below another one: no way out of it, nothing that breaks a line."""
    path = PurePath(name)
    if not name.strip() or not path.parts or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"name: {shown(name)} must be a folder below {below}")


def check_kernel(attn_implementation: str | None, trust_remote_code: bool) -> None:
    """Raise ValueError if the attention is a repository of kernels, which transformers would fetch and run, without trust."""
    if attn_implementation is not None and "/" in attn_implementation and not trust_remote_code:
        raise ValueError(
            f"attn_implementation: {shown(attn_implementation)} is code from a hub, which is not run: set trust_remote_code: "
            "True if you have read it and trust it"
        )


class Config(BaseModel):
    """Base of every entry point's configuration: unknown keys are errors, values are converted to the declared types.

    The text under a field describes it, in `--help` too.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RunConfig(Config):
    """Keys of run.py. The published YAML files load unchanged; after loading, `method` alone says what is trained."""

    # general
    project: str = "coconut"
    """Project in wandb."""
    save_path: PathText = "checkpoints"
    """Folder below which every run has its own."""
    name: PathText
    """Folder of the run below save_path."""
    only_eval: bool = False
    """Evaluate load_model_path instead of training."""
    debug: bool = False
    """5,000 training and 32 validation records; nothing is saved, no wandb."""
    seed: Seed = 0
    """Of weights, data order and dropout."""
    # method: one of eight names, or exactly one of the four booleans of the published files
    method: Method | None = None
    """coconut, cot, no_cot, no_thoughts, no_curriculum, pause, pause_as_thought or icot; see docs/METHODS.md."""
    coconut: bool = False
    """The same as method: coconut."""
    cot: bool = False
    """The same as method: cot."""
    no_thoughts: bool = False
    """The same as method: no_thoughts."""
    no_cot: bool = False
    """The same as method: no_cot."""
    # training
    c_thought: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 1
    """Latents that stand for one step."""
    epochs_per_stage: Positive | Annotated[list[Positive], Field(min_length=1)] = 1
    """A number, or a list with the epochs of stage 0, 1, ...; its last entry holds for all further stages."""
    max_latent_stage: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 0
    """The last stage with written steps; past it all steps are latent."""
    pad_latent_to_max: bool = True
    """False: a question has no more latents than steps x c_thought."""
    uniform_prob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a sample is trained at a stage drawn from all of its own steps."""
    earlier_stage_prob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same, drawn from the stages up to the current one."""
    examples_per_epoch: Annotated[int | None, Field(ge=1, le=MOST_EXAMPLES), BeforeValidator(_null)] = None
    """Training examples of an epoch; null: the whole file."""
    icot_tokens_per_epoch: Annotated[float, Field(gt=0, le=ALL_TOKENS)] = 8.0
    """icot: tokens of the steps removed in each epoch."""
    icot_smoothing: Annotated[float | None, Field(gt=0), BeforeValidator(_null)] = 4.0
    """icot: lambda of removal smoothing; null: none."""
    icot_start_epoch: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = 0
    """icot: epochs that write everything."""
    icot_remove_all_beyond: Annotated[int | None, Field(ge=0, le=ALL_TOKENS), BeforeValidator(_null)] = None
    """icot: once more tokens than this are removed, all are; null: never."""
    num_epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 1
    """Epochs of the whole training."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: NonNegative = 0
    """Steps in which the learning rate grows from 0."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Beta 2 of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW."""
    batch_size_training: Positive = 32
    """Questions of a micro-batch, per process."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of one optimizer step."""
    bf16: bool | Literal["pure"] = False
    """True: bfloat16 compute with float32 weights; pure: bfloat16 weights, as the published code has."""
    reset_optimizer: bool | Literal["epoch"] = False
    """True: a new optimizer on each new stage; epoch: on every epoch, as the published code does."""
    grad_clip: Annotated[float | None, Field(gt=0), BeforeValidator(_null)] = None
    """Largest norm of the gradients; null: no limit."""
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """What happens where loss or gradients are NaN or infinite: stop before the step, or skip it and count."""
    advance_accuracy: Annotated[float | None, Field(gt=0, le=1), BeforeValidator(_null)] = None
    """Leave a stage once validation accuracy (0 to 1) reaches this; null: never early."""
    advance_cot_match: Annotated[float | None, Field(gt=0, le=1), BeforeValidator(_null)] = None
    """And once this share (0 to 1) of questions has all written steps right; null: not asked."""
    # model
    model_id: PathText
    """Hub id, or local directory, of the base model."""
    load_model_path: OptionalPath = None
    """Weights to begin with or to evaluate: a checkpoint, a run's directory (its newest checkpoint; RUN@best: its best), a
    hub id, or a published state-dict file."""
    resume: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = 0
    """Epochs that count as done. Without load_model_path a pretrained model so skips the first stages."""
    from_scratch: bool = False
    """Random weights from the configuration of model_id."""
    attn_implementation: OptionalText = None
    """Attention of transformers: sdpa, eager, ...; null: its default."""
    trust_remote_code: bool = False
    """Run code that comes with a model: read it first."""
    gguf_file: OptionalPath = None
    """A GGUF file in model_id."""
    lora_r: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(_null)] = None
    """Rank of LoRA; null: all weights are trained."""
    lora_alpha: Annotated[float | None, Field(gt=0), BeforeValidator(_null)] = None
    """Alpha of LoRA; null: twice lora_r."""
    lora_dropout: Annotated[float | None, Field(ge=0, lt=1), BeforeValidator(_null)] = None
    """Dropout of LoRA; null: 0."""
    lora_target_modules: Annotated[str | list[str] | None, Field(min_length=1), BeforeValidator(_null)] = None
    """Modules that LoRA adapts: a name, a list or a regular expression; null: all linear ones."""
    # data
    train_path: OptionalPath = None
    """JSON file of training records."""
    val_path: PathText
    """JSON file of validation records."""
    chat_template: bool = False
    """Wrap each question in the tokenizer's chat template."""
    # checkpoints
    save_only_improve: bool = False
    """Save a checkpoint only when its accuracy is the best of its stage."""
    save_every_steps: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(_null)] = None
    """Also save inside epochs, every so many steps; null: never."""
    async_save: bool = False
    """Write checkpoints while training goes on."""
    sharded_checkpoints: bool = False
    """parallel: fsdp: each process writes its part."""
    allow_changed_data: bool = False
    """Go on although a data file is not what it was."""
    keep_last: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(_null)] = None
    """Checkpoints that are kept, the best one besides; null: all."""
    # evaluation
    batch_size_eval: Positive = 16
    """Questions of an evaluation batch."""
    max_new_tokens: Positive = 128
    """Most tokens of an answer. Not given or null: as in the published code, 64 where val_path holds "gsm", else 128."""
    eval_latents: EvalLatents = "gold"
    """Thoughts of an answer. gold: as in training, from its own steps where pad_latent_to_max is False; max: for every question
    as many as the stage allows; or so many latent tokens."""
    # systems
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp, or fsdp: weights, gradients and optimizer are sharded."""
    fsdp_gather: Literal["pass", "step"] = "pass"
    """pass: parameters are gathered for each latent pass; step: once per optimizer step."""
    activation_checkpointing: bool = False
    """Less memory for about one more forward pass."""
    hang_timeout: Annotated[float | None, Field(gt=0, le=1e6), BeforeValidator(_null)] = 600.0
    """Seconds without progress after which a process writes its stacks and ends; null: never."""
    compile: bool = False
    """torch.compile of the transformer blocks."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products, see torch.set_float32_matmul_precision."""
    num_workers: Annotated[int | None, Field(ge=0, le=MOST_WORKERS), BeforeValidator(_null)] = None
    """Processes that make batches; null: from the machine."""
    wandb: Literal["online", "offline", "disabled"] = "online"
    """online, offline or disabled."""
    log_every: Positive = 10
    """Optimizer steps between two rows of metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _published_length(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The published code has no key max_new_tokens and decides so (its run.py)."""
        if _null(values.get("max_new_tokens")) is not None:
            return values
        return {**values, "max_new_tokens": 64 if "gsm" in str(values.get("val_path")) else 128}

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._choose_method()
        if self.only_eval and self.load_model_path is None:
            raise ValueError("only_eval needs load_model_path: a checkpoint directory, a hub id or a state-dict file")
        if not self.only_eval:
            self._check_training()
        check_folder_name(self.name, "save_path")
        check_kernel(self.attn_implementation, self.trust_remote_code)
        if self.wandb != "disabled" and (len(self.project) > LONGEST_PROJECT or set(self.project) & set("/\\#?%:")):
            raise ValueError(
                f"project: {shown(self.project)}: wandb takes at most {LONGEST_PROJECT} characters, and none of / \\ # ? % :"
            )
        return self

    def _choose_method(self) -> None:
        chosen = [name for name in METHOD_KEYS if getattr(self, name)]
        if self.method is not None and self.method not in chosen:
            chosen.append(self.method)
        if len(chosen) != 1:
            found = " and ".join(chosen) if chosen else "none"
            raise ValueError(f"method: exactly one of {', '.join(METHODS)} must be chosen, found {found}")
        self.method = chosen[0]  # type: ignore[assignment]
        for name in METHOD_KEYS:
            setattr(self, name, name == self.method)

    def _check_training(self) -> None:
        if self.train_path is None:
            raise ValueError("train_path is missing: a JSON file of records, or set only_eval: True")
        if self.resume and self.from_scratch:
            raise ValueError(f"resume: {self.resume} starts from a model that was trained; from_scratch has random weights")
        if self.resume >= self.num_epochs:
            raise ValueError(f"resume: {self.resume} leaves nothing to train: num_epochs is {self.num_epochs}")
        self._check_lora()
        self._check_systems()
        if self.from_scratch and self.load_model_path is not None:
            raise ValueError("from_scratch and load_model_path contradict each other: set one of them")
        if self.uniform_prob and self.earlier_stage_prob:
            raise ValueError("uniform_prob and earlier_stage_prob contradict each other: set one of them")
        if self.advance_cot_match is not None and self.advance_accuracy is None:
            raise ValueError("advance_cot_match needs advance_accuracy, which turns leaving a stage early on")
        if self.method in ("coconut", "no_curriculum", "pause", "pause_as_thought") and self.c_thought == 0:
            raise ValueError(f"c_thought: 0 leaves {self.method} without thoughts: set at least 1, or method: no_thoughts")
        if self.method in ("no_curriculum", "pause") and self.max_latent_stage == 0:
            raise ValueError(f"max_latent_stage: 0 leaves {self.method} without thoughts: set at least 1, or method: no_cot")
        for key in ("uniform_prob", "earlier_stage_prob", "advance_accuracy"):
            if getattr(self, key) and self.method not in STAGED_METHODS:
                raise ValueError(f"{key}: method {self.method} has no stages; leave it out, or use {', '.join(STAGED_METHODS)}")

    def _check_lora(self) -> None:
        options = [key for key in ("lora_alpha", "lora_dropout", "lora_target_modules") if getattr(self, key) is not None]
        if self.lora_r is None and options:
            raise ValueError(f"{options[0]} needs lora_r, the rank, which turns LoRA on")
        if self.lora_r is None:
            return
        if self.from_scratch:
            raise ValueError("lora_r and from_scratch contradict each other: LoRA adapts trained weights")
        if self.bf16 == "pure":
            raise ValueError("lora_r: bf16: pure would train the small LoRA matrices in bfloat16; use bf16: True")
        if self.parallel == "fsdp":
            raise ValueError("lora_r: parallel: fsdp is not supported with LoRA; use parallel: ddp")

    def _check_systems(self) -> None:
        if self.parallel != "fsdp" and self.fsdp_gather == "step":
            raise ValueError("fsdp_gather: step needs parallel: fsdp; elsewhere every process has all parameters")
        if self.parallel != "fsdp" and self.sharded_checkpoints:
            raise ValueError("sharded_checkpoints needs parallel: fsdp; elsewhere every process has all parameters")
        if self.sharded_checkpoints and self.trust_remote_code:
            raise ValueError(
                "sharded_checkpoints: the code of a model that brings its own is not kept beside shards; leave it out"
            )
        if self.activation_checkpointing and self.compile:
            raise ValueError("activation_checkpointing and compile contradict each other: set one of them")

    @property
    def save_dir(self) -> Path:
        """Where a run writes. An evaluation has a place of its own below, named by its data, weights and eval_latents."""
        run = Path(self.save_path) / self.name
        if not self.only_eval:
            return run
        weights = Path(str(self.load_model_path)).resolve().parts[1:][-2:]
        latents = [] if self.eval_latents == "gold" else [f"latents_{self.eval_latents}"]
        return run / "eval" / "-".join([Path(self.val_path).stem, *weights, *latents])

    def scheduled_stage(self, epoch: int) -> int:
        """The stage at the end of an epoch (paper, section 3), at which it is evaluated.

        Past max_latent_stage all steps are gone and later stages would look alike, so they are one stage, in which
        no_curriculum and pause are from the first epoch. A stage of icot is a number of removed tokens.
        """
        if self.method in ("cot", "no_cot"):
            return 0
        if self.method == "icot":
            return self.icot_stage(epoch + 1, before=True)
        last = self.max_latent_stage + 1
        if self.method in ("no_curriculum", "pause"):
            return last
        return bisect.bisect_right(range(1, last + 1), epoch, key=self.first_epoch)

    def stage_at(self, epoch: int, step: int, steps: int) -> int:
        """The stage of one of the epoch's optimizer steps; only icot goes on to the next one inside an epoch."""
        return self.icot_stage(epoch + step / steps) if self.method == "icot" else self.scheduled_stage(epoch)

    def first_epoch(self, stage: int) -> int:
        """The epoch with which a stage begins."""
        each = self.epochs_per_stage if isinstance(self.epochs_per_stage, list) else [self.epochs_per_stage]
        return sum(each[:stage]) + each[-1] * max(0, stage - len(each))

    def icot_stage(self, epochs: float, before: bool = False) -> int:
        """Tokens removed after so many epochs (arXiv 2405.14838: s(t) = floor(delta t / T)), or just before that moment."""
        tokens = max(0.0, self.icot_tokens_per_epoch * (epochs - self.icot_start_epoch))
        removed = max(0, math.ceil(tokens) - 1) if before else math.floor(tokens)
        beyond = self.icot_remove_all_beyond
        return ALL_TOKENS if beyond is not None and removed > beyond else removed


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(kind: type[AnyConfig], arguments: list[str], about: str | None = None, default: str | None = None) -> AnyConfig:
    """`[FILE.yaml] [key=value ...]` to a configuration. Raises UserError with one line on anything that does not fit.

    about: what the program is, shown by `--help` above the keys. default: the file that is taken without any argument.
    """
    if {"-h", "--help"} & set(arguments):
        if is_main_process():
            with telling():
                print(help_text(kind, about, default), flush=True)
        sys.exit()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if not arguments and default is not None:
        arguments = [default if Path(default).is_file() else str(Path(__file__).parent / default)]
    for argument in arguments:
        found, source = _parse_argument(argument, kind)
        for key in found:
            if key not in kind.model_fields:
                raise UserError(f"{source}: unknown key {shown(key)}{_nearest(key, kind)}")
        values.update(found)
        sources.update(dict.fromkeys(found, source))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        hint = f"; {default} has everything that is needed" if default is not None and default not in arguments else ""
        raise UserError(_one_line(error, sources, hint)) from None


def help_text(kind: type[Config], about: str | None = None, default: str | None = None) -> str:
    """What `--help` prints: the program, then each key with its default and its description."""
    lines = [(about or "").strip(), "", "Keys, in FILE.yaml as `key: value` and after it as key=value, which comes last:", ""]
    unused: tuple[str, ...] = getattr(kind, "unused", tuple)()  # keys that the program refuses
    for name, field in kind.model_fields.items():
        if name in unused:
            continue
        value = "needed" if field.is_required() else _written(field.get_default(call_default_factory=True))
        lines += [f"  {name} ({value})", textwrap.indent(textwrap.fill(description(kind, name), 100), " " * 6)]
    if default is not None:
        lines += ["", f"Without arguments: {default}."]
    return "\n".join(lines).strip()


def description(kind: type[Config], key: str) -> str:
    """What a key is; a class that only changes its default says nothing of its own."""
    fields = [getattr(one, "model_fields", {}).get(key) for one in kind.__mro__]
    return next((field.description for field in fields if field is not None and field.description), "")


def _written(value: Any) -> str:
    """A value as one would write it in YAML."""
    return "null" if value is None else yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _parse_argument(argument: str, kind: type[Config]) -> tuple[dict[str, Any], str]:
    if "=" in argument and not _is_file(argument):
        key, text = argument.split("=", 1)
        return {key: _parse_yaml(text, f"command line: {_cut(argument, LONGEST_NAME)}", kind, key)}, "command line"
    if not argument.endswith((".yaml", ".yml")):
        number = argument.isdigit() and "num_questions" in kind.model_fields
        hint = f"; did you mean num_questions={argument}?" if number else ""
        raise UserError(f"command line: {shown(argument)} is neither a YAML file nor key=value{hint}")
    values = _parse_yaml(read_text(Path(argument)), argument, kind)
    if not isinstance(values, dict):
        raise UserError(f"{argument}: expected `key: value` lines, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}, argument


def _is_file(argument: str) -> bool:
    with contextlib.suppress(OSError):  # what is too long for a path is none
        return Path(argument).is_file()
    return False


def _parse_yaml(text: str, source: str, kind: type[Config] | None = None, key: str | None = None) -> Any:
    """The value of a YAML text: of one key's, or of a mapping of keys. Keys of `kind` that hold text keep it as written."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        pairs = node.value if key is None and isinstance(node, yaml.MappingNode) else [(yaml.ScalarNode("", key or ""), node)]
        for name, value in pairs:
            if kind is None or not isinstance(value, yaml.ScalarNode) or value.tag == NULL:
                continue
            if _holds_text(kind, name.value):
                value.tag = TEXT  # else 1.10 is a number, 12:30:00 seconds, yes a boolean
            elif ODD_NUMBER.fullmatch(value.value):
                raise _odd_number(value)  # a text too: pydantic reads '1_0e-4' as a number
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except Exception as error:  # `!!float "x"` is a ValueError, `!!bool "x"` a KeyError, `!!timestamp "x"` an AttributeError
        known = isinstance(error, (yaml.YAMLError, ValueError))
        reason = " ".join(str(error).split()) if known else f"a value that its tag does not allow: {error}"
        raise UserError(f"{source}: not valid YAML: {reason}") from None


NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
MOST_MERGED = 1000  # keys: `<<` in `<<` in `<<` makes ever more
PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
ODD_NUMBER = re.compile(r"[-+]?[0-9.]+[_:][-+0-9._:e]*", re.IGNORECASE)  # 1_0.5 would be 10.5, and 1:30.5 90.5


def _holds_text(kind: type[Config], key: Any) -> bool:
    field = kind.model_fields.get(str(key))
    return field is not None and _allows(field.annotation, str)


def _allows(annotation: Any, wanted: type) -> bool:
    parts = () if get_origin(annotation) is list else get_args(annotation)
    return annotation is wanted or any(_allows(one, wanted) for one in parts)


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML would silently take the last, numbers that cannot be shown or are
    not written plainly (010 would be 8, and 12:30:00 45000), and merges that grow without end."""

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MOST_MERGED} merged keys", node.start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if not PLAIN_NUMBER.fullmatch(node.value):
            raise _odd_number(node)
        number = super().construct_yaml_int(node)
        if number.bit_length() > MOST_BITS:
            problem = f"a whole number of {number.bit_length()} bits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number

    def construct_yaml_float(self, node: Any) -> float:
        if ODD_NUMBER.fullmatch(node.value):
            raise _odd_number(node)
        return super().construct_yaml_float(node)


def _odd_number(node: yaml.ScalarNode) -> yaml.YAMLError:
    problem = f"{shown(node.value)}: write the number in plain decimal digits, or a text in quotes"
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_text(path: Path) -> str:
    """The text of a regular file. Raises UserError naming it if it cannot be read."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(no_such_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None


MAKERS = {  # the command that makes the files of `args/`, by how their names begin
    "gsm_": "bash preprocessing/gsm_icot.bash",
    "gsm8k_": "python preprocessing/gsm8k.py --train train.jsonl --test test.jsonl",
    "prontoqa_": "bash scripts/make_prontoqa.sh CLONE",
    "prosqa_quick_": "bash scripts/quickstart.sh",
    "prosqa_symbolic_": "python preprocessing/prosqa.py --symbolic",
    "prosqa_": "git checkout data",
    "quick-": "bash scripts/quickstart.sh",
    "gsm-cot": "run.py args/gsm_cot.yaml",
}


def no_such_file(path: Path) -> str:
    """The problem, and for what `args/` names the command that makes it."""
    begin = max((one for one in MAKERS if path.name.startswith(one)), key=len, default=None)
    return f"{path}: no such file" + (f"; `{MAKERS[begin]}` makes it (data/README.md)" if begin else "")


def check_regular(path: Path) -> None:
    """Raise UserError for a pipe, a device or a directory: reading or writing them may never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")


def _nearest(key: str, kind: type[Config]) -> str:
    nearest = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; valid keys: {', '.join(sorted(kind.model_fields))}"


def _one_line(error: ValidationError, sources: dict[str, str], hint: str) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return _message(first)
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{key}: missing; it must be set in the YAML file or as {key}=VALUE{hint}"
    return f"{sources.get(key, 'default')}: {key}: {_message(first).lower()}, got {shown(first['input'])}"


def _message(error: Any) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def shown(value: Any) -> str:
    """A value as an error shows it: what is long or deep is cut, however long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 200, 200
    return short.repr(value)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(config.model_dump(), sort_keys=False))


def config_changes(config: Config, path: Path) -> list[str]:
    """Keys that differ from a saved configuration, each with both values; none where that cannot be read."""
    try:
        before = _parse_yaml(read_text(path), str(path))
    except UserError:
        return []
    now = config.model_dump()
    both = now.keys() & before.keys() if isinstance(before, dict) else set()
    return [f"{key} {now[key]!r}, was {before[key]!r}" for key in now if key in both and now[key] != before[key]]


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_environment() -> None:
    """Raise UserError if the variables of torchrun are no numbers, out of range, or only some of them are there."""
    found: dict[str, int] = {}
    for key, least in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        text = os.environ.get(key)
        if text is not None:
            if not text.isascii() or not text.isdigit() or int(text) < least:
                raise UserError(f"environment: {key}={text}: a whole number of at least {least} is needed; start with torchrun")
            found[key] = int(text)
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if "WORLD_SIZE" in found and missing:
        raise UserError(f"environment: WORLD_SIZE is set, but not {', '.join(missing)}: start with torchrun, or unset it")
    if found.get("RANK", 0) >= found.get("WORLD_SIZE", found.get("RANK", 0) + 1):
        raise UserError(f"environment: RANK={found['RANK']} of WORLD_SIZE={found['WORLD_SIZE']} processes: start with torchrun")


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Around what writes to standard output. Where the reader has gone (`| head`), a run that listens to SIGTERM stops as it
    does then; any other ends at once."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            sys.exit(128 + signal.SIGPIPE)
        signal.raise_signal(signal.SIGTERM)


class _RankFilter(logging.Filter):
    """Rank 0 logs everything; the others warnings and errors only."""

    def filter(self, record: logging.LogRecord) -> bool:
        return is_main_process() or record.levelno >= logging.WARNING


class _ToStdout(logging.Handler):
    """Looks standard output up each time: it may have been redirected since the logger was made."""

    def emit(self, record: logging.LogRecord) -> None:
        with telling():
            print(self.format(record), flush=True)


@functools.cache
def get_logger() -> logging.Logger:
    logger = logging.getLogger("coconut")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _ToStdout()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_RankFilter())
    logger.addHandler(handler)
    return logger


# --- writing ---


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside, such as a full disk, becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {disk_problem(error, path.parent)}") from None


def disk_problem(error: Exception, directory: Path) -> str:
    """Why something could not be written there. Libraries may fail in other words, or in none, when the disk is full."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().split("\n")[0]
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return reason
    full = free < MEBIBYTE and os.strerror(errno.ENOSPC) not in reason
    return f"{reason} ({os.strerror(errno.ENOSPC)})" if full else reason


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, which takes the place of `path` at the end; after an error `path` is what it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            yield partial
            fsync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's entries, outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave the one before. Raises UserError if it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write one value as JSON, whole, or leave the file before. ValueError: it holds a number that is not finite."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, or nothing. Raises UserError if they cannot be written."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one row, or nothing. Raises UserError if it cannot be written."""
    line = (json.dumps(row) + "\n").encode()
    check_regular(path)
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(line) < len(line):  # the disk took a part of it
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def entry_point(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Run `main` on the command line's arguments; a UserError or a full disk becomes one line on each node and exit code 2.

    A path that may not be read or is no path is meant for the user too; other errors of the system keep their stack trace.
    """

    @functools.wraps(main)
    def run() -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
        try:
            check_environment()
        except UserError as error:
            _exit(f"error: {error}", 2, everywhere=True)  # it is not known which process this is
        try:
            main(sys.argv[1:])
        except UserError as error:
            _exit(f"error: {error}", 2)
        except KeyboardInterrupt:
            _exit("interrupted", 130)
        except OSError as error:
            if error.errno not in (*DISK_ERRORS, *PATH_ERRORS):
                raise
            problem = "cannot be written" if error.errno in DISK_ERRORS else "cannot be used"
            _exit(f"error: {error.filename or 'a file'}: {problem}: {error.strerror}", 2)

    return run


def _exit(line: str, code: int, everywhere: bool = False) -> NoReturn:
    if everywhere or is_main_process() or os.environ.get("LOCAL_RANK") == "0":  # what is wrong may be so on this node alone
        print(_one_printable_line(line), file=sys.stderr, flush=True)
    sys.exit(code)


def _one_printable_line(text: str) -> str:
    """Control characters are escaped: what a hostile file says must not move the cursor of a terminal."""
    line = " ".join(text.split())
    plain = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    return _cut(plain, LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    """The beginning and the end of a long text: an error names the place first and the reason last."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
