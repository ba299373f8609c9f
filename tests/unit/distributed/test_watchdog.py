"""A rank that is lost or stuck is named, and the others end, also if their device hangs."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import environment, free_port, spawn
from tests.helpers.waiting import LIMIT, count_lines, wait_until
from tests.integration.test_distributed import command, last, recipe, rows

WAITS = """
import sys
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from threading import Event
import torch.distributed as dist
from ijepa.distributed.watchdog import Watchdog
from ijepa.distributed.process_group import World

class Device:
    def close(self):
        Event().wait()  # a flush behind a collective that never finishes

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, timeout=timedelta(seconds=10))
watchdog = Watchdog(World(size=2), 0.3, lambda: None, interval=0.1, store_timeout=2.0)
with closing(Device()), watchdog.leave_on_collective_error():
    watchdog.report(7, "computing")
    BODY
"""


def test_describe_stall_names_silent_ranks_then_those_behind():
    from ijepa.distributed.watchdog import Heartbeat, describe_stall

    at = [Heartbeat(0, 7, "computing", 9), Heartbeat(1, 7, "loading data", 9), Heartbeat(2, 7, "computing", 9)]
    assert describe_stall([(sign, True) for sign in at]) == "rank 1, which is alive (at step 7, loading data)"
    assert describe_stall([(sign, sign.rank != 2) for sign in at]).startswith("rank 2, which does not respond")
    late = [Heartbeat(0, 7, "computing", 9), Heartbeat(1, 6, "computing", 9)]
    assert describe_stall([(sign, True) for sign in late]) == "rank 1, which is alive (at step 6, computing)"
    assert "all ranks are alive" in describe_stall([(at[0], True), (at[2], True)])


SILENT = "rank 1, which does not respond (last seen at step 0, starting)"
CAUSE = "  RuntimeError: [gloo] Timed out waiting 300ms for recv\n"
UNKNOWN = "other ranks, about which the launcher's store has no information"


@pytest.mark.parametrize(
    ("body", "waits_for", "cause"),
    [
        ("Event().wait()", SILENT, ""),
        (r"raise RuntimeError('[gloo] Timed out waiting 300ms for recv\nand where')", SILENT, CAUSE),
        ("del store; Event().wait()", UNKNOWN, ""),
    ],
    ids=["stuck", "error of gloo", "without a store"],
)
def test_watchdog_exits_while_the_device_hangs(body, waits_for, cause):
    """After a timeout or an error of gloo, the process prints one line and ends before anything is closed.

    The error of gloo comes after that line.
    """
    port = free_port()
    script = [sys.executable, "-c", WAITS.replace("BODY", body), str(port)]
    done = subprocess.run(script, env=environment(0, 2, port), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    # torch prints lines about its store too
    lines = [line for line in done.stderr.splitlines() if line.startswith("ijepa: ")]
    assert lines == [f"ijepa: step 7 waits for {waits_for}; there is no checkpoint yet"]
    assert done.stderr.partition(lines[0])[2].startswith(f"\n{cause}") and "and where" not in done.stderr


def test_summarize_contains_the_last_error_of_nccl():
    from ijepa.distributed.watchdog import summarize

    said = "NCCL error in: utils.cpp:77, unhandled cuda error\nncclUnhandledCudaError: Call failed.\nLast error:\n"
    assert summarize(RuntimeError(said)) == "RuntimeError: NCCL error in: utils.cpp:77, unhandled cuda error"
    assert summarize(RuntimeError(f"{said}Cuda failure 2 'out of memory'\n")).endswith(
        "77, unhandled cuda error (Cuda failure 2 'out of memory')"
    )
    assert summarize(RuntimeError()) == "RuntimeError: "


def test_is_collective_error_is_false_for_a_defect_in_a_loader():
    """Its text contains a traceback, for example with multiprocessing/connection.py."""
    from ijepa.data.loading.workers import LoaderDefect
    from ijepa.distributed.watchdog import is_collective_error

    defect = 'in a loader process:\n File "multiprocessing/connection.py", line 5, in _send'
    assert not is_collective_error(LoaderDefect(defect))
    assert is_collective_error(RuntimeError("Connection closed by peer [127.0.0.1]:4711"))
    assert not is_collective_error(RuntimeError("shape mismatch"))


@pytest.mark.slow
@pytest.mark.distributed
def test_watchdog_names_a_frozen_rank(scenes, tmp_path):
    out, port = tmp_path / "run", free_port()
    whole = command(scenes, out, "--parallel.timeout", "5")
    ranks = [
        subprocess.Popen(
            whole, env=environment(rank, 2, port), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for rank in range(2)
    ]
    try:
        wait_until(lambda: count_lines(out / "metrics.jsonl") >= 12, lambda: ranks[0].poll() is None)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        _, said = ranks[0].communicate(timeout=LIMIT)
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = [line for line in said.splitlines() if line.startswith("ijepa: ")]
    assert ranks[0].returncode == 1
    assert re.match(r"ijepa: step \d+ waits for rank 1, which does not respond \(last seen at step \d+, \w", line), line
    assert "the same command resumes from step-0" in line


SLOW = """
import json, os, sys, time
from pathlib import Path
from ijepa.data.open import open_dataset
from ijepa.config.recipe import Recipe
from ijepa.training.loop import Callback, pretrain
from ijepa.training.runtime import Numerics

