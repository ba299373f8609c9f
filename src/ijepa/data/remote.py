"""Shards on other machines, fetched once into a local folder: `https://...`, `s3://...`, whatever fsspec opens.

A run reads every image of every epoch in a random order, so what it reads from must be near: shards are fetched whole,
several at a time, each written beside its place and renamed, and found again at the next start if their size is still
that of the original. Several processes of one machine fetch once: one does, the others wait at a lock.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ijepa.errors import Failed, Refused

_THREADS = 8
_ATTEMPTS = 3
_CHUNK = 2**22
Tell = Callable[[str], None]


def is_remote(path: str) -> bool:
    """Whether a path names another machine's files."""
    return "://" in path


def fetch(urls: list[str], where: str, folder: Path, tell: Tell | None = None) -> list[Path]:
    """Return local copies of the shards at `urls`, in `folder`; fetch those that are not there.

    A `classes.txt` beside the first shard comes along.

    Raises:
        Refused: without the extra `remote`, a shard that is not there, or too little room.
        Failed: fetching failed several times.
    """
    say = tell or (lambda line: print(line, file=sys.stderr, flush=True))
    system = _system(urls[0], where)
    parent = urls[0].rpartition("/")[0]
    home = folder / hashlib.blake2b(parent.encode(), digest_size=8).hexdigest()
    home.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    for url in urls:
        try:
            sizes[url] = int(system.info(url)["size"] or 0)
        except FileNotFoundError:
            raise Refused(where, f"{url} does not exist") from None
        except Exception as error:  # every file system has errors of its own
            raise Refused(where, f"{url} cannot be asked for: {_line(error)}") from None
    with _alone(home):
        missing = [url for url in urls if not _whole(_local(home, url), sizes[url])]
        need, free = sum(sizes[url] for url in missing), shutil.disk_usage(home).free
        if need > free:
            raise Refused(
                where, f"{need / 1e9:.1f} GB are to be fetched, {home} has room for {free / 1e9:.1f}", "set IJEPA_CACHE"
            )
        done = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for url, size in pool.map(lambda url: (url, _get(system, url, _local(home, url))), missing):
                done += size
                say(f"fetched {PurePosixPath(url).name}, {done / 1e9:.2f} of {need / 1e9:.2f} GB")
        classes = f"{parent}/classes.txt"
        if not (home / "classes.txt").exists() and system.exists(classes):
            _get(system, classes, home / "classes.txt")
    return [_local(home, url) for url in urls]


def matching(pattern: str, where: str) -> list[str]:
    """Return the URLs that a glob, or a folder ending in `/`, means.

    Raises:
        Refused: nothing there.
    """
    system = _system(pattern, where)
    protocol = pattern.partition("://")[0]
    try:
        found = sorted(system.glob(f"{pattern}*.tar" if pattern.endswith("/") else pattern))
    except Exception as error:  # as above
        raise Refused(where, f"{pattern} cannot be listed: {_line(error)}") from None
    if not found:
        raise Refused(where, f"{pattern} matches nothing", "give a brace pattern such as URL/train-{0000..0127}.tar")
    return [name if "://" in name else f"{protocol}://{name}" for name in found]


def _system(url: str, where: str) -> Any:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)[0]
    except ImportError as error:
        raise Refused(where, f"{url} needs {error.name}", "pip install 'ijepa-pretrain[remote]'") from None
    except ValueError as error:
        raise Refused(where, f"{url}: {_line(error)}") from None


def _get(system: Any, url: str, local: Path) -> int:
    """Fetch one file and return its size."""
    beside = local.with_name(f".{local.name}.{os.getpid()}")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with system.open(url, "rb") as source, beside.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
                out.flush()
                os.fsync(out.fileno())
            beside.replace(local)
            return local.stat().st_size
        except Exception as error:  # as above
            beside.unlink(missing_ok=True)
            if attempt == _ATTEMPTS:
                raise Failed(f"{url}: cannot be fetched: {_line(error)}") from None
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _local(home: Path, url: str) -> Path:
    return home / PurePosixPath(url).name


def _whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    with (home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
