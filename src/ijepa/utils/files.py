"""Small files that are complete or absent: written beside, flushed, renamed; and what is not a regular file."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ijepa.utils.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is complete or absent. What UTF-8 cannot hold is written as an escape."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file from parts, which need not all be in memory, so that it is complete or absent."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


_KINDS = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def irregular(mode: int) -> str | None:
    """Return what `st_mode` says a file is, as "a FIFO", and None for a regular file.

    Only regular files are read: opening a FIFO waits until somebody writes to it, and a device may never end.
    """
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that the file is complete or absent."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable, so that later steps can rely on them after a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: where the file is missing or no JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(path, f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(path, "not a JSON object")
    return values
