import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ijepa.data.loading.workers import LoaderDefect, prefetch_batches, report_sample
from ijepa.masking.batch import Batch
from ijepa.utils.errors import RunError
from tests.helpers.images import bare_batch
from tests.helpers.paths import ROOT
from tests.helpers.waiting import LIMIT, wait_until

SHAPE = (2, 3, 4, 4)


def make(
    item: int, pixels: Tensor, *, trouble: dict[int, str] | None = None, delay: float = 0.0, folder: str | None = None
) -> Batch:
    """Return a batch that contains its item and process; or fail as `trouble` says."""
    time.sleep(delay)
    kind = (trouble or {}).get(item, "")
    if kind == "failed":
        raise RunError("the disk is gone")
    if kind == "defect":
        raise KeyError("a defect")
    if kind in ("dies", "dies once", "hangs", "hangs once"):
        report_sample(1000 + item)
        tried = None if folder is None else Path(folder) / str(item)
        if kind.endswith("once") and tried.exists():
            kind = ""
        elif tried is not None:
            tried.touch()
    if kind.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind.startswith("hangs"):
        time.sleep(60)
    pixels.fill_(item % 256)
    threads = torch.get_num_threads()
    return bare_batch(np.array([item, os.getpid()]), pixels, [item, threads], ["name of it"])


def produced(items: range, workers: int, prefetch: int = 2, **trouble: object) -> list[Batch]:
    return list(prefetch_batches(partial(make, **trouble), items, shape=SHAPE, workers=workers, prefetch=prefetch))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 3), (3, 1), (2, 4)])
def test_prefetch_batches_returns_complete_batches_in_order(workers, prefetch):
    batches = produced(range(5, 18), workers, prefetch)
    assert [batch.positions[0] for batch in batches] == list(range(5, 18))
    for batch in batches:
        item, process = batch.positions
        assert (batch.pixels == item).all() and batch.pixels.shape == SHAPE
        assert batch.context.index.tolist() == [item, process] and batch.context.lengths == (2,)
        assert batch.context.index.dtype == torch.int64 and batch.loss_weight.dtype == torch.float32
        assert batch.drop_path_rows[0] is None and batch.drop_path_rows[1].index.tolist() == [item, process]
        assert batch.replaced == ("name of it",)
        assert batch.indices == (item, 1)  # one thread per worker
        batch.context.index.add_(1)  # writable and not shared
    makers = [batch.positions[1] for batch in batches]
    assert len(set(makers)) == workers and os.getpid() not in makers
    assert makers == [makers[i % workers] for i in range(len(makers))]


def test_prefetch_batches_order_with_slow_workers():
    batches = produced(range(8), 3, 2, delay=0.02)
    assert [batch.positions[0] for batch in batches] == list(range(8))


def test_prefetch_batches_leaves_no_process():
    produced(range(3), 2)
    assert not active_children()
    for end in ("close", "drop", "raise"):
        iterator = prefetch_batches(make, range(100), shape=SHAPE, workers=2, prefetch=2)
        processes = {next(iterator).positions[1] for _ in range(2)}
        assert len(processes) == 2 and all(map(alive, processes))
        if end == "close":
            iterator.close()
        elif end == "raise":
            with pytest.raises(KeyboardInterrupt):
                iterator.throw(KeyboardInterrupt)
        del iterator
        gc.collect()
        assert not active_children() and not any(map(alive, processes))


