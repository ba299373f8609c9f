"""Signals that ask a run to stop."""

import os
import signal

import pytest

from ijepa.training.interrupts import caught_signals


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_caught_signals_collects_repeated_sigterm():
    """For example from the job manager and from torchrun: the state is still saved."""
    with caught_signals() as caught:
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
        assert caught == [signal.SIGTERM, signal.SIGINT]


def test_caught_signals_second_sigint_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), caught_signals() as caught:
        send(signal.SIGINT, signal.SIGTERM)
        assert caught == [signal.SIGINT, signal.SIGTERM]
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
