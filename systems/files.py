"""Every file of our own is read here, against a type: what does not fit is one line that names the file, and never used.

`read_typed` reads JSON, `read_typed_lines` one JSON value a line, `read_training_state` what torch saved. Each type below says
what a file of this version holds; pydantic compares.
"""

from __future__ import annotations

import functools
import gzip
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from config import MOST_EPOCHS, MethodName
from methods import ALL_TOKENS, METHODS, MOST_THOUGHTS
from systems import startup
from thoughts import THOUGHT_MAPS, LatentMode, ThoughtMapSetting
from utils import LARGEST, UserError, check_regular, get_logger, shown

FACTS, STATE, MANIFEST = "coconut.json", "training_state.pt", "manifest.json"
FORMAT = 1

Kind = TypeVar("Kind")
Count = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass
class Facts:
    """coconut.json: what a checkpoint knows of itself. epoch counts finished epochs; accuracy is a fraction."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    method: MethodName
    stage: Annotated[int, Field(ge=0, le=ALL_TOKENS)]
    c_thought: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)]
    max_latent_stage: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)]
    pad_latent_to_max: bool
    epoch: Annotated[int, Field(ge=0, le=MOST_EPOCHS)]
    accuracy: Fraction | None
    start_latent_id: TokenId
    end_latent_id: TokenId
    latent_token_id: TokenId
    eos_token_id: int | None
    thought_map: ThoughtMapSetting = "identity"
    latent_mode: LatentMode = "sequential"
    jacobi_iterations: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 3
    attend_padding: bool = False
    chat_template: bool = False
    data: dict[str, str] = field(default_factory=dict)  # SHA-256 of the files of train_path and val_path
    format: Literal[1] = FORMAT  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _before_thought_maps(cls, values: Any) -> Any:
        """Older checkpoints name a layer in place of the map; it was always the last."""
        if isinstance(values, dict):
            values.pop("hidden_layer_idx", None)
        return values


@dataclass
class TrainingState:
    """Where training is. `best` maps a stage to its best accuracy: early stages still write their reasoning as text."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    epoch: Count = 0  # the epoch in progress, or the next one
    step_in_epoch: Count = 0  # optimizer steps done in it
    samples_in_epoch: Annotated[int, Field(ge=-1)] = 0  # how far it is in its order of samples; -1: version 0.1 did not say
    global_step: Count = 0
    examples: Count = 0  # training examples seen
    optimizer_stage: Count = 0  # the stage for which the optimizer was made
    best: dict[str, Fraction] = field(default_factory=dict)
    best_checkpoint: str | None = None  # the best one of the last stage that was evaluated
    metrics_rows: Count = 0  # rows of metrics.jsonl that belong to this state
    epoch_loss: float = 0.0  # sums over the steps of the epoch in progress
    epoch_parts: dict[str, float] = field(default_factory=dict)  # the same of the loss's named parts
    epoch_tokens: Count = 0
    epoch_positions: Count = 0  # the same with padding
    epoch_seconds: float = 0.0
    skipped: Count = 0  # optimizer steps left out, as their loss or gradients were not finite
    skipped_in_epoch: Count = 0
    skipped_in_a_row: Count = 0  # up to now
    wandb_id: str | None = None

    def begin(self, epoch: int) -> None:
        """Nothing of this epoch is done yet."""
        self.epoch, self.step_in_epoch, self.samples_in_epoch, self.skipped_in_epoch = epoch, 0, 0, 0
        self.epoch_loss, self.epoch_parts, self.epoch_seconds, self.epoch_tokens, self.epoch_positions = 0.0, {}, 0.0, 0, 0


class _Groups(BaseModel):
    param_groups: list[dict[str, Any]]
    state: dict[str, Any] = {}  # in shards, it stands there


