"""Runs a function on many jobs in several processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

from ijepa.utils.errors import RunError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(function: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """Yield `function(job)` for each job, in order; with `processes` above 1, function and jobs must be picklable.

    Raises:
        RunError: a process was killed.
    """
    if processes <= 1 or len(jobs) <= 1:
        yield from map(function, jobs)
        return
    # spawn, not fork: the calling process may have threads (torch has), and a forked copy of those can hang.
    # The function is sent once to each process, because its arguments may be large.
    workers, context = min(processes, len(jobs)), get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function,)) as pool:
        rest = iter(jobs)
        waiting = deque(pool.submit(_run, job) for job in islice(rest, 4 * workers))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(_run, job) for job in islice(rest, 1))
                yield result
        except BrokenProcessPool:
            raise RunError("a process was killed; run the same command again") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[[Any], Any]
"""In a process of the pool: what it runs."""


def _run(job: Any) -> Any:
    return _function(job)


def _start(function: Callable[[Any], Any]) -> None:
    """Start a process of the pool, and end it when the command has ended for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides when to stop
    global _function
    _function = function
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
