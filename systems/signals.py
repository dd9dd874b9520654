"""Signals that ask a run to stop. A training finishes its step, saves and ends with exit code 0; a sweep ends at once."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)  # how SLURM announces it
STOP_SIGNALS = (*PREEMPTION, signal.SIGINT)
ECHO = 2.0  # seconds in which a second Ctrl-C is the first one again: torchrun passes on what the terminal sent already


class StopRequest:
    """Whether a signal has asked to stop. A second Ctrl-C ends at once; further SIGTERM and SIGUSR1 change nothing."""

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    @contextlib.contextmanager
    def listening(self, numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[StopRequest]:
        """Inside, the signals do no more than ask."""
        before = {number: signal.signal(number, self._request) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.requested and time.monotonic() - self._first > ECHO:
            raise KeyboardInterrupt
        if not self.requested:
            self._first = time.monotonic()
        self.requested = True


class Preempted(BaseException):
    """A signal asked the run to stop. No Exception, so that it is not recorded as a question's failure."""


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """SIGTERM, SIGUSR1 (SLURM) and Ctrl-C end the run at once: what is not saved yet is computed again."""
    stopped = False

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        for each in STOP_SIGNALS:  # SLURM sends it to every process, and a script may pass it on once more
            signal.signal(each, signal.SIG_IGN)
        raise Preempted(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)
