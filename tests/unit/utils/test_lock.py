"""One process locks a run folder; a second one fails, and a killed one does not hold the lock."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ijepa.checkpoint.run_dir import Run, claim
from ijepa.training.loop import pretrain
from ijepa.utils.errors import UserError
from ijepa.utils.lock import exclusive
from tests.helpers.ranks import environment, spawn
from tests.helpers.runs import bytes_of, recipe, source
from tests.integration.test_distributed import one_line

ENVIRONMENT = {key: value for key, value in environment(0, 1, 0).items() if key not in ("RANK", "WORLD_SIZE")}


def command(scenes: Path, run: Path, **changes) -> list[str]:
    file = run.parent / f"{run.name}.yaml"
    file.write_text(recipe(scenes, **changes).dump())
    return [sys.executable, "-m", "ijepa", "pretrain", str(file), "--output", str(run)]


def started(line: list[str], run: Path, rows: int) -> subprocess.Popen[bytes]:
    """Start a command and return it once its log has some rows."""
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < rows:
        assert process.poll() is None
        time.sleep(0.01)
    return process


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.slow
def test_second_start_fails_and_does_not_disturb_the_first(scenes, tmp_path):
    changes = {"steps": 150, "checkpoint__every": 7}
    line = command(scenes, tmp_path / "run", **changes)
    first = started(line, tmp_path / "run", 20)
    try:
        first.send_signal(signal.SIGSTOP)
        (half := tmp_path / "run/checkpoints/.step-00000150.partial").mkdir(parents=True)
        before = contents(tmp_path / "run")
        second = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
        assert contents(tmp_path / "run") == before and half.exists()
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    finally:
        first.kill()
    assert second.returncode == 2 and second.stderr == (
        f"ijepa: {tmp_path / 'run'}: is being written by process {first.pid} on host {socket.gethostname()}; "
        "wait until it ends, or choose a different --output\n"
    )
    subprocess.run(command(scenes, tmp_path / "alone", **changes), env=ENVIRONMENT, check=True)
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "alone")
    assert contents(tmp_path / "run").keys() == contents(tmp_path / "alone").keys()


def family(pid: int) -> Iterator[int]:
    """Return the process ids of all child processes, on Linux."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from family(child)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds loader processes in /proc")
def test_processes_of_a_killed_run_do_not_hold_the_lock(scenes, tmp_path):
    """Its loader processes are stopped here, so that they cannot notice the end of the run and end too."""
    run = tmp_path / "run"
    first = started(command(scenes, run, steps=3000, data__workers=2), run, 2)
    left = list(family(first.pid))
    try:
        for pid in left:
            os.kill(pid, signal.SIGSTOP)
        first.kill()
        first.wait()
        assert len(left) >= 3 and Run(run).lock_file.exists()
        with claim(run):
            assert json.loads(Run(run).lock_file.read_text())["pid"] == os.getpid()
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not Run(run).lock_file.exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_fail_with_one_line(scenes, tmp_path):
    line = command(scenes, tmp_path / "run")
    with claim(tmp_path / "run"):
        found = one_line(spawn(2, line))
    assert re.fullmatch(rf"ijepa: \S+: is being written by process {os.getpid()} on host \S+; wait until .*", found)
    assert not (tmp_path / "run").exists()


def test_interrupted_start_with_a_lock_file_starts_again(scenes, tmp_path):
    (tmp_path / "run").mkdir()
    Run(tmp_path / "run").lock_file.write_text('{"host": "gone", "pid": 1}\n')
    (tmp_path / "run/run.json").write_text("{}")
    pretrain(recipe(scenes, steps=3), source(scenes), tmp_path / "run", resume="never", quiet=True)
    assert Run(tmp_path / "run").recipe() == recipe(scenes, steps=3)
    assert not list((tmp_path / "run").glob(".*"))


def test_failed_start_leaves_no_folder_and_no_lock(scenes, whole, tmp_path):
    names = sorted(path.name for path in whole.iterdir())
    with pytest.raises(UserError, match="seed"):
        pretrain(recipe(scenes, seed=9), source(scenes), whole, quiet=True)
    assert sorted(path.name for path in whole.iterdir()) == names
    with pytest.raises(ValueError), claim(tmp_path / "new/run"):
        raise ValueError
    assert not (tmp_path / "new").exists()


def test_claim_does_not_touch_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="empty"), claim(tmp_path):
        pass
    assert contents(tmp_path) == before


def test_exclusive_after_the_owner_removed_the_file(tmp_path, monkeypatch):
    """The second has opened the file when the first removes it: it must lock the new file and not the removed one."""
    import fcntl

    file, removed = tmp_path / "lock", []

    def flock(stream, how):
        if not removed:
            removed.append(file.unlink())
        real(stream, how)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(file, tmp_path, "is busy", "wait"):
        line = f"process {os.getpid()}"
        with pytest.raises(UserError, match=line), exclusive(file, tmp_path, "is busy", "wait"):
            pass
        assert file.exists()
    with exclusive(file, tmp_path, "is busy", "wait"):
        pass


def test_claim_of_a_folder_that_cannot_be_created_or_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"), claim(tmp_path / "file/run"):
        pass
    Run(tmp_path / "run").lock_file.mkdir(parents=True)
    with pytest.raises(UserError, match="Is a directory"), claim(tmp_path / "run"):
        pass
