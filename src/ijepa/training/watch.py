"""Who is where: what lets a run that has lost a rank, or waits for one, say which, at which step, doing what.

Every rank tells the launcher's key-value store once a second at which step it is and what it does; a thread does it,
so that a rank that only waits still gives a sign. When a collective fails, or nothing moves for `parallel.timeout`
seconds, the others' last signs name the rank that is missing. Without it, a killed process shows as a closed socket,
and a stuck one as nothing at all.

A rank that has lost another says so and ends on the spot (`Watch.leave`): its device may wait in a collective that
never finishes, and whatever asked the device for more, unread metrics or a synchronisation, would wait with it.

The store also makes one voice of many: a line that all ranks would say is said once.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

import torch.distributed as dist

from ijepa.data.workers import LoaderDefect
from ijepa.training.checkpoint import list_checkpoints
from ijepa.training.world import World, under_torchrun

_PULSE = 1.0
"""Seconds between two signs of a rank."""
_PATIENCE = 10.0
"""Seconds within which the store has to answer."""
_ON_THE_DEVICE = ("computing", "diagnosing")
"""What waits for other ranks through the device; all else has a limit of its own, in the loader or in gloo."""


@dataclass(frozen=True)
class Sign:
    """The last sign of one rank: its step (from 1), what it does, and a number that grows while it lives."""

    rank: int
    step: int
    doing: str
    beat: int


class Watch:
    """Gives this rank's signs while it is open, and reads the others'. In a world of one it does nothing."""

    def __init__(self, world: World, timeout: float, checkpoints: Path) -> None:
        self.world, self.timeout, self.checkpoints = world, timeout, checkpoints
        self._step, self._doing, self._since, self._beat = 0, "starting", time.monotonic(), 0
        self._closed = Event()
        self._store = connect() if world.size > 1 else None
        if self._store is not None:
            self._give_sign()
            Thread(target=self._run, daemon=True).start()

    def at(self, step: int, doing: str) -> None:
        """Say what this rank does now, of which step (from 1)."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def close(self) -> None:
        """Give no more signs."""
        self._closed.set()

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
        signs: list[tuple[Sign, bool]] = []
        with suppress(Exception):
            signs = self._signs()
        line = self._explain(signs)
        if sys.stdout.isatty():
            print("\033[?25h", end="", flush=True)  # the progress bar has hidden the cursor
        if first_to_say(line, only_if_silent=True):
            cause = f"\n  {_cause(error)}" if error is not None else ""
            print(f"ijepa: {line}{cause}", file=sys.stderr, flush=True)
        os._exit(1)

    def _run(self) -> None:
        while not self._closed.wait(_PULSE):
            with suppress(Exception):  # the store may be gone with its launcher; what follows needs it the more
                self._give_sign()
            # A device's collective does not come back with an error; so a thread ends what nothing else can.
            if self._doing in _ON_THE_DEVICE and time.monotonic() - self._since > self.timeout + 2 * _PULSE:
                self.leave()

    def _give_sign(self) -> None:
        self._beat += 1
        sign = {"step": self._step, "doing": self._doing, "beat": self._beat}
        self._store.set(_key(f"sign/{self.world.rank}"), json.dumps(sign))  # type: ignore[union-attr]

    def _signs(self) -> list[tuple[Sign, bool]]:
        """Return every rank's last sign and whether it still gives any."""
        before = [self._read(rank) for rank in range(self.world.size)]
        time.sleep(3 * _PULSE)
        after = [self._read(rank) for rank in range(self.world.size)]
        return [
            (now, now.beat > was.beat or now.rank == self.world.rank) for was, now in zip(before, after, strict=True)
        ]

    def _read(self, rank: int) -> Sign:
        key = _key(f"sign/{rank}")
        store: Any = self._store
        known = json.loads(store.get(key)) if store.check([key]) else {"step": 0, "doing": "starting", "beat": 0}
        return Sign(rank, **known)

    def _explain(self, signs: list[tuple[Sign, bool]]) -> str:
        who = blame(signs) if signs else "other ranks, of which the launcher's store knows nothing any more"
        saved = list_checkpoints(self.checkpoints)
        resume = f"the same command resumes from {saved[-1].name}" if saved else "there is no checkpoint yet"
        return f"step {self._step} waits for {who}; {resume}"


def blame(signs: list[tuple[Sign, bool]]) -> str:
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
