"""A lock that ends with its owner: the kernel releases it when the process ends, however it ends.

The file says who holds the lock, as JSON: host and pid. The lock itself is the kernel's (flock), so a file that a
killed process has left behind locks nothing. On NFS the lock holds across machines; on a file system that has no locks
nothing is locked. Programs that the owner starts do not inherit the lock: Python opens files close-on-exec.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ijepa.utils.errors import UserError

_ATTEMPTS = 10
"""How often to open the file again after its last owner has removed it."""


@contextmanager
def exclusive(file: Path, where: Path, state: str, hint: str) -> Iterator[None]:
    """Hold the lock on `file`, in a folder that exists; the owner may remove the file while it holds the lock.

    Raises:
        UserError: another process holds the lock: `where: state by process N on host H; hint`. Or `file` cannot be
            written. What the file says is then as it was.
    """
    with _acquire(file, where, state, hint):
        yield


def _acquire(file: Path, where: Path, state: str, hint: str) -> TextIO:
    for _ in range(_ATTEMPTS):
        try:
            stream = file.open("a+")
        except OSError as error:
            raise UserError(where, f"cannot be written ({error.strerror})", "give a folder you may write to") from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with stream:
                raise UserError(where, f"{state} by {_owner(stream)}", hint) from None
        except OSError:
            pass  # a file system without locks
        if _removed(file, stream):
            stream.close()
            continue
        try:
            stream.truncate(0)
            stream.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
            stream.flush()
        except OSError as error:
            raise UserError(where, f"cannot be written ({error.strerror})", "free some space") from None
        return stream
    raise UserError(where, f"{state} by another process", hint)


def _removed(file: Path, stream: TextIO) -> bool:
    """Whether the open file is no longer the one of that name: its owner removed it after we had opened it."""
    try:
        return not os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    except OSError:
        return True


def _owner(stream: TextIO) -> str:
    stream.seek(0)
    try:
        record = json.loads(stream.read())
        return f"process {record['pid']} on host {record['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
