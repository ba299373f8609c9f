"""A lock that the kernel releases when its process ends, in any way.

The file states the owner of the lock, as JSON: host and pid. The lock itself is flock, so a file that a killed process
left behind does not lock anything. On NFS the lock holds across machines. On a file system without locks nothing is
locked. Child programs do not inherit the lock, because Python opens files close-on-exec.
"""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import TextIO

from ijepa.utils.errors import UserError

_ATTEMPTS = 10
"""Number of times to open the file again after its last owner has removed it."""


def exclusive(file: Path, where: Path, state: str, hint: str) -> TextIO:
    """Lock `file`, in an existing folder, until the returned file is closed; use it in a `with` statement.

    The owner may remove the file while it holds the lock.

    Raises:
        UserError: another process holds the lock: `where: state by process N on host H; hint`. Or `file` cannot be
            written. The content of the file is then unchanged.
    """
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
    """Whether the owner has removed the file after we opened it, so that `file` is now another file or none."""
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
