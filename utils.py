"""Configuration (defaults < YAML file < key=value on the command line), errors for users, seeding, logging on one rank."""

from __future__ import annotations

import bisect
import contextlib
import difflib
import errno
import functools
import json
import logging
import math
import os
import random
import reprlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args

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
    return None if value == "None" else value  # the published YAML files write None, which YAML reads as a string


def _usable_path(value: str | None) -> str | None:
    parts = os.fsencode(value or "").split(b"/")
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
    """Base of every entry point's configuration: unknown keys are errors, values are converted to the declared types."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class RunConfig(Config):
    """Keys of run.py. The published YAML files load unchanged; after loading, `method` alone says what is trained."""

    # general
    project: str = "coconut"
    save_path: PathText = "checkpoints"
    name: PathText
    only_eval: bool = False
    debug: bool = False
    seed: Seed = 0
    # method: one of eight names, or exactly one of the four booleans of the published files
    method: Method | None = None
    coconut: bool = False
    cot: bool = False
    no_thoughts: bool = False
    no_cot: bool = False
    # training
    c_thought: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 1
    epochs_per_stage: Positive | Annotated[list[Positive], Field(min_length=1)] = 1  # a list: of each stage, the last repeats
    max_latent_stage: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 0
    pad_latent_to_max: bool = True
    uniform_prob: Annotated[float, Field(ge=0, le=1)] = 0.0
    earlier_stage_prob: Annotated[float, Field(ge=0, le=1)] = 0.0
    examples_per_epoch: Annotated[int | None, Field(ge=1, le=MOST_EXAMPLES), BeforeValidator(_null)] = None
    icot_tokens_per_epoch: Annotated[float, Field(gt=0, le=ALL_TOKENS)] = 8.0
    icot_smoothing: Annotated[float | None, Field(gt=0), BeforeValidator(_null)] = 4.0
    icot_start_epoch: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = 0
    icot_remove_all_beyond: Annotated[int | None, Field(ge=0, le=ALL_TOKENS), BeforeValidator(_null)] = None
    num_epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup_steps: NonNegative = 0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size_training: Positive = 32
    gradient_accumulation_steps: Positive = 1
    bf16: bool | Literal["pure"] = False
    reset_optimizer: bool | Literal["epoch"] = False
    grad_clip: Annotated[float | None, Field(gt=0), BeforeValidator(_null)] = None
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    advance_accuracy: Annotated[float | None, Field(gt=0, le=1), BeforeValidator(_null)] = None
    advance_cot_match: Annotated[float | None, Field(gt=0, le=1), BeforeValidator(_null)] = None
    # model
    model_id: PathText
    load_model_path: OptionalPath = None
    resume: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = 0
    from_scratch: bool = False
    attn_implementation: OptionalText = None
    trust_remote_code: bool = False
    gguf_file: OptionalPath = None
    lora_r: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(_null)] = None
    lora_alpha: Annotated[float | None, Field(gt=0), BeforeValidator(_null)] = None
    lora_dropout: Annotated[float | None, Field(ge=0, lt=1), BeforeValidator(_null)] = None
    lora_target_modules: Annotated[str | list[str] | None, Field(min_length=1), BeforeValidator(_null)] = None
    # data
    train_path: OptionalPath = None
    val_path: PathText
    chat_template: bool = False
    # checkpoints
    save_only_improve: bool = False
    save_every_steps: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(_null)] = None
    async_save: bool = False
    sharded_checkpoints: bool = False
    allow_changed_data: bool = False
    keep_last: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(_null)] = None
    # evaluation
    batch_size_eval: Positive = 16
    max_new_tokens: Positive = 64
    eval_latents: EvalLatents = "gold"
    # systems
    parallel: Literal["ddp", "fsdp"] = "ddp"
    fsdp_gather: Literal["pass", "step"] = "pass"
    activation_checkpointing: bool = False
    hang_timeout: Annotated[float | None, Field(gt=0, le=1e6), BeforeValidator(_null)] = 600.0  # seconds
    compile: bool = False
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    num_workers: Annotated[int | None, Field(ge=0, le=MOST_WORKERS), BeforeValidator(_null)] = None
    wandb: Literal["online", "offline", "disabled"] = "online"
    log_every: Positive = 10

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
        """Where a run writes. An evaluation has a place of its own below, named by its data and by where its weights are."""
        run = Path(self.save_path) / self.name
        if not self.only_eval:
            return run
        weights = Path(str(self.load_model_path)).resolve().parts[1:][-2:]
        return run / "eval" / "-".join([Path(self.val_path).stem, *weights])

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


def load_config(kind: type[AnyConfig], arguments: list[str]) -> AnyConfig:
    """`[FILE.yaml] [key=value ...]` to a configuration. Raises UserError with one line on anything that does not fit."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for argument in arguments:
        found, source = _parse_argument(argument)
        for key in found:
            if key not in kind.model_fields:
                raise UserError(f"{source}: unknown key {shown(key)}{_nearest(key, kind)}")
        values.update(found)
        sources.update(dict.fromkeys(found, source))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, sources)) from None


def _parse_argument(argument: str) -> tuple[dict[str, Any], str]:
    if "=" in argument and not _is_file(argument):
        key, text = argument.split("=", 1)
        return {key: _parse_yaml(text, f"command line: {_cut(argument, LONGEST_NAME)}")}, "command line"
    if not argument.endswith((".yaml", ".yml")):
        raise UserError(f"command line: {shown(argument)} is neither a YAML file nor key=value")
    values = _parse_yaml(read_text(Path(argument)), argument)
    if not isinstance(values, dict):
        raise UserError(f"{argument}: expected `key: value` lines, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}, argument


def _is_file(argument: str) -> bool:
    with contextlib.suppress(OSError):  # what is too long for a path is none
        return Path(argument).is_file()
    return False


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except Exception as error:  # `!!float "x"` is a ValueError, `!!bool "x"` a KeyError, `!!timestamp "x"` an AttributeError
        known = isinstance(error, (yaml.YAMLError, ValueError))
        reason = " ".join(str(error).split()) if known else f"a value that its tag does not allow: {error}"
        raise UserError(f"{source}: not valid YAML: {reason}") from None


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML would silently take the last, and numbers that cannot be shown."""

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
        number = super().construct_yaml_int(node)
        if number.bit_length() > MOST_BITS:
            problem = f"a whole number of {number.bit_length()} bits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError naming it if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _nearest(key: str, kind: type[Config]) -> str:
    nearest = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; valid keys: {', '.join(sorted(kind.model_fields))}"


def _one_line(error: ValidationError, sources: dict[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return _message(first)
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{key}: missing; it must be set in the YAML file or as {key}=VALUE"
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
    return int(os.environ.get("RANK", "0")) == 0


class _RankFilter(logging.Filter):
    """Rank 0 logs everything; the others warnings and errors only."""

    def filter(self, record: logging.LogRecord) -> bool:
        return is_main_process() or record.levelno >= logging.WARNING


class _ToStdout(logging.Handler):
    """Looks standard output up each time: it may have been redirected since the logger was made."""

    def emit(self, record: logging.LogRecord) -> None:
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


def _exit(line: str, code: int) -> NoReturn:
    if is_main_process() or os.environ.get("LOCAL_RANK") == "0":  # what is wrong may be so on this node alone
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
