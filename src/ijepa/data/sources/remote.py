"""Shards on other machines, fetched once into a local folder: `https://...`, `s3://...`, whatever fsspec opens.

A run reads every image of every epoch in a random order, so what it reads from must be near: shards are fetched whole,
several at a time, each written beside its place and renamed. What the server says of a file (size, and ETag or time) is
kept beside its copy, so that at the next start a copy is used if, and only if, its original is the same. Several
processes of one machine fetch once: one does, the others wait at a lock.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ijepa.data import paths
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import write_text

_THREADS, _ASKERS = 8, 32
_ATTEMPTS = 3
_CHUNK = 2**22
_VERSIONS = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime")
"""Where fsspec's file systems keep what changes with a file, the surest first."""
Tell = Callable[[str], None]


def is_remote(path: str) -> bool:
    """Whether a path names another machine's files."""
    return "://" in path


@dataclass(frozen=True)
class Far:
    """A file on another machine; `version` is what the server tells it by from an earlier file of its name."""

    url: str
    size: int
    version: str

    @classmethod
    def of(cls, url: str, info: dict[str, Any]) -> "Far":
        """Read it from what fsspec knows of a file: each file system has a name of its own for it."""
        known = next((info[key] for key in _VERSIONS if info.get(key)), "")
        return cls(url, int(info.get("size") or 0), f"{info.get('size')} {known}")


def find(path: str, where: str, split: str | None) -> list[Far]:
    """Return the shards that a URL means: one, a brace pattern's, a glob's, or a folder's of one split.

    Raises:
        UserError: without the extra `remote`, nothing there, or several splits and none chosen.
    """
    system = _system(path, where)
    system.invalidate_cache()  # listings of earlier in this process
    folder = path.endswith("/") or not any(sign in path.rpartition("/")[2] for sign in ".*[{")
    if not folder and not any(sign in path for sign in "*["):
        return _ask(system, paths.expand_braces(path), where)
    root = path.rstrip("/")
    try:
        found = system.glob(f"{root}/*.tar" if folder else path, detail=True)
    except Exception as error:  # every file system has errors of its own
        raise UserError(where, f"{path} cannot be listed: {_line(error)}") from None
    if not found:
        raise UserError(where, f"{path} matches nothing", "give a brace pattern such as URL/train-{0000..0127}.tar")
    infos = {system.unstrip_protocol(name): info for name, info in sorted(found.items())}
    urls = list(infos)
    if folder:  # of one folder, where names differ; a glob's folders may hold shards of the same name
        named = {PurePosixPath(url).name: url for url in urls}
        urls = [named[name] for name in paths.choose(root, list(named), where, split, "*.tar")]
    if all(infos[url].get("size") is not None for url in urls):  # object stores list sizes and ETags
        return [Far.of(url, infos[url]) for url in urls]
    return _ask(system, urls, where)


def fetch(shards: list[Far], where: str, folder: Path, tell: Tell | None = None) -> list[Path]:
    """Return local copies of shards, in `folder`; fetch those that are not there, or not as they are far away.

    Each far folder has a local one. A `classes.txt` beside the first shard comes along; all paths begin with that
    shard's folder, so that those in others go on with `..`.

    Raises:
        UserError: too little room.
        RunError: fetching failed several times.
    """
    say = tell or (lambda line: print(line, file=sys.stderr, flush=True))
    system = _system(shards[0].url, where)
    classes = _info(system, f"{_parent(shards[0].url)}/classes.txt", where)
    local = {_local(folder, far.url): far for far in (shards if classes is None else [*shards, classes])}
    home = _local(folder, shards[0].url).parent
    with ExitStack() as alone:
        for each in sorted({path.parent for path in local}):  # in one order, so that no two wait for each other
            each.mkdir(parents=True, exist_ok=True)
            alone.enter_context(_alone(each))
        if classes is None:
            (home / "classes.txt").unlink(missing_ok=True)
        missing = {path: far for path, far in local.items() if not _same(path, far)}
        need, free = sum(far.size for far in missing.values()), shutil.disk_usage(home).free
        if need > free:
            raise UserError(
                where, f"{need / 1e9:.1f} GB are to be fetched, {home} has room for {free / 1e9:.1f}", "set IJEPA_CACHE"
            )
        done = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for far in pool.map(partial(_get, system), missing.values(), missing):
                done += far.size
                say(f"fetched {PurePosixPath(far.url).name}, {done / 1e9:.2f} of {need / 1e9:.2f} GB")
    return [home / os.path.relpath(_local(folder, far.url), home) for far in shards]


def _ask(system: Any, urls: list[str], where: str) -> list[Far]:
    """Return what the server says of files, many asked for at once.

    Raises:
        UserError: one is not there, or cannot be asked for.
    """
    with ThreadPoolExecutor(min(_ASKERS, len(urls))) as pool:
        answers = list(pool.map(lambda url: _info(system, url, where), urls))
    found = [far for far in answers if far is not None]
    if len(found) < len(urls):
        missing = [url for url, far in zip(urls, answers, strict=True) if far is None]
        raise UserError(
            where,
            f"{missing[0]} does not exist, or may not be read",
            f"{len(missing)} of {len(urls)} files are missing",
        )
    return found


def _info(system: Any, url: str, where: str) -> Far | None:
    """Return what the server says of a file, None where there is none that it would show."""
    try:
        return Far.of(url, system.info(url))
    except Exception as error:  # as above
        # S3 says that it may not tell of what is not there; over HTTP, fsspec says "not found" of every failure.
        absent = isinstance(error, FileNotFoundError | PermissionError)
        cause = error.__cause__ or error
        if absent and (cause is error or getattr(cause, "status", 0) in (401, 403, 404, 410)):
            return None
        raise UserError(where, f"{url} cannot be asked for: {_line(cause)}") from None


def _system(url: str, where: str) -> Any:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)[0]
    except ImportError as error:
        raise UserError(where, f"{url} needs {error.name}", "pip install 'ijepa-pretrain[remote]'") from None
    except ValueError as error:
        raise UserError(where, f"{url}: {_line(error)}") from None


def _get(system: Any, far: Far, local: Path) -> Far:
    """Fetch one file, and then what tells it from others."""
    beside = local.with_name(f".{local.name}.{os.getpid()}")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with system.open(far.url, "rb") as source, beside.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
                out.flush()
                os.fsync(out.fileno())
            if far.size not in (0, beside.stat().st_size):
                raise OSError(f"{beside.stat().st_size} of {far.size} bytes came")
            beside.replace(local)
            write_text(_version(local), far.version)
            return far
        except Exception as error:  # as above
            beside.unlink(missing_ok=True)
            if attempt == _ATTEMPTS:
                raise RunError(f"{far.url}: cannot be fetched: {_line(error)}") from None
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _parent(url: str) -> str:
    return url.rpartition("/")[0]


def _local(folder: Path, url: str) -> Path:
    """Return the place of a file's copy: a folder for each far one, so that names may come again in another."""
    return folder / hashlib.blake2b(_parent(url).encode(), digest_size=8).hexdigest() / PurePosixPath(url).name


def _version(local: Path) -> Path:
    return local.with_name(f"{local.name}.version")


def _same(local: Path, far: Far) -> bool:
    """Whether a copy is whole and of this version."""
    if not local.is_file() or far.size not in (0, local.stat().st_size):
        return False
    version = _version(local)
    return version.is_file() and version.read_text() == far.version


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    with (home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
