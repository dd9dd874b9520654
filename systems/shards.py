"""Tensors of a sharded model in files of torch.distributed.checkpoint: each process writes its part, any number read it.

Such files hold pickled metadata; here only what torch itself writes there is accepted, and no entry but tensors is read.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from systems.files import first_line
from utils import UserError

SHARDS = "shards"
PLAIN = {("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("collections", "OrderedDict"), ("torch", "Size")}


def write_shards(directory: Path, tensors: dict[str, Any], background: dist.ProcessGroup | None = None) -> Future:
    """Write nested dictionaries of tensors; called by all processes. Returns what `wait_for` waits for.

    background: a gloo group of its own for a write that goes on in a thread; the tensors may then change at once.
    """
    if background is not None:
        return cast("Future", dcp.async_save(tensors, checkpoint_id=directory, process_group=background))
    written: Future = Future()
    try:
        with _quiet():
            dcp.save(tensors, checkpoint_id=directory)
        written.set_result(None)
    except (CheckpointException, OSError) as error:
        written.set_exception(error)
    return written


def wait_for(written: Future) -> None:
    """Until all processes have written. Raises OSError if one could not."""
    try:
        written.result()
    except CheckpointException as error:
        raise OSError(_reason(error)) from None


def _reason(error: CheckpointException) -> str:
    """What went wrong in the first process that failed."""
    first, _ = error.failures[min(error.failures)]
    return first_line(first)


def read_shards(directory: Path, tensors: dict[str, Any], together: bool = True) -> None:
    """Fill nested dictionaries of tensors, whole or sharded.

    together: called by all processes, of which each reads a part; else by one or some, each for itself.
    Raises UserError if the files are damaged, lack an entry, or hold one of another shape.
    """
    try:
        with _quiet():
            load = dcp.load if together or "no_dist" in inspect.signature(dcp.load).parameters else dcp.load_state_dict
            alone: dict[str, Any] = {} if together else {"no_dist": True}
            load(tensors, storage_reader=_Reader(directory), planner=_Planner(), **alone)
    except CheckpointException as error:
        raise UserError(f"{directory}: cannot be read: {_reason(error)}") from None
    except Exception as error:  # damaged files raise anything from pickle, torch or zipfile
        raise UserError(f"{directory}: cannot be read: {first_line(error)}") from None


def whole_tensors(directory: Path, part: str) -> dict[str, Any]:
    """All tensors of one part (a first key) on the CPU, by the keys below it joined with dots."""
    found = _Reader(directory).read_metadata().state_dict_metadata
    tensors = {
        name.removeprefix(f"{part}."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, metadata.TensorStorageMetadata) and name.startswith(f"{part}.")
    }
    read_shards(directory, {part: tensors})
    return tensors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns where there is no process group, which is no fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class _Metadata(pickle.Unpickler):
    """Reads what FileSystemWriter writes, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN or (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in (metadata.__name__, filesystem.__name__):
            found = getattr(__import__(module, fromlist=[name]), name, None)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise UserError(f".metadata names {module}.{name}, which no checkpoint of tensors needs; it was not loaded")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        found = _Metadata(io.BytesIO(content)).load()
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> NoReturn:
        raise UserError(f"{read_item.dest_index.fqn} is no tensor")
