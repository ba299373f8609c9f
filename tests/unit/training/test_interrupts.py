"""Which signals a run waits with, and which it does not."""

import os
import signal

import pytest

from ijepa.training.interrupts import caught_signals


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_sigterm_asks_however_often_it_comes():
    """From the scheduler and from torchrun, for example: the state is still saved."""
    with caught_signals() as caught:
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
        assert caught == [signal.SIGTERM, signal.SIGINT]


def test_a_second_sigint_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), caught_signals() as caught:
        send(signal.SIGINT, signal.SIGTERM)
        assert caught == [signal.SIGINT, signal.SIGTERM]
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
