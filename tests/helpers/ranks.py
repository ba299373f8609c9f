"""Runs on several ranks: `python -m tests.helpers.ranks JOBS SIZE` forks into SIZE ranks.

JOBS is a JSON list of {"recipe": {...}, "output": folder, "double": bool, "unfused": bool, "stop_after": step,
"copy": a run to resume, "resume": how, "data": the images' path for each rank,
"reductions": file for the number of reduce-scatters,
"backend": torch.compile's, "warm": step after which nothing is compiled}. The jobs run one after another in one process
group, because starting processes takes longer than the runs.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.training.interrupts import Interrupted
from ijepa.training.loop import Callback, pretrain
from ijepa.training.runtime import Numerics
from tests.helpers.paths import ROOT
from tests.helpers.waiting import LIMIT


def run(job: dict[str, Any]) -> None:
    """Run one job in this process."""
    recipe = Recipe.read(job["recipe"], "test")
    numerics: dict[str, Any] = {"fused_optimizer": not job.get("unfused")}
    if job.get("double"):
        numerics["dtype"] = torch.float64
    calls: list[Callback] = []
    if recipe.compile is True:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(job.get("backend", "eager"))
        numerics["compile_backend"] = counter
        compiled: list[int] = []
        calls = [Callback(1, lambda model: compiled.append(counter.frame_count) or {})]
    if "stop_after" in job:

        def stop(model):
            stop.calls += 1
            if stop.calls == job["stop_after"] + 1 and os.environ.get("RANK", "1") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

        stop.calls = 0
        calls = [Callback(1, stop)]
    if "copy" in job and os.environ.get("RANK", "0") == "0":  # nothing is read before rank 0 has read
        shutil.copytree(job["copy"], job["output"])
    try:
        data = job["data"][int(os.environ["RANK"])] if "data" in job else recipe.data.path
        source = open_dataset(data, split="train")
        with counted_reductions() as count:
            output, resume = Path(job["output"]), job.get("resume", "auto")
            options = {"resume": resume, "numerics": Numerics(**numerics)}
            pretrain(recipe, source, output, callbacks=calls, quiet=True, **options)
        if "reductions" in job and os.environ.get("RANK", "0") == "0":
            Path(job["reductions"]).write_text(str(len(count)))
        if "warm" in job:
            assert 0 < compiled[job["warm"]] == compiled[-1], compiled
    except Interrupted as stopped:
        assert "stop_after" in job, stopped


@contextmanager
def counted_reductions() -> Iterator[list[str]]:
    """Collect a name for every reduce-scatter, with which FSDP sums gradients."""
    count: list[str] = []
    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]  # 2.13, 2.11
    plain = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        return lambda *arguments, **keywords: count.append(name) or plain[name](*arguments, **keywords)

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield count
    finally:
        for name in names:
            setattr(dist, name, plain[name])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment that torchrun would give a rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    }


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def spawn(size: int, command: list[str]) -> list[tuple[int, str]]:
    """Run a command as `size` ranks; return each one's exit code and its stderr."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            command, env=environment(rank, size, port), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for rank in range(size)
    ]
    try:
        texts = [rank.communicate(timeout=LIMIT)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, texts, strict=True)]


def run_jobs(size: int, jobs: list[dict[str, Any]]) -> None:
    """Run jobs on `size` ranks, which are processes."""
    ((code, text),) = spawn(1, [sys.executable, "-m", "tests.helpers.ranks", json.dumps(jobs), str(size)])
    assert code == 0, text


def fork_ranks(size: int, jobs: list[dict[str, Any]]) -> int:
    """Fork into `size` ranks, so that torch is imported once; return the worst exit code."""
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.fsdp

    assert torch.get_num_threads() == 1  # a fork has no other threads
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            dist.init_process_group("gloo")
            for job in jobs:
                run(job)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(fork_ranks(int(sys.argv[2]), json.loads(sys.argv[1])))
