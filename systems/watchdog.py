"""A process that makes no progress says where its threads are, and ends, instead of keeping the others waiting in silence.

When one process of several hangs, the others wait for it in a collective operation, for half an hour by default. Here each
of them gives up by itself, and each reports.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import tempfile
import threading
import time

SLICE = 1.0  # seconds of one sleep, at most
SLICES = 10  # a timeout has at least so many
GRACE = 5.0  # seconds from a process's report to its end: the first end ends the job, and all give up at about the same time
STDERR = 2


class Watchdog:
    """Inside `with`, ends this process with exit code 1 after `timeout` seconds without progress; None never does.

    Time in which the process does not run (SIGSTOP, a laptop that sleeps) does not count. A hang in native code that holds
    Python's global lock goes unseen in its own process, but not in those that wait for it.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._beats = 0  # the thread compares it: a sum of seconds that two threads write could lose a beat
        self._done = "the start"
        self._left = threading.Event()

    def beat(self, done: str) -> None:
        """Report progress: what has just been done, such as "step 12"."""
        self._done = done
        self._beats += 1

    def __enter__(self) -> Watchdog:
        if self.timeout is not None:
            threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()

    def _watch(self, timeout: float) -> None:
        # A sleep counts as what was asked for, however long it took: in between the process may have been stopped.
        seconds = min(SLICE, timeout / SLICES)
        beats, idle = self._beats, 0
        while not self._left.wait(seconds):
            if beats != self._beats:
                beats, idle = self._beats, 0
                continue
            idle += 1
            if idle * seconds >= timeout:
                self._end(idle * seconds)

    def _end(self, seconds: float) -> None:
        """Write the report with one write, so that the reports of several processes do not mix, and end."""
        try:
            process = f"rank {os.environ.get('RANK', '0')}, {socket.gethostname()}, process {os.getpid()}"
            done = f"no progress for {seconds:g} seconds (hang_timeout) after {self._done}"
            report = f"\nwatchdog: {process}: {done}; its threads:\n".encode() + _stacks()
            # In a thread of its own: a pipe that nobody reads may be what the process hangs on.
            threading.Thread(target=os.write, args=(STDERR, report), daemon=True).start()
            time.sleep(GRACE)
        finally:
            os._exit(1)


def _stacks() -> bytes:
    """The stacks of all threads, by way of a file: faulthandler writes them to a descriptor, bit by bit."""
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:
        return f"they cannot be written: {error}\n".encode()
