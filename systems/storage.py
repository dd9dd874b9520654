"""What a kill, a full disk or a second run must not harm: directories written whole, their manifests, the lock of a run.

manifest.json holds the size and the SHA-256 of every other file of a directory. It is written last, before the directory
gets its name, so a directory that was cut, copied halfway or damaged later does not pass for a whole one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist
from safetensors import SafetensorError

from systems import distributed
from systems.files import FACTS, FORMAT, MANIFEST, STATE, Manifest, UnknownRow, read_facts, read_training_state, read_typed
from systems.writing import disk_problem, fsync, write_text, writing
from utils import UserError, get_logger

NAME = re.compile(r"checkpoint_(\d+)(?:_step(\d+))?")
LOCK = ".lock"
CHUNK = 2**20


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found or used."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(directory: Path) -> None:
    """Size and SHA-256 of every file below the directory."""
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    write_text(directory / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")


def manifest_problem(directory: Path, hashes: bool, optional: str | None = None) -> str | None:
    """The first thing in which a directory differs from its manifest: which file, and how. None if nothing does.

    A directory of an earlier version, without a manifest, passes. hashes: read all files as well, once their sizes are right.
    optional: a file that may be missing.
    """
    if not (directory / MANIFEST).is_file():
        return None
    try:
        files = read_typed(directory / MANIFEST, Manifest).files
    except UserError as error:
        return str(error).removeprefix(f"{directory}/")
    expected = {directory / name: entry for name, entry in files.items() if name != optional or (directory / name).exists()}
    for path, entry in expected.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if (size := path.stat().st_size) != entry.size:
            return f"{path.name} has {size:,} bytes; {MANIFEST} says {entry.size:,}"
    for path, entry in expected.items() if hashes else ():
        try:
            found = sha256(path)
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror}"
        if found != entry.sha256:
            return f"{path.name} is damaged: its SHA-256 is {found}; {MANIFEST} says {entry.sha256}"
    return None


def begin_directory(directory: Path) -> Path:
    """The empty directory of another name that `write_directory` fills; other processes may write into it before.

    Raises CheckpointError if it cannot be made.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _not_written(directory, error) from None
    return partial


def _not_written(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{directory}: the checkpoint could not be written: {disk_problem(error, directory.parent)}; "
        "the checkpoints before it are untouched"
    )


