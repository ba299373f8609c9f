"""Standard output that ends before the run: the run saves its state, reports it on standard error, and ends."""

import errno
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa.training.loop import Callback, pretrain
from ijepa.utils.errors import RunError
from ijepa.utils.output import Output, OutputLost
from tests.helpers.ranks import environment, free_port
from tests.helpers.runs import bytes_of, recipe, source
from tests.integration.test_distributed import last, rows
from tests.unit.utils.test_lock import ENVIRONMENT, command

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


class Failing(io.StringIO):
    """Takes some writes and then fails."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.writes = writes

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("raises", [False, True])
def test_output_drops_everything_after_a_failed_write(raises):
    stream = Failing(2)
    output = Output(stream, raises=raises)
    print("one", file=output)
    with pytest.raises(OutputLost) if raises else pytest.MonkeyPatch.context():
        print("two", file=output)
    stream.writes = 9
    print("three", file=output, flush=True)
    assert output.lost == errno.ENOSPC and stream.getvalue() == "one\n"
    with pytest.raises(OutputLost, match="No space left"):
        output.finish()
    assert isinstance(OutputLost(errno.EPIPE), RunError)


def test_run_whose_output_ends_saves_and_resumes_to_the_same_bits(scenes, whole, tmp_path, monkeypatch):
    """No step is lost, though the next checkpoint would have come much later."""
    chosen = recipe(scenes, checkpoint__every=100, log_every=1)
    with monkeypatch.context() as patched, pytest.raises(RunError) as caught:
        patched.setattr(sys, "stdout", Failing(9))
        pretrain(chosen, source(scenes), tmp_path / "run")
    step = len(rows(tmp_path / "run"))
    assert last(tmp_path / "run").name == f"step-{step:08d}" and 1 <= step < 8
    assert caught.value.exit_code == 1 and str(caught.value) == (
        f"standard output cannot be written (No space left on device): stopped after step {step}, state saved; "
        "the same command resumes"
    )
    pretrain(chosen, source(scenes), tmp_path / "run", quiet=True)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_run_with_closed_standard_output(scenes, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        pretrain(recipe(scenes, steps=3), source(scenes), tmp_path / "run", callbacks=[Callback(3, lambda model: {})])
    assert len(rows(tmp_path / "run")) == 3


def stopped(run: Path, code: int, said: str, reason: str) -> None:
    step = int(last(run).name[-8:])
    assert step == len(rows(run)) < 3000
    line = f"ijepa: standard output cannot be written ({reason}): stopped after step {step}, state saved; "
    assert (code, said) == (1, f"{line}the same command resumes\n")


LONG = {"steps": 3000, "checkpoint__every": 100_000, "log_every": 1}


@pytest.mark.slow
@needs_full
def test_run_with_output_on_a_full_disk(scenes, tmp_path):
    with FULL.open("w") as full:
        done = subprocess.run(
            command(scenes, tmp_path / "run", **LONG), env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    stopped(tmp_path / "run", done.returncode, done.stderr, "No space left on device")


@pytest.mark.slow
def test_run_with_a_pipe_whose_reader_ends(scenes, tmp_path):
    process = subprocess.Popen(
        command(scenes, tmp_path / "run", **LONG),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    try:
        while not process.stdout.readline().startswith("step 5/"):
            assert process.poll() is None
        process.stdout.close()
        said = process.stderr.read()
        stopped(tmp_path / "run", process.wait(), said, "Broken pipe")
    finally:
        process.kill()


@pytest.mark.slow
def test_run_whose_both_streams_end(scenes, tmp_path):
    """As with `2>&1 | tee` when tee is killed: nothing can be reported, but the state is saved."""
    process = subprocess.Popen(
        command(scenes, tmp_path / "run", **LONG),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    try:
        while not process.stdout.readline().startswith("step 5/"):
            assert process.poll() is None
        process.stdout.close()
        assert process.wait() == 1
    finally:
        process.kill()
    assert int(last(tmp_path / "run").name[-8:]) == len(rows(tmp_path / "run")) < 3000


@pytest.mark.slow
def test_run_whose_terminal_with_a_progress_bar_ends(scenes, tmp_path):
    """A separate thread draws the bar."""
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        command(scenes, tmp_path / "run", **LONG),
        env=ENVIRONMENT,
        stdout=its_end,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    os.close(its_end)
    try:
        seen = b""
        while b"step " not in seen:
            seen += os.read(terminal, 4096)
        os.close(terminal)
        said = process.communicate()[1]
    finally:
        process.kill()
    stopped(tmp_path / "run", process.returncode, said, "Input/output error")


@pytest.mark.slow
@pytest.mark.distributed
def test_rank_that_loses_its_output_stops_all_ranks_after_the_same_step(scenes, tmp_path):
    """Rank 1 reports an unreadable image, and its output cannot be written."""
    images, run, port = tmp_path / "images", tmp_path / "run", free_port()
    images.mkdir()
    for index in range(40):
        image = source(scenes)[index].image
        (images / f"{index:03d}.jpg").write_bytes(image[:99] if index % 2 else image)
    line = command(images, run, **LONG, data__replaced_limit=1.0)
    ranks = []
    for rank in range(2):
        reader, writer = os.pipe()
        if rank == 1:
            os.close(reader)
        out = writer if rank == 1 else subprocess.DEVNULL
        ranks.append(
            subprocess.Popen(line, env=environment(rank, 2, port), stdout=out, stderr=subprocess.PIPE, text=True)
        )
        os.close(writer)
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1]
    stopped(run, 1, "".join(said), "Broken pipe")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@needs_full
def test_command_whose_output_is_lost_reports_one_line(unbuffered):
    line = [sys.executable, "-m", "ijepa", "pretrain", "--help"]
    with FULL.open("w") as full:
        done = subprocess.run(
            line, env={**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "ijepa: standard output cannot be written: No space left on device\n"


def test_command_whose_reader_has_ended_reports_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ijepa", "--help"], env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "ijepa: standard output cannot be written: Broken pipe\n")
