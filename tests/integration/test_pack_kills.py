"""`ijepa data pack` after kills and full disks: it resumes and writes the same bytes."""

import errno
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ijepa.data.open import open_dataset
from ijepa.prepare import pack_state
from ijepa.prepare.pack import Settings, pack
from ijepa.utils.errors import RunError
from tests.helpers.waiting import wait_until
from tests.unit.prepare.test_pack import content, nested, run, tree

LIMITED = """
import resource, sys
from ijepa.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "ijepa", "data", "pack", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in Linux's /proc")
def test_killed_pack_ends_its_processes_and_resumes_at_once(tmp_path):
    root = tree(tmp_path / "tree")
    run("folder", root, tmp_path / "whole", "--shard-size", 1)
    words = ("folder", root, tmp_path / "out", "--shard-size", 1, "--processes", 2)
    first = start(*words)
    wait_until(lambda: any((tmp_path / "out").glob("*.tar")), lambda: first.poll() is None)
    workers = children(first)
    first.kill()
    first.wait()
    (tmp_path / "out/.train-0029.tar.1.part").write_bytes(b"left")
    again = start(*words)
    wait_until(lambda: not any(map(alive, workers)))
    assert len(workers) >= 2 and again.wait() == 0, again.stderr.read()
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_pack_after_kills_at_random_times_has_the_same_bytes(tmp_path):
    plain = nested(tmp_path / "plain.tar", each=20, folder="winter21_whole/")
    archive = tmp_path / "winter21_whole.tar.gz"
    archive.write_bytes(gzip.compress(plain.read_bytes()))
    options = ("--shard-size", 2, "--hold-out", 2)
    begun = time.monotonic()
    whole = start("imagenet22k", archive, tmp_path / "whole", *options, "--processes", 2)
    assert whole.wait() == 0, whole.stderr.read()
    took = time.monotonic() - begun
    words = ("imagenet22k", archive, tmp_path / "out", *options, "--processes", 2)
    for moment in np.random.default_rng(5).uniform(0.2, 0.95, size=5):
        killed = start(*words)
        try:
            code = killed.wait(moment * took)
        except subprocess.TimeoutExpired:
            killed.send_signal(signal.SIGKILL)
            code = killed.wait()
        whole_now = (tmp_path / "out/manifest.json").is_file() and not (tmp_path / "out" / pack_state.WORK).exists()
        assert code in (0, -signal.SIGKILL) and (code != 0 or whole_now), killed.stderr.read()
        if whole_now:
            break
    else:
        last = start(*words)
        assert last.wait() == 0, last.stderr.read()
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("compressed", "processes", "file"),
    [
        (True, 1, "archives/whole-"),
        (False, 1, "train-0000.tar"),
        pytest.param(False, 2, "train-000", marks=pytest.mark.slow),
    ],
)
def test_pack_on_a_full_disk_fails_with_one_line_and_resumes(tmp_path, compressed, processes, file):
    """While an archive is expanded, in a shard, and in a process of several."""
    archive = plain = nested(tmp_path / "plain.tar", each=6)
    if compressed:
        archive = tmp_path / "whole.tar.gz"
        archive.write_bytes(gzip.compress(plain.read_bytes()))
    words = ["imagenet22k", archive, tmp_path / "out", "--shard-size", 6, "--processes", processes]
    command = [sys.executable, "-c", LIMITED, "9000", "data", "pack", *map(str, words)]
    full = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in full.stderr.splitlines() if line.startswith("ijepa:")]
    assert full.returncode == 1 and len(lines) == 1 and "Traceback" not in full.stderr, full.stderr
    assert f"{tmp_path}/out/" in lines[0] and file in lines[0] and "File too large" in lines[0]
    assert not list((tmp_path / "out").rglob("*.part"))
    run(*words)
    words[2] = tmp_path / "whole"
    run(*words)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_pack_on_a_full_disk_at_each_write(tmp_path, monkeypatch, write):
    root = tree(tmp_path / "tree")
    fsync, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == write:  # the plan, a shard, its record, a shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    source = {"train": open_dataset(root)}
    monkeypatch.setattr(os, "fsync", full)
    name = ["plan.json", "train-0000.tar:", "train-0000.tar.json", "train-0001.tar:"][write - 1]
    with pytest.raises(RunError, match=f"{name}.*No space left"):
        pack(source, tmp_path / "out", Settings(shard_size=10))
    monkeypatch.undo()
    pack(source, tmp_path / "out", Settings(shard_size=10))
    pack(source, tmp_path / "whole", Settings(shard_size=10))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