def write_directory(directory: Path, fill: Callable[[Path], None], begun: Path | None = None) -> None:
    """Let `fill` write files into a directory of another name, add the manifest, make it durable, then give it its name.

    begun: what `begin_directory` gave, if something is in it already. Raises CheckpointError if that fails; whatever was
    there before stays.
    """
    partial = begun or begin_directory(directory)
    try:
        fill(partial)
        write_manifest(partial)
        for path in (*partial.rglob("*"), partial):
            fsync(path)
        remove_directory(directory)
        partial.rename(directory)
        fsync(directory.parent)
    except (OSError, RuntimeError, SafetensorError, UserError) as error:  # torch.save raises RuntimeError on a full disk
        raise _not_written(directory, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Take the name away first: a directory that is removed halfway must not be found under it."""
    if not directory.exists():
        return
    removed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    with writing(directory):
        directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """What a killed run left of the files that it was writing or removing."""
    for path in (*directory.glob(".*.partial"), *directory.glob(".*.removed")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Writer:
    """Does the writing of a checkpoint on rank 0: at once, or in a thread while training goes on."""

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._shards: Future | None = None
        self._group: Any = None

    @property
    def group(self) -> Any:
        """The process group in which shards are written in the background; None if they are not."""
        if self.background and self._group is None:
            self._group = dist.new_group(backend="gloo")  # a thread must not meet the collectives of the main one
        return self._group

    def start(self, write: Callable[[], None], shards: Future | None = None) -> None:
        """Begin to write; called by all processes. What goes wrong in a thread is raised by the next `wait`.

        shards: what this process writes itself; `write` waits for that of all.
        """
        self._shards = shards
        if not self.background:
            distributed.run_on_main(write)
        elif distributed.rank() == 0:
            self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)  # a second Ctrl-C ends it too
            self._thread.start()

    def wait(self) -> None:
        """Until everything is written; called by all processes. Raises CheckpointError on all of them if it was not."""
        self.settle()
        distributed.run_on_main(self._raise_failure)

    def settle(self) -> None:
        """Until what this process writes is written or has failed: for a run that ends with an error, without the others."""
        if self._shards is not None:
            concurrent.futures.wait([self._shards])
        if self._thread is not None:
            self._thread.join()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self.failure = error

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure


def complete_checkpoints(save_dir: Path) -> list[Path]:
    """Checkpoints with all their files in full size, oldest first. Anything else in the directory is left alone."""
    return [path for path in _named(save_dir) if _problem(path, hashes=False) is None]


def newest_whole(save_dir: Path) -> Path | None:
    """The newest checkpoint that is what it was when it was saved, its hashes too; None if there is none of any kind.

    Damaged ones that are newer are named in the log. One without a manifest may be a copy that was cut short, or of a version
    before 0.2, so it counts only where none has a manifest. Raises CheckpointError if there are only damaged ones.
    """
    found: Path | None = None
    passed_over: dict[Path, str] = {}
    for path in reversed(_named(save_dir)):
        problem = _problem(path, hashes=True)
        proven = problem is None and (path / MANIFEST).is_file()
        if proven or (problem is None and found is None):
            found = path
        if proven:
            break
        passed_over[path] = problem or f"{MANIFEST} is missing"
    others = [path for path in passed_over if path != found]
    for path in others:
        get_logger().warning(f"{path} is passed over: {passed_over[path]}")
    if others and found is None:
        damaged = "; ".join(f"{path.name}: {passed_over[path]}" for path in others)
        raise CheckpointError(
            f"{save_dir}: no whole checkpoint is left ({damaged}): put back a copy of one, or choose another name "
            "or remove them to start from the beginning"
        )
    return found


def _named(save_dir: Path) -> list[Path]:
    """Directories with the name of a checkpoint, oldest first: by epoch and step, as clocks can be wrong."""
    if not save_dir.is_dir():
        return []
    named = [(match, path) for path in save_dir.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(named, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)))]


def _problem(directory: Path, hashes: bool) -> str | None:
    """Why training cannot go on from a directory; None if it can. hashes: read all files as well. Raises UnknownRow."""
    try:
        for name in (FACTS, STATE):
            if not (directory / name).is_file():
                return f"{name} is missing"
        problem = manifest_problem(directory, hashes)
        if hashes and problem is None:
            read_facts(directory)
            read_training_state(directory, mmap=True)
    except UnknownRow:
        raise
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except UserError as error:
        return str(error).removeprefix(f"{directory}/")
    return problem


def remove_old(newest: Path, keep_last: int | None, best: str | None) -> None:
    """Delete checkpoints inside finished epochs, and all but the last `keep_last` and the best one (None keeps them).

    newest: the one just saved. What sorts after it was passed over as damaged when the run started, and does not count.
    """
    whole = complete_checkpoints(newest.parent)
    saved = whole[: whole.index(newest) + 1] if newest in whole else []  # another name has no others
    for number, path in enumerate(reversed(saved)):
        too_old = keep_last is not None and number >= keep_last
        if number > 0 and path.name != best and (too_old or "_step" in path.name):
            remove_directory(path)


@contextlib.contextmanager
def alone(directory: Path | None) -> Iterator[None]:
    """For all processes of a run: inside, no other run writes into the directory. None: nothing is written.

    The directory is made if it is not there, and removed again if it stays empty.
    Raises UserError on all of them if another run does, or if it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        if directory is not None:
            distributed.run_on_main(lambda: _lock(directory, stack))
        yield


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    """Hold a directory until the stack closes, and clear up what a killed run left in it.

    The kernel gives the lock back when the process ends, however it ends. It is a POSIX lock, which forked data workers do
    not inherit: they may outlive a killed run for seconds (the library filelock takes flock, which they do). It holds over NFS
    too where the server supports locks.
    """
    try:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        stack.callback(_remove_empty, made)
        directory.mkdir(parents=True, exist_ok=True)
        lock = lock_file(directory)
        file = stack.enter_context(_open_locked(lock, directory))
        stack.callback(lock.unlink, missing_ok=True)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to: {error.strerror}; choose another save_path") from None
    remove_leftovers(directory)


def lock_file(directory: Path) -> Path:
    """Beside the directory. Inside, it would move with the directory, and another run could begin under the old name."""
    place = directory.resolve()
    return place.with_name(f".{place.name}{LOCK}")


def _open_locked(path: Path, directory: Path) -> BinaryIO:
    """The lock file of a directory, held; one that its last holder has removed in the meantime does not count."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"{directory}: another run is writing there ({file.read(200).decode(errors='replace') or 'just started'}): "
                "wait for it or stop it, or choose another name"
            ) from None
        except OSError as error:
            get_logger().warning(f"{path}: this file system has no locks ({error.strerror}): nothing keeps a second run out")
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()


def _remove_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in directories:
            path.rmdir()
