"""After crashes, kills and signals at any step, a resumed run is identical to an uninterrupted one."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from ijepa.checkpoint.format import list_checkpoints
from ijepa.training.interrupts import Interrupted
from ijepa.training.loop import Callback, pretrain
from tests.helpers.runs import Kill, bytes_of, recipe, source
from tests.helpers.waiting import LIMIT, count_lines, wait_until


@pytest.mark.parametrize("at", [1, 4, 7])
def test_resume_after_a_crash_is_identical(scenes, whole, tmp_path, at):
    def crash(model):
        crash.count += 1
        if crash.count == at + 1:  # the first call is before the first step
            raise Kill
        return {}

    crash.count = 0
    with pytest.raises(Kill):
        pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=[Callback(1, crash)], quiet=True)
    pretrain(recipe(scenes), source(scenes), tmp_path, quiet=True)
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_resume_removes_an_incomplete_line_of_metrics(scenes, whole, tmp_path):
    run = tmp_path / "run"
    pretrain(recipe(scenes), source(scenes), run, quiet=True)
    for late in list_checkpoints(run / "checkpoints")[1:]:
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-37])
    pretrain(recipe(scenes), source(scenes), run, quiet=True)
    assert bytes_of(run) == bytes_of(whole)


def command(scenes: Path, run: Path, *more: str) -> list[str]:
    file = run.parent / f"{run.name}.yaml"
    file.write_text(recipe(scenes, steps=400, checkpoint__every=5).dump())
    return [sys.executable, "-m", "ijepa", "pretrain", str(file), "--output", str(run), *more]


def go_on(scenes: Path, run: Path, workers: int) -> None:
    chosen = recipe(scenes, steps=27, checkpoint__every=9, log_every=1, data__workers=workers)
    with patch("os.fsync"):  # saves half of the time; SIGKILL loses no page of the kernel's cache
        pretrain(chosen, source(scenes), run, quiet=True)


@pytest.fixture(scope="module")
def never_killed(scenes, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "never-killed"
    go_on(scenes, run, 0)
    return run


@pytest.mark.parametrize(
    "workers", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)]
)
def test_resume_after_sigkill_is_identical(scenes, never_killed, tmp_path, workers):
    """The run is killed twice at random steps, and then runs to its end."""
    context = multiprocessing.get_context("forkserver")  # its processes need not import torch again
    context.set_forkserver_preload(["ijepa.training.loop"])
    run = tmp_path / "run"
    for steps in sorted(random.Random(workers).sample(range(1, 22), 2)):
        process = context.Process(target=go_on, args=(scenes, run, workers))
        process.start()
        wait_until(lambda: count_lines(run / "metrics.jsonl") >= steps, process.is_alive)  # noqa: B023 - used at once
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    go_on(scenes, run, workers)
    assert bytes_of(run) == bytes_of(never_killed)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signal_saves_and_exits_with_its_code(scenes, tmp_path, number, code):
    run = tmp_path / "run"
    process = subprocess.Popen(command(scenes, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: count_lines(run / "metrics.jsonl") >= 6, lambda: process.poll() is None)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert len(stderr.strip().splitlines()) == 1 and "state saved" in stderr
    last = list_checkpoints(run / "checkpoints")[-1]
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert f"after step {len(rows)}," in stderr and last.name == f"step-{len(rows):08d}"


def test_signal_raises_interrupted_after_the_next_step(scenes, tmp_path):
    def stop(model):
        stop.count += 1
        if stop.count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    stop.count = 0
    with pytest.raises(Interrupted) as caught:
        pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=[Callback(1, stop)], quiet=True)
    assert caught.value.exit_code == 143
    # The callback of step 2 comes after its end, so the run stops after step 3.
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
