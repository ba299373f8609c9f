"""Files and folders that are complete or absent (written under a temporary name, flushed, renamed), JSON, SHA-256."""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ijepa.utils.errors import RunError, UserError


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is complete or absent. Characters that are not valid in UTF-8 become escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; when the block ends, flush it to the disk and rename it to `path`.

    If the block raises, the temporary file is removed and `path` stays as it was. `file.name` is the path of the
    temporary file, for libraries that write by name.

    Raises:
        OSError: the file cannot be written.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Make a temporary folder next to `path`; when the block ends, flush its files and rename it to `path`.

    If the block raises, the temporary folder is removed. An existing file or non-empty folder `path` is an error at the
    end of the block: callers that can say so in better words check before.

    Raises:
        OSError: the folder cannot be written, or `path` exists.
    """
    partial = _partial(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        partial.rename(path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    """Return a hidden name next to `path` that no other process, thread or machine uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def write_errors(where: object) -> Iterator[None]:
    """Turn an OSError of the block into a RunError that says that `where` cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{where}: cannot be written: {error.strerror or error}") from error


@contextmanager
def read_errors(where: object, path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError at `where` that says that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(where, f"{error.filename or path} cannot be read: {error.strerror or error}") from error


_KINDS = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def irregular(mode: int) -> str | None:
    """Return the kind of a file by its `st_mode`, such as "a FIFO", and None for a regular file.

    Only regular files are read: opening a FIFO waits for a writer, and reading a device may never end.
    """
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that the file is complete or absent."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
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
        UserError: the file is missing or not a JSON object.
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
