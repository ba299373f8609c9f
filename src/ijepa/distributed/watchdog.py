"""Who is where: what lets a run that has lost a rank, or waits for one, say which, at which step, doing what.

Every rank tells the launcher's key-value store once a second at which step it is and what it does; a thread does it,
so that a rank that only waits still gives a sign. When a collective fails, or nothing moves for `parallel.timeout`
seconds, the others' last signs name the rank that is missing. Without it, a killed process shows as a closed socket,
and a stuck one as nothing at all.

Measuring and compiling may take as long as they take (`_UNLIMITED`): while a rank does so and its process gives signs,
no other rank's clock runs. A process that gives no sign for half of `parallel.timeout` is lost, whatever it did.

A rank that has lost another says so and ends on the spot (`Watchdog.leave`): its device may wait in a collective that
never finishes, and whatever asked the device for more, unread metrics or a synchronisation, would wait with it.

torchrun ends its ranks, but not when it is killed itself. A rank whose torchrun has ended stops after its step, with
the state saved (`Watchdog.orphaned`), or on the spot if that takes longer than `parallel.timeout`.

The store also makes one voice of many: a line that all ranks would say is said once.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from threading import Event, Thread
from typing import Any, NoReturn

import torch.distributed as dist

from ijepa.data.loading.workers import LoaderDefect
from ijepa.distributed.launch import under_torchrun
from ijepa.distributed.process_group import World

_PULSE = 1.0
"""Seconds between two signs of a rank."""
_PATIENCE = 10.0
"""Seconds within which the store has to answer."""
_UNLIMITED = ("diagnosing", "compiling")
"""What others wait for as long as the process that does it is alive."""
_WATCHED = ("computing", *_UNLIMITED)
"""What includes waiting for other ranks; loading and saving have limits of their own, in the loader and in gloo."""
_ENDED = "ended"
"""The last sign of a rank that has left training."""
_launcher_lost = Event()
"""Set once torchrun has ended before this rank."""


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of one rank: its step (from 1), what it does, and a number that grows while it lives."""

    rank: int
    step: int
    doing: str
    beat: int