class _Saved(BaseModel):
    """training_state.pt. `checkpoint.restore` compares tensors with those of the model."""

    state: TrainingState
    rng: Annotated[list[dict[str, Any]], Field(min_length=1)]
    optimizer: _Groups | None
    adapter: dict[str, Any] | None = None


class FileEntry(BaseModel):
    size: Count
    sha256: str


class Manifest(BaseModel):
    """manifest.json: every other file of a directory."""

    format: Literal[1]
    files: dict[str, FileEntry]


def read_typed(path: Path, kind: type[Kind]) -> Kind:
    """The JSON value of a file as `kind` (a dataclass, a pydantic model, or a type such as dict[str, int]).

    Raises UserError, `FILE: damaged or of another version: REASON`, if it does not fit or cannot be read.
    """
    return _parsed(path, kind, _content(path))


def read_typed_lines(path: Path, kind: type[Kind]) -> list[Kind]:
    """The values of a file with one JSON value a line. A line that does not fit is named in the log and left out.

    What follows the last line break was torn apart by a kill, and is left out too. Raises UserError if it cannot be read.
    """
    found = []
    for number, line in enumerate(_content(path).split(b"\n")[:-1], 1):
        try:
            found.append(_parsed(path, kind, line))
        except UserError as error:
            get_logger().warning(f"{error}; line {number} is left out")
    return found


class UnknownRow(UserError):
    """A method or a thought map that no table here has: a file of the user's own may add it."""


def read_facts(directory: Path) -> Facts | None:
    """coconut.json of a checkpoint directory; None where there is none (a plain Hugging Face model).

    Raises UnknownRow, or UserError as read_typed.
    """
    path = directory / FACTS
    if not path.is_file():
        return None
    named = read_typed(path, dict[str, Any])
    tables: dict[str, Iterable[str]] = {"method": METHODS, "thought_map": THOUGHT_MAPS}
    for key, table in tables.items():
        value = named.get(key)
        name = value.get("name") if isinstance(value, dict) else value
        if isinstance(name, str) and name not in table:
            raise UnknownRow(
                f"{path}: {key} {name} is not known here; {startup.EXTENSIONS}=MODULE imports a file of your own that adds it "
                "(docs/EXTENDING.md)"
            )
    return read_typed(path, Facts)


def read_training_state(directory: Path, mmap: bool = False) -> dict[str, Any]:
    """training_state.pt: {"state", "optimizer", "rng", "adapter"}. mmap: tensors are read when they are used.

    Raises UserError as read_typed.
    """
    path = directory / STATE
    try:
        if path.exists() and not zipfile.is_zipfile(path):
            raise ValueError("not whole, or not written by torch.save")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can raise anything from zipfile, pickle or torch
        raise _damaged(path, first_line(error)) from None
    try:
        state = _adapter(_Saved).validate_python(loaded).state
    except ValidationError as error:
        raise _damaged(path, _reason(error)) from None
    if "samples_in_epoch" not in loaded["state"]:
        state.samples_in_epoch = -1
    return {"adapter": None, **loaded, "state": asdict(state)}


def _content(path: Path) -> bytes:
    """Of a plain or a gzip-compressed file."""
    check_regular(path)
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parsed(path: Path, kind: type[Kind], content: bytes) -> Kind:
    try:
        return _adapter(cast("Any", kind)).validate_json(content)
    except ValidationError as error:
        raise _damaged(path, _reason(error)) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def first_line(error: BaseException) -> str:
    """What a library says, which may be pages, or nothing but the kind of error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged or of another version: {reason}")


def _reason(error: ValidationError) -> str:
    """The first difference: where, what is right, what is there."""
    first = error.errors(include_url=False)[0]
    place, message = ".".join(map(str, first["loc"])), str(first["msg"]).removeprefix("Value error, ")
    if not place:
        return message
    plain = isinstance(first["input"], (str, int, float))  # a tensor would fill pages
    return f"{place}: {message}, got {shown(first['input']) if plain else type(first['input']).__name__}"
