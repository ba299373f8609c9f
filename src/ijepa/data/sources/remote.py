"""Shards on other machines, downloaded once to a local folder: `https://...`, `s3://...`, every protocol of fsspec.

A run reads all images of every epoch in random order, so it needs fast access. Shards are downloaded as whole files,
several at a time, each to a temporary file that is then renamed. The size and version (ETag or time) that the server
reports are stored next to the copy, so that the next start uses the copy only if the original is still the same. A
lock lets one process of a machine download while the others wait.

fsspec's own `filecache` does not give these guarantees (measured with fsspec 2026.9 and an HTTP server): it does not
notice that the original has changed, because its key for HTTP is the URL alone; it does not retry; an interrupted
download leaves half a file under the final name; and with readable names, two folders' files overwrite each other.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ijepa.data.paths import expand_braces, select_split
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import atomic_file, write_text
from ijepa.utils.progress import Progress

_DOWNLOAD_THREADS, _INFO_THREADS = 8, 32
_ATTEMPTS = 3
_CHUNK = 2**22
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime")
"""Keys under which fsspec's file systems report what changes with a file, the most reliable first."""


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


@dataclass(frozen=True)
class RemoteFile:
    """A file on another machine; `version` changes when the file does."""

    url: str
    size: int
    version: str

    @classmethod
    def from_info(cls, url: str, info: dict[str, Any]) -> "RemoteFile":
        """Create it from fsspec's description of a file."""
        version = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
        return cls(url, int(info.get("size") or 0), f"{info.get('size')} {version}")

    @property
    def folder(self) -> str:
        """The URL of its folder."""
        return self.url.rpartition("/")[0]

    def local(self, cache: Path) -> Path:
        """Return the path of its copy. Each remote folder has its own local one, because names may repeat."""
        name = hashlib.blake2b(self.folder.encode(), digest_size=8).hexdigest()
        return cache / name / PurePosixPath(self.url).name

    def is_copied_to(self, path: Path) -> bool:
        """Whether a copy is complete and of this version."""
        version = _version_file(path)
        complete = path.is_file() and self.size in (0, path.stat().st_size)
        return complete and version.is_file() and version.read_text() == self.version


def find_remote(path: str, where: str, split: str | None) -> list[RemoteFile]:
    """Return the shards that a URL means: one file, a brace pattern, a glob, or one split of a folder.

    Raises:
        UserError: the extra `remote` is missing, there is no such file, or several splits and none chosen.
    """
    system = _file_system(path, where)
    system.invalidate_cache()  # this process may have listed the folder before
    is_folder = path.endswith("/") or not any(sign in path.rpartition("/")[2] for sign in ".*[{")
    if not is_folder and not any(sign in path for sign in "*["):
        return _describe_all(system, expand_braces(path), where)
    root = path.rstrip("/")
    try:
        found = system.glob(f"{root}/*.tar" if is_folder else path, detail=True)
    except Exception as error:  # each file system has its own errors
        raise UserError(where, f"{path} cannot be listed: {_one_line(error)}") from None
    if not found:
        raise UserError(where, f"{path} matches nothing", "give a brace pattern such as URL/train-{0000..0127}.tar")
    infos = {system.unstrip_protocol(name): info for name, info in sorted(found.items())}
    urls = list(infos)
    if is_folder:  # a glob's folders may hold shards of the same name, so only a single folder has splits
        named = {PurePosixPath(url).name: url for url in urls}
        urls = [named[name] for name in select_split(root, list(named), where, split, "*.tar")]
    if all(infos[url].get("size") is not None for url in urls):  # object stores list sizes and ETags
        return [RemoteFile.from_info(url, infos[url]) for url in urls]
    return _describe_all(system, urls, where)


