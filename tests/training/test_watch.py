"""A rank that is lost or stuck is named, and the others end: also where nothing that a device holds comes back."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.ranks import environment, free_port
from tests.training.test_distributed import command
from tests.waiting import LIMIT, count_lines, wait_until

WAITS = """
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from threading import Event
import torch.distributed as dist
from ijepa.training import watch
from ijepa.training.world import World

class Device:
    def close(self):
        Event().wait()  # a flush behind a collective that never finishes

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, timeout=timedelta(seconds=10))
watch._PULSE, watch._PATIENCE = 0.1, 2.0
with closing(Device()), (seen := watch.Watch(World(size=2), 0.3, Path("none"))).naming():
    seen.at(7, "computing")
    BODY
"""


def test_blame_names_the_silent_then_those_behind():
    from ijepa.training.watch import Sign, blame

    at = [Sign(0, 7, "computing", 9), Sign(1, 7, "loading data", 9), Sign(2, 7, "computing", 9)]
    assert blame([(sign, True) for sign in at]) == "rank 1, which is alive at step 7, loading data"
    assert blame([(sign, sign.rank != 2) for sign in at]).startswith("rank 2, which gives no sign")
    late = [Sign(0, 7, "computing", 9), Sign(1, 6, "computing", 9)]
    assert blame([(sign, True) for sign in late]) == "rank 1, which is alive at step 6, computing"
    assert "all of them at step 7" in blame([(at[0], True), (at[2], True)])


SILENT = "rank 1, which gives no sign (last seen at step 0, starting)"
TOLD = "  RuntimeError: [gloo] Timed out waiting 300ms for recv\n"
UNKNOWN = "other ranks, of which the launcher's store knows nothing any more"


@pytest.mark.parametrize(
    ("body", "waits_for", "cause"),
    [
        ("Event().wait()", SILENT, ""),
        (r"raise RuntimeError('[gloo] Timed out waiting 300ms for recv\nand where')", SILENT, TOLD),
        ("del store; Event().wait()", UNKNOWN, ""),
    ],
    ids=["stuck", "told", "without a store"],
)
def test_what_waits_for_a_device_is_never_asked_again(body, waits_for, cause):
    """Stuck in a step, or told by gloo while the device is stuck: one line, and the end before anything is closed.

    What gloo has told comes after that line.
    """
    port = free_port()
    script = [sys.executable, "-c", WAITS.replace("BODY", body), str(port)]
    done = subprocess.run(script, env=environment(0, 2, port), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("ijepa: ")]  # torch speaks of its store too
    assert lines == [f"ijepa: step 7 waits for {waits_for}; there is no checkpoint yet"]
    assert done.stderr.partition(lines[0])[2].startswith(f"\n{cause}") and "and where" not in done.stderr


def test_of_nccl_the_cause_is_told_and_not_only_its_code():
    from ijepa.training.watch import _cause

    said = "NCCL error in: utils.cpp:77, unhandled cuda error\nncclUnhandledCudaError: Call failed.\nLast error:\n"
    assert _cause(RuntimeError(said)) == "RuntimeError: NCCL error in: utils.cpp:77, unhandled cuda error"
    assert _cause(RuntimeError(f"{said}Cuda failure 2 'out of memory'\n")).endswith(
        "77, unhandled cuda error (Cuda failure 2 'out of memory')"
    )
    assert _cause(RuntimeError()) == "RuntimeError: "


def test_a_defect_in_a_loader_is_no_lost_rank(monkeypatch):
    """Its text holds a traceback, through multiprocessing/connection.py, for example."""
    from ijepa.data.workers import LoaderDefect
    from ijepa.training.watch import Watch
    from ijepa.training.world import World

    def leave(self, error):
        raise AssertionError("left")

    monkeypatch.setattr(Watch, "leave", leave)
    seen = Watch(World(), 1.0, Path("none"))
    seen._store = object()
    with pytest.raises(LoaderDefect), seen.naming():
        raise LoaderDefect('in a loader process:\n File "multiprocessing/connection.py", line 5, in _send')
    with pytest.raises(AssertionError, match="left"), seen.naming():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_frozen_rank_is_named_with_its_step_and_ends_the_run(scenes, tmp_path):
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
    assert re.match(r"ijepa: step \d+ waits for rank 1, which gives no sign \(last seen at step \d+, \w", line), line
    assert "the same command resumes from step-0" in line