def test_prefetch_batches_raises_run_errors_of_workers_in_order():
    iterator = prefetch_batches(partial(make, trouble={4: "failed"}), range(9), shape=SHAPE, workers=2, prefetch=3)
    assert [next(iterator).positions[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(RunError) as error:
        next(iterator)
    assert str(error.value) == "the disk is gone"
    assert not active_children()


def test_loader_defect_contains_the_traceback():
    with pytest.raises(LoaderDefect, match="micro-batch 1") as error:
        produced(range(3), 2, trouble={1: "defect"})
    assert "KeyError: 'a defect'" in str(error.value) and "in make" in str(error.value)


@pytest.mark.parametrize("pause", [0.0, 0.5])  # with a pause, the death is found when a batch is requested
@pytest.mark.parametrize(
    ("trouble", "said"), [("dies", r"died \(SIGKILL, .*\)"), ("hangs", r"has not answered for 1.5 seconds")]
)
def test_second_loss_of_a_worker_names_the_sample(pause, trouble, said):
    lines: list[str] = []
    iterator = prefetch_batches(
        partial(make, trouble={3: trouble}),
        range(6),
        shape=SHAPE,
        workers=2,
        prefetch=2,
        timeout=1.5,
        sample_name=lambda number: f"shard.tar/{number}.jpg",
        on_restart=lines.append,
    )
    line = rf"loader process \d+ {said} while making micro-batch 3, at shard.tar/1003.jpg, for the second time"
    with pytest.raises(RunError, match=line) as error:
        for _ in iterator:
            time.sleep(pause)
    assert "\n" not in str(error.value)
    assert len(lines) == 1 and lines[0].endswith("; a new process replaces it")
    assert not active_children()


@pytest.mark.parametrize("trouble", ["dies once", "hangs once"])
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3)])
def test_first_loss_of_a_worker_changes_no_batch(tmp_path, trouble, workers, prefetch):
    lines: list[str] = []
    work = partial(make, trouble={2: trouble, 7: trouble}, folder=str(tmp_path))
    batches = list(
        prefetch_batches(
            work, range(12), shape=SHAPE, workers=workers, prefetch=prefetch, timeout=1.5, on_restart=lines.append
        )
    )
    assert [batch.positions[0] for batch in batches] == list(range(12))
    assert all((batch.pixels == batch.positions[0]).all() for batch in batches)
    assert len(lines) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_ignore_signals(number):
    iterator = prefetch_batches(make, range(12), shape=SHAPE, workers=2, prefetch=1)
    for process in {next(iterator).positions[1] for _ in range(2)}:
        os.kill(process, number)
    assert [batch.positions[0] for batch in iterator] == list(range(2, 12))


def test_prefetch_batches_larger_than_a_pipe():
    size = 300_000
    batches = list(prefetch_batches(partial(large, size), range(4), shape=SHAPE, workers=2, prefetch=2))
    assert [batch.loss_weight.shape for batch in batches] == [(size,)] * 4


def large(size: int, item: int, pixels: Tensor) -> Batch:
    return bare_batch(np.arange(size), pixels, [item], [])


def test_make_may_return_other_pixels():
    batches = list(prefetch_batches(elsewhere, range(3), shape=SHAPE, workers=1, prefetch=1))
    assert [int(batch.pixels[0, 0, 0, 0]) for batch in batches] == [0, 1, 2]


def elsewhere(item: int, pixels: Tensor) -> Batch:
    return bare_batch(np.arange(2), torch.full_like(pixels, item), [item], [])


_PARENT = """
import sys, time
from functools import partial
from ijepa.data.loading.workers import prefetch_batches
from tests.unit.data.loading.test_workers import SHAPE, make

if __name__ == "__main__":
    how = sys.argv[1]
    iterator = prefetch_batches(partial(make, delay=0.01), range(10**6), shape=SHAPE, workers=2, prefetch=2)
    print(*[next(iterator).positions[1] for _ in range(2)], flush=True)
    if how == "leave":
        sys.exit(3)
    for batch in iterator:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("leave", 3)])
def test_no_worker_outlives_its_parent(tmp_path, how, code):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, str(script), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    try:
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        if how == "kill":
            assert all(map(alive, workers))
            parent.kill()
        assert parent.wait(LIMIT) == code
        wait_until(lambda: not any(map(alive, workers)))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_make_is_pickled_as_a_name():
    assert len(pickle.dumps(partial(make, delay=0.1))) < 300
