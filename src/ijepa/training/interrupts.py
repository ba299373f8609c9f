"""What asks a run to stop: it finishes its step, saves and ends."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ijepa.utils.errors import RunError

_LAUNCHER_LOST, _OUTPUT_LOST = 1000, 2000
"""Requests besides signals, above all numbers of signals. An errno is added to the second one."""


class Interrupted(RunError):
    """The run ended early, after a finished and saved step.

    The exit code is 128 + signal, or 1 if the cause was not a signal.
    """

    def __init__(self, request: int, step: int) -> None:
        if request >= _OUTPUT_LOST:
            cause = f"standard output cannot be written ({os.strerror(request - _OUTPUT_LOST)}): stopped"
        elif request >= _LAUNCHER_LOST:
            cause = "torchrun has ended: stopped"
        else:
            cause, self.exit_code = f"stopped by {signal.Signals(request).name}", 128 + request
        super().__init__(f"{cause} after step {step}, state saved; the same command resumes")


def stop_request(signals: list[int], *, output_lost: int, launcher_lost: bool) -> int:
    """Return what this rank asks to stop for, as one number that ranks can exchange; 0 is nothing.

    Args:
        signals: signals caught so far.
        output_lost: the errno of a failed write to standard output, or 0.
        launcher_lost: whether torchrun has ended.
    """
    if signals:
        return signals[0]
    if output_lost:
        return _OUTPUT_LOST + output_lost
    return _LAUNCHER_LOST if launcher_lost else 0


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of ending the process; a second SIGINT ends it at once.

    A second SIGTERM does not, because torchrun forwards its own to workers that a job manager has signaled too.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        if number not in caught:
            caught.append(number)

    try:
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are the business of the code that started this thread
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
