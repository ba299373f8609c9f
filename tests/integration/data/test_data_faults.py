"""Disk failures while a run reads; docs/data.md lists the reaction to each."""

import errno
import os

import pytest

from ijepa.data.loading.loader import Loader, LoaderConfig
from ijepa.data.open import open_dataset
from ijepa.data.sources import base as module
from ijepa.utils.errors import RunError
from tests.helpers.images import bare_batch, jpeg, write_shards, write_tree


def run(source, on_restart=print, **options) -> None:
    config = LoaderConfig(
        seed=0,
        image_size=(16, 16),
        crop_scale=(0.3, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        global_batch=4,
        micro_batch=4,
        **options,
    )
    list(Loader(source, config, bare_batch, on_restart=on_restart).iterate(0, 6))


def refused(source, message: str, workers: int = 0) -> None:
    with pytest.raises(RunError, match=message) as error:
        run(source, workers=workers)
    assert "\n" not in str(error.value) and "train-0001.tar" in str(error.value)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", [6, 6])


@pytest.mark.parametrize("workers", [0, 1])
def test_shard_disappears(shards, workers):
    source = open_dataset(shards)
    (shards / "train-0001.tar").unlink()
    refused(source, "No such file", workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_shard_shrinks(shards, workers):
    source = open_dataset(shards)
    file = shards / "train-0001.tar"
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size // 3)
    refused(source, "is shorter than when it was indexed", workers)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_shard_hangs(shards, monkeypatch):
    """A FIFO without a writer: opening it hangs in the worker, in its replacement, and when the name is read."""
    monkeypatch.setattr("ijepa.data.loading.loader._NAME_TIMEOUT", 0.2)
    source = open_dataset(shards)
    (shards / "train-0001.tar").unlink()
    os.mkfifo(shards / "train-0001.tar")
    told: list[str] = []
    message = r"not answered for 1 seconds while making micro-batch \d, at sample \d+ in train-0001.tar, for the second"
    with pytest.raises(RunError, match=message) as error:
        run(source, workers=1, timeout=1.0, on_restart=told.append)
    assert "\n" not in str(error.value)
    assert len(told) == 1 and "in train-0001.tar; a new process replaces it" in told[0]


def test_disk_returns_errors(shards, monkeypatch):
    source = open_dataset(shards)
    number = (shards / "train-0001.tar").stat().st_ino
    pread = os.pread

    def failing(descriptor, size, offset):
        if os.fstat(descriptor).st_ino == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(module.os, "pread", failing)
    refused(source, "Input/output error")


def test_transient_error_in_a_shard_is_retried(shards, monkeypatch):
    source = open_dataset(shards)
    pread, failed = os.pread, []

    def once(descriptor, size, offset):
        if not failed:
            failed.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(module.os, "pread", once)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    run(source)
    assert failed


def test_transient_error_in_a_folder_is_retried(tmp_path, monkeypatch):
    source = open_dataset(write_tree(tmp_path / "tree", {f"a/{n}.jpg": jpeg(n) for n in range(4)}))
    read, failures = module.os.read, [errno.ESTALE]

    def failing(descriptor, size):
        if failures:
            raise OSError(failures.pop(), "passing")
        return read(descriptor, size)

    monkeypatch.setattr(module.os, "read", failing)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    assert source.image(2) == jpeg(2) and not failures
    failures += [errno.EIO, errno.EIO]
    with pytest.raises(RunError, match="2.jpg: passing"):
        source.image(2)
    failures.append(errno.EACCES)  # not transient
    with pytest.raises(RunError):
        source.image(2)


def test_read_file_in_pieces(tmp_path, monkeypatch):
    """As the system returns files above two gigabytes."""
    read = module.os.read
    (tmp_path / "file").write_bytes(bytes(range(256)) * 40)
    monkeypatch.setattr(module.os, "read", lambda descriptor, size: read(descriptor, min(size, 1000)))
    assert module.read_file(tmp_path / "file") == bytes(range(256)) * 40


def test_more_shards_than_open_files(tmp_path):
    import resource
    import subprocess
    import sys

    shards = write_shards(tmp_path / "many", [1] * 60)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from ijepa.data.open import open_dataset
source = open_dataset({str(shards)!r})
assert sum(len(source.image(i)) for i in (*range(60), *range(60))) > 0
"""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 48
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise")
def test_readahead_of_a_whole_micro_batch(shards, monkeypatch):
    source = open_dataset(shards)
    asked, read = [], []
    pread = os.pread
    monkeypatch.setattr(module.os, "posix_fadvise", lambda fd, offset, size, advice: asked.append((offset, size)))

    def reading(descriptor, size, offset):
        read.append((offset, size, len(asked)))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(module.os, "pread", reading)
    run(source)
    assert len(asked) == 24 and {part[:2] for part in read} == set(asked)
    assert [seen for *_, seen in read[:4]] == [4] * 4  # hints for a whole micro-batch, then the reads
    monkeypatch.setattr(module.os, "posix_fadvise", lambda *words: (_ for _ in ()).throw(OSError(22, "no")))
    run(source)  # a refused hint changes nothing
