"""Names the rank that a run has lost or waits for, the step, and what that rank did last.

Once a second a thread of every rank writes a heartbeat into the launcher's key-value store: the step and the current
activity. It is a thread, so a rank that only waits has heartbeats too. If a collective fails, or nothing moves for
`parallel.timeout` seconds, the last heartbeats name the rank that is missing. Without them, a killed process shows as
a closed socket, and a stuck one does not show at all.

Measuring and compiling have no time limit (`_UNLIMITED`): while a rank does one of them and has heartbeats, the clocks
of the other ranks stand still. A process without a heartbeat for half of `parallel.timeout` counts as lost in any case.

A rank that has lost another one prints that and ends at once (`Watchdog.leave`), without closing anything: its device
may wait in a collective that never finishes, and reading metrics or synchronizing would wait as well.

torchrun ends its ranks, but not if it is killed itself. A rank whose torchrun has ended stops after its step, with the
state saved (`Watchdog.orphaned`), or at once if that takes longer than `parallel.timeout`.

The store also makes sure that a line that all ranks would print is printed once.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from threading import Event, Thread
from typing import Any, NoReturn

import torch.distributed as dist

from ijepa.data.loading.workers import LoaderDefect
from ijepa.distributed.launch import under_torchrun
from ijepa.distributed.process_group import World

_STORE_TIMEOUT = 10.0
"""Seconds in which the store has to answer."""
_UNLIMITED = ("diagnosing", "compiling")
"""Activities that others wait for as long as the process has heartbeats."""
_WATCHED = ("computing", *_UNLIMITED)
"""Activities that include waiting for other ranks. The loader and gloo have limits for loading and saving."""
_ENDED = "ended"
"""Last activity of a rank that has left training."""
_launcher_lost = Event()
"""Set once torchrun has ended before this rank."""


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank: its step (from 1), its activity, and a number that grows while it lives."""

    rank: int
    step: int = 0
    activity: str = "starting"
    beat: int = 0


class Watchdog:
    """Writes this rank's heartbeats while it is open, and reads the others'.

    On one process it only notices the end of torchrun, if torchrun has started the process.

    Args:
        world: the ranks.
        timeout: seconds that this rank waits for others.
        latest: returns the name of the latest checkpoint, None if there is none.
        compiles: whether torch.compile is used.
        interval: seconds between two heartbeats.
        store_timeout: seconds in which the store has to answer.
    """

    def __init__(
        self,
        world: World,
        timeout: float,
        latest: Callable[[], str | None],
        *,
        compiles: bool = False,
        interval: float = 1.0,
        store_timeout: float = _STORE_TIMEOUT,
    ) -> None:
        self.world, self.timeout, self._latest = world, timeout, latest
        self._interval, self._store_timeout = interval, store_timeout
        self._step, self._activity, self._since, self._beat = 0, "starting", time.monotonic(), 0
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: its last beat, and when it was new
        self._compiling = False
        self._closed, self._closing = Event(), ExitStack()
        self._store = _connect(store_timeout) if world.size > 1 else None
        if self._store is not None:
            self._write()
            if compiles:
                self._observe_compilation()
        self._thread = Thread(target=self._run, daemon=True)
        if self._store is not None or world.launcher is not None:
            self._thread.start()

    @property
    def orphaned(self) -> bool:
        """Whether torchrun has ended before this rank."""
        return _launcher_lost.is_set()

    def report(self, step: int, activity: str) -> None:
        """Set what this rank does from now on, and for which step (from 1)."""
        self._step, self._activity, self._since = step, activity, time.monotonic()

    def close(self) -> None:
        """Write that this rank has ended, and stop the heartbeats."""
        self._closed.set()
        self._closing.close()
        if self._thread.is_alive():  # Python aborts if it exits while a thread uses the store
            self._thread.join(self._store_timeout)
        if self._store is not None:
            self._activity = _ENDED
            with suppress(Exception):
                self._write()

    @contextmanager
    def leave_on_collective_error(self) -> Iterator[None]:
        """Call `leave` if a collective fails in this context."""
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not is_collective_error(error):
                raise
            self.leave(error)

    def leave(self, error: RuntimeError | None = None) -> NoReturn:
        """Name the ranks that this one waits for, unless a rank has printed why it ended, and exit with code 1.

        The error of the collective follows on a line of its own. Nothing is closed or flushed; a resume truncates the
        run's files to its checkpoint in any case.
        """
        heartbeats: list[tuple[Heartbeat, bool]] = []
        with suppress(Exception):
            heartbeats = self._read_twice()
        who = "other ranks, about which the launcher's store has no information"
        saved = self._latest()
        self._exit(
            f"step {self._step} waits for {describe_stall(heartbeats) if heartbeats else who}; "
            + (f"the same command resumes from {saved}" if saved else "there is no checkpoint yet")
            + (f"\n  {summarize(error)}" if error is not None else "")
        )

    def _exit(self, text: str) -> NoReturn:
        # Printed and not logged: a logging handler may wait for a lock that a stuck thread holds.
        try:
            if sys.stdout.isatty():
                print("\033[?25h", end="", flush=True)  # show the cursor, which the progress bar has hidden
            if first_to_print(text, only_if_silent=True, timeout=self._store_timeout):
                print(f"ijepa: {text}", file=sys.stderr, flush=True)
        finally:  # also if stderr is closed
            os._exit(1)

    def _run(self) -> None:
        orphaned_since = None
        while not self._closed.wait(self._interval):
            if self._store is not None:
                with suppress(Exception):  # the store may have ended with torchrun, which is noticed below
                    self._write()
            if self.world.launcher not in (None, os.getppid()):
                _launcher_lost.set()
                orphaned_since = orphaned_since or time.monotonic()
                if time.monotonic() - orphaned_since > self.timeout:
                    self._exit(f"torchrun has ended, and step {self._step} did not end within {self.timeout:g} seconds")
            # A device's collective does not return an error, so only this thread can end the process.
            elif self._waits_in_vain():
                self.leave()

    def _waits_in_vain(self) -> bool:
        """Whether this rank has waited for `timeout`, and not for a rank whose activity has no limit."""
        now, activity = time.monotonic(), self._current_activity()
        waited = now - self._since
        if self._store is None or activity not in _WATCHED or waited < self.timeout / 2:
            return False
        late = waited > self.timeout + 2 * self._interval
        try:
            others = [each for each in self._read() if each.rank != self.world.rank]
        except Exception:  # no store
            return late and activity not in _UNLIMITED
        # Clocks of machines differ, so heartbeats are compared with this rank's clock when they change.
        for other in others:
            beat, since = self._seen.get(other.rank, (-1, now))
            self._seen[other.rank] = other.beat, since if other.beat == beat else now
        silence = max((now - self._seen[each.rank][1] for each in others if each.activity != _ENDED), default=0.0)
        if silence >= max(self.timeout / 2, 3 * self._interval):
            return late
        # All others live, and one of them may take its time: start to wait again.
        if activity in _UNLIMITED or any(other.activity in _UNLIMITED for other in others):
            self._since = now
            return False
        return late

    def _observe_compilation(self) -> None:
        from torch._dynamo.callback import callback_handler as compilations

        def begin(*_: object) -> None:
            self._compiling = True

        def end(*_: object) -> None:
            self._compiling, self._since = False, time.monotonic()

        compilations.register_start_callback(begin)
        self._closing.callback(compilations.remove_start_callback, begin)
        compilations.register_end_callback(end)
        self._closing.callback(compilations.remove_end_callback, end)

    def _current_activity(self) -> str:
        return "compiling" if self._compiling else self._activity

    def _write(self) -> None:
        self._beat += 1
        own = Heartbeat(self.world.rank, self._step, self._current_activity(), self._beat)
        self._store.set(_key(f"heartbeat/{own.rank}"), json.dumps(asdict(own)))  # type: ignore[union-attr]

    def _read(self) -> list[Heartbeat]:
        """Return every rank's last heartbeat."""
        store: Any = self._store
        keys = [_key(f"heartbeat/{rank}") for rank in range(self.world.size)]
        return [
            Heartbeat(**json.loads(store.get(key))) if store.check([key]) else Heartbeat(rank)
            for rank, key in enumerate(keys)
        ]

    def _read_twice(self) -> list[tuple[Heartbeat, bool]]:
        """Return every rank's last heartbeat and whether it still has any."""
        before = self._read()
        for _ in range(3):  # this may be the thread that writes heartbeats
            time.sleep(self._interval)
            self._write()
        return [
            (now, now.beat > was.beat or now.rank == self.world.rank)
            for was, now in zip(before, self._read(), strict=True)
        ]


