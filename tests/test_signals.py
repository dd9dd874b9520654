"""What each signal asks for."""

from __future__ import annotations

import os
import signal

import pytest

from systems import signals
from systems.signals import STOP_SIGNALS, StopRequest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the monotonic clock, to be set."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_signal_asks_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.listening():
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once_but_not_its_echo(clock: list[float]) -> None:
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's, for the same Ctrl-C
        assert stop.requested
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_repeated_preemption_still_finishes_the_step(clock: list[float]) -> None:
    """SLURM signals all processes of a job, and torchrun its workers: each of them gets the same SIGTERM more than once."""
    stop = StopRequest()
    with stop.listening():
        for _ in range(3):
            clock[0] += 10
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