def download(shards: list[RemoteFile], where: str, cache: Path, progress: Progress = _print_to_stderr) -> list[Path]:
    """Return local copies of shards, and download those that are missing or outdated.

    A `classes.txt` next to the first shard is downloaded too. All paths begin with the local folder of the first shard;
    those in other folders continue with `..`.

    Raises:
        UserError: not enough free space.
        RunError: a download failed several times.
    """
    system = _file_system(shards[0].url, where)
    classes = _describe(system, f"{shards[0].folder}/classes.txt", where)
    local = {file.local(cache): file for file in (shards if classes is None else [*shards, classes])}
    home = shards[0].local(cache).parent
    with ExitStack() as locks:
        for folder in sorted({path.parent for path in local}):  # in the same order everywhere, so that none deadlock
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(locks.enter_context((folder / ".lock").open("w")), fcntl.LOCK_EX)
        if classes is None:
            (home / "classes.txt").unlink(missing_ok=True)
        missing = {path: file for path, file in local.items() if not file.is_copied_to(path)}
        need, free = sum(file.size for file in missing.values()), shutil.disk_usage(home).free
        if need > free:
            problem = f"the download needs {need / 1e9:.1f} GB, and {home} has {free / 1e9:.1f} GB of free space"
            raise UserError(where, problem, "set IJEPA_CACHE to a folder with more space")
        done = 0
        with ThreadPoolExecutor(_DOWNLOAD_THREADS) as pool:
            for file in pool.map(partial(_download_one, system), missing.values(), missing):
                done += file.size
                progress(f"fetched {PurePosixPath(file.url).name}, {done / 1e9:.2f} of {need / 1e9:.2f} GB")
    return [home / os.path.relpath(file.local(cache), home) for file in shards]


def _describe_all(system: Any, urls: list[str], where: str) -> list[RemoteFile]:
    with ThreadPoolExecutor(min(_INFO_THREADS, len(urls))) as pool:
        answers = list(pool.map(lambda url: _describe(system, url, where), urls))
    missing = [url for url, file in zip(urls, answers, strict=True) if file is None]
    if missing:
        hint = f"{len(missing)} of {len(urls)} files are missing"
        raise UserError(where, f"{missing[0]} does not exist or cannot be read", hint)
    return [file for file in answers if file is not None]


def _describe(system: Any, url: str, where: str) -> RemoteFile | None:
    """Return what the server reports about a file, None if the file does not exist or may not be read.

    Raises:
        UserError: the server cannot be asked.
    """
    try:
        return RemoteFile.from_info(url, system.info(url))
    except Exception as error:  # each file system has its own errors
        # S3 answers "forbidden" for a missing file. For HTTP, fsspec raises "not found" after any failure, and the
        # cause of the exception is the real one.
        absent = isinstance(error, FileNotFoundError | PermissionError)
        cause = error.__cause__ or error
        if absent and (cause is error or getattr(cause, "status", 0) in (401, 403, 404, 410)):
            return None
        raise UserError(where, f"{url} cannot be read: {_one_line(cause)}") from None


def _file_system(url: str, where: str) -> Any:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)[0]
    except ImportError as error:
        raise UserError(where, f"{url} needs {error.name}", "pip install 'ijepa-pretrain[remote]'") from None
    except ValueError as error:
        raise UserError(where, f"{url}: {_one_line(error)}") from None


def _download_one(system: Any, file: RemoteFile, local: Path) -> RemoteFile:
    """Download one file, and then store its version."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with system.open(file.url, "rb") as source, atomic_file(local) as out:
                shutil.copyfileobj(source, out, _CHUNK)
                if file.size not in (0, out.tell()):
                    raise OSError(f"received {out.tell()} of {file.size} bytes")
            write_text(_version_file(local), file.version)
            return file
        except Exception as error:  # each file system has its own errors
            if attempt == _ATTEMPTS:
                raise RunError(f"{file.url}: cannot be fetched: {_one_line(error)}") from None
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _version_file(local: Path) -> Path:
    return local.with_name(f"{local.name}.version")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