def describe_stall(heartbeats: list[tuple[Heartbeat, bool]]) -> str:
    """Describe the ranks that are missing: those without a heartbeat, else those that are behind.

    Args:
        heartbeats: every rank's last heartbeat, and whether it still has any.
    """
    silent = [each for each, alive in heartbeats if not alive]
    if silent:
        return ", ".join(
            f"rank {each.rank}, which does not respond (last seen at step {each.step}, {each.activity})"
            for each in silent
        )
    first = min(each.step for each, _ in heartbeats)
    # Among the ranks at the first step, those that compute wait for those that load data or measure.
    behind = [each for each, _ in heartbeats if each.step == first and each.activity != "computing"]
    behind = behind or [each for each, _ in heartbeats if each.step == first]
    if len(behind) == len(heartbeats):
        return f"communication between ranks (all ranks are alive and at step {first})"
    return ", ".join(f"rank {each.rank}, which is alive (at step {each.step}, {each.activity})" for each in behind)


def first_to_print(line: str, *, only_if_silent: bool = False, timeout: float = _STORE_TIMEOUT) -> bool:
    """Whether this rank should print a line: no other rank has, or with `only_if_silent`, none has printed any line."""
    if not under_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return True
    if _launcher_lost.is_set():  # and the store has ended with it
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = _connect(timeout)
        if only_if_silent and store.add(_key("printed"), 0) > 0:
            return False
        store.add(_key("printed"), 1)
        return store.add(_key("printed/" + hashlib.sha1(line.encode()).hexdigest()), 1) == 1
    except Exception:  # without a store, twice is better than never
        return True


def summarize(error: RuntimeError) -> str:
    """Return the first line of a collective's error, and NCCL's last error, because NCCL's first line says little."""
    first, *more = str(error).strip().splitlines() or [""]
    last = next((after.strip() for line, after in pairwise(more) if line.strip() == "Last error:"), "")
    return f"{type(error).__name__}: {first.strip()}" + (f" ({last})" if last else "")


def is_collective_error(error: RuntimeError) -> bool:
    """Whether an error comes from a collective; gloo raises a plain `RuntimeError`, so its text has to tell."""
    if isinstance(error, LoaderDefect):  # its traceback names multiprocessing/connection.py
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out")
    )


def _connect(timeout: float) -> Any:
    """Connect to the launcher's store."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=timeout)
    )


def _key(name: str) -> str:
    # After a restart by torchrun the store still has the keys of the last start.
    return f"ijepa/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