mine = int(os.environ["RANK"])
recipe = Recipe.read(json.loads(sys.argv[1]), "test")
calls, numerics = [], Numerics()
BODY
source = open_dataset(recipe.data.path, split="train")
pretrain(recipe, source, Path(sys.argv[2]), callbacks=calls, quiet=True, numerics=numerics)
"""

MEASURE = """
def measure(model):
    time.sleep(14 if mine in {ranks} else 0)
    return dict(answer=1.0)
calls = [Callback(100, measure)]
"""

COMPILE = """
def backend(graph, inputs):
    backend.calls += 1
    time.sleep(14 if mine == 0 and backend.calls == 1 else 0)
    return graph

backend.calls = 0
numerics = Numerics(compile_backend=backend)
"""

HANG = """
def measure(model):
    if mine == 1:
        os.kill(os.getpid(), 19)  # SIGSTOP: the process exists and has no heartbeat
    return dict(answer=1.0)
calls = [Callback(100, measure)]
"""


def slow_ranks(scenes: Path, out: Path, body: str, **changes) -> list[tuple[int, str]]:
    values = recipe(scenes, steps=3, parallel={"timeout": 5}, **changes)
    return spawn(2, [sys.executable, "-c", SLOW.replace("BODY", body), json.dumps(values), str(out)])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "strategy"), [((0,), "zero2"), ((0,), "ddp"), ((0, 1), "zero2")])
def test_watchdog_allows_a_measurement_longer_than_the_timeout(scenes, tmp_path, ranks, strategy):
    found = slow_ranks(scenes, tmp_path / "run", MEASURE.replace("{ranks}", str(ranks)), strategy=strategy)
    assert [code for code, _ in found] == [0, 0], found
    assert len(rows(tmp_path / "run")) == 3 and len((tmp_path / "run/diagnostics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_watchdog_allows_a_compilation_longer_than_the_timeout(scenes, tmp_path):
    found = slow_ranks(scenes, tmp_path / "run", COMPILE, compile=True)
    assert [code for code, _ in found] == [0, 0], found
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.distributed
def test_watchdog_names_a_rank_that_freezes_while_it_measures(scenes, tmp_path):
    values = recipe(scenes, steps=3, parallel={"timeout": 5})
    script = [sys.executable, "-c", SLOW.replace("BODY", HANG), json.dumps(values), str(tmp_path / "run")]
    port = free_port()
    ranks = [
        subprocess.Popen(script, env=environment(rank, 2, port), stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        _, said = ranks[0].communicate(timeout=90)
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = [line for line in said.splitlines() if line.startswith("ijepa: ")]
    assert ranks[0].returncode == 1
    assert "waits for rank 1, which does not respond (last seen at step 0, " in line


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_save_and_end_when_torchrun_is_killed(scenes, tmp_path, size):
    out = tmp_path / "run"
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--standalone"]
    launcher = subprocess.Popen(
        [*launched, "-m", *command(scenes, out, "--checkpoint.every", "100000")[2:]],
        env={**os.environ, "PYTHONPATH": environment(0, size, 0)["PYTHONPATH"], "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "said").open("w"),
    )
    ranks = []
    try:
        wait_until(lambda: count_lines(out / "metrics.jsonl") >= 12, lambda: launcher.poll() is None)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = [int(child) for child in children]
        launcher.kill()
        launcher.wait()
        assert len(ranks) == size
        wait_until(lambda: not any(alive(pid) for pid in ranks))
    finally:
        launcher.kill()
        for pid in filter(alive, ranks):
            os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    step = int(last(out).name[-8:])
    assert len(rows(out)) == step >= 12
    line = f"ijepa: torchrun has ended: stopped after step {step}, state saved; the same command resumes"
    assert [line for line in said.splitlines() if line.startswith("ijepa: ")] == [line]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