class Watchdog:
    """Gives this rank's signs while it is open, and reads the others'.

    In a world of one it only notices the end of torchrun, if that started the process.

    Args:
        world: the ranks.
        timeout: seconds that this rank waits for others.
        latest: returns the name of the latest checkpoint, None if there is none.
        compiles: whether torch.compile is used.
    """

    def __init__(
        self, world: World, timeout: float, latest: Callable[[], str | None], *, compiles: bool = False
    ) -> None:
        self.world, self.timeout, self._latest = world, timeout, latest
        self._step, self._doing, self._since, self._beat = 0, "starting", time.monotonic(), 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._compiling = False
        self._closed, self._closing = Event(), ExitStack()
        self._store = connect() if world.size > 1 else None
        if self._store is not None:
            self._give_sign()
            if compiles:
                self._notice_compilation()
        self._thread = Thread(target=self._run, daemon=True)
        if self._store is not None or world.launcher is not None:
            self._thread.start()

    @property
    def orphaned(self) -> bool:
        """Whether torchrun has ended before this rank."""
        return _launcher_lost.is_set()

    def at(self, step: int, doing: str) -> None:
        """Say what this rank does now, of which step (from 1)."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def close(self) -> None:
        """Say that this rank has ended, and give no more signs."""
        self._closed.set()
        self._closing.close()
        if self._thread.is_alive():  # Python aborts when it exits while a thread talks to the store
            self._thread.join(_PATIENCE)
        if self._store is not None:
            self._doing = _ENDED
            with suppress(Exception):
                self._give_sign()

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Leave, as `leave` does, with the first error of a collective."""
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not _of_a_collective(error):
                raise
            self.leave(error)

    def leave(self, error: RuntimeError | None = None) -> NoReturn:
        """Name the ranks that this one waits for, unless one has said why it ended, and end this process: exit code 1.

        What a collective has failed with is a line of its own after that. Nothing is closed or flushed; a resume cuts
        the run's files back to its checkpoint in any case.
        """
        signs: list[tuple[Heartbeat, bool]] = []
        with suppress(Exception):
            signs = self._signs()
        cause = f"\n  {_cause(error)}" if error is not None else ""
        self._end(self._explain(signs) + cause)

    def _end(self, text: str) -> NoReturn:
        try:
            if sys.stdout.isatty():
                print("\033[?25h", end="", flush=True)  # the progress bar has hidden the cursor
            if first_to_say(text, only_if_silent=True):
                print(f"ijepa: {text}", file=sys.stderr, flush=True)
        finally:  # also where nobody reads these lines any more
            os._exit(1)

    def _run(self) -> None:
        orphaned_since = None
        while not self._closed.wait(_PULSE):
            if self._store is not None:
                with suppress(Exception):  # the store may be gone with its launcher; what follows needs it the more
                    self._give_sign()
            if self.world.launcher not in (None, os.getppid()):
                _launcher_lost.set()
                orphaned_since = orphaned_since or time.monotonic()
                if time.monotonic() - orphaned_since > self.timeout:
                    self._end(f"torchrun has ended, and step {self._step} has not for {self.timeout:g} seconds")
            # A device's collective does not come back with an error; so a thread ends what nothing else can.
            elif self._waits_in_vain():
                self.leave()

    def _waits_in_vain(self) -> bool:
        """Whether this rank has waited for the timeout, and not for one that may take as long as it takes."""
        now, doing = time.monotonic(), self._state()
        waited = now - self._since
        if self._store is None or doing not in _WATCHED or waited < self.timeout / 2:
            return False
        late = waited > self.timeout + 2 * _PULSE
        try:
            signs = [self._read(rank) for rank in range(self.world.size) if rank != self.world.rank]
        except Exception:  # no store
            return late and doing not in _UNLIMITED
        for sign in signs:
            beat, since = self._seen.get(sign.rank, (-1, now))
            self._seen[sign.rank] = sign.beat, since if sign.beat == beat else now
        silence = max((now - self._seen[sign.rank][1] for sign in signs if sign.doing != _ENDED), default=0.0)
        if silence >= max(self.timeout / 2, 3 * _PULSE):
            return late
        if doing in _UNLIMITED or any(sign.doing in _UNLIMITED for sign in signs):
            self._since = now
            return False
        return late

    def _notice_compilation(self) -> None:
        from torch._dynamo.callback import callback_handler as compilations

        def begin(*_: object) -> None:
            self._compiling = True

        def end(*_: object) -> None:
            self._compiling, self._since = False, time.monotonic()

        compilations.register_start_callback(begin)
        self._closing.callback(compilations.remove_start_callback, begin)
        compilations.register_end_callback(end)
        self._closing.callback(compilations.remove_end_callback, end)

    def _state(self) -> str:
        return "compiling" if self._compiling else self._doing

    def _give_sign(self) -> None:
        self._beat += 1
        sign = {"step": self._step, "doing": self._state(), "beat": self._beat}
        self._store.set(_key(f"sign/{self.world.rank}"), json.dumps(sign))  # type: ignore[union-attr]

    def _signs(self) -> list[tuple[Heartbeat, bool]]:
        """Return every rank's last sign and whether it still gives any."""
        before = [self._read(rank) for rank in range(self.world.size)]
        for _ in range(3):  # this may be the thread that gives signs
            time.sleep(_PULSE)
            self._give_sign()
        after = [self._read(rank) for rank in range(self.world.size)]
        return [
            (now, now.beat > was.beat or now.rank == self.world.rank) for was, now in zip(before, after, strict=True)
        ]

    def _read(self, rank: int) -> Heartbeat:
        key = _key(f"sign/{rank}")
        store: Any = self._store
        known = json.loads(store.get(key)) if store.check([key]) else {"step": 0, "doing": "starting", "beat": 0}
        return Heartbeat(rank, **known)

    def _explain(self, signs: list[tuple[Heartbeat, bool]]) -> str:
        who = blame(signs) if signs else "other ranks, of which the launcher's store knows nothing any more"
        saved = self._latest()
        resume = f"the same command resumes from {saved}" if saved else "there is no checkpoint yet"
        return f"step {self._step} waits for {who}; {resume}"


def blame(signs: list[tuple[Heartbeat, bool]]) -> str:
    """Say which ranks are missing: those that are silent, else those that are behind."""
    silent = [sign for sign, alive in signs if not alive]
    if silent:
        return ", ".join(f"rank {s.rank}, which gives no sign (last seen at step {s.step}, {s.doing})" for s in silent)
    first = min(sign.step for sign, _ in signs)
    behind = [sign for sign, _ in signs if sign.step == first and sign.doing != "computing"]
    behind = behind or [sign for sign, _ in signs if sign.step == first]
    if len(behind) == len(signs):
        return f"the exchange between ranks, all of them at step {first} and alive"
    return ", ".join(f"rank {s.rank}, which is alive at step {s.step}, {s.doing}" for s in behind)


def connect() -> Any:
    """Connect to the launcher's store."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=_PATIENCE)
    )


def first_to_say(line: str, *, only_if_silent: bool = False) -> bool:
    """Whether this rank is the one to say a line: no other has, or with `only_if_silent`, none has said anything."""
    if not under_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return True
    if _launcher_lost.is_set():  # and the store with it
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = connect()
        if only_if_silent and store.add(_key("said"), 0) > 0:
            return False
        store.add(_key("said"), 1)
        return store.add(_key("said/" + hashlib.sha1(line.encode()).hexdigest()), 1) == 1
    except Exception:  # no store, no agreement: better twice than never
        return True


def _key(name: str) -> str:
    return f"ijepa/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _cause(error: RuntimeError) -> str:
    """Return the first line of a collective's error and, as that of NCCL's says little, what it calls its last one."""
    first, *more = str(error).strip().splitlines() or [""]
    last = next((after.strip() for line, after in pairwise(more) if line.strip() == "Last error:"), "")
    return f"{type(error).__name__}: {first.strip()}" + (f" ({last})" if last else "")


def _of_a_collective(error: RuntimeError) -> bool:
    if isinstance(error, LoaderDefect):  # the modules in its traceback speak of connections, too
        return False
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in words for word in ("gloo", "nccl", "connection", "timed out")
    )
