"""The demo's pretraining in float32 on two processes, one of them killed on the way, beside the demo's seeds:

    python benchmarks/processes.py runs/demo-scenes --output benchmarks/results/demo-processes.json

One process gets SIGKILL after step 700 of 2,000; the run must end by itself, and the same command must finish it. The
trained encoder's figures then stand beside those of `demo-seeds.json`, which one process gave for each seed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

SEEDS = Path(__file__).parent / "results" / "demo-seeds.json"
KINDS = {"linear": "top1", "knn": "top1"}
KILL_AFTER = 700


def train(scenes: Path, run: Path, *, kill: bool) -> dict[str, Any]:
    """Run or resume on two processes; with `kill`, end rank 1 after a step and say how the rest took it."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ijepa"),
        *("pretrain", "scenes", "--data.path", str(scenes), "--output", str(run), "--precision.autocast", "none"),
    ]
    began = time.monotonic()
    job = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    killed = 0
    while kill and not killed and job.poll() is None:
        time.sleep(1)
        if steps(run) >= KILL_AFTER:
            killed = rank_one(job.pid)
            os.kill(killed, signal.SIGKILL)
    said = (job.communicate()[1] or "").splitlines()
    line = next((line for line in said if line.startswith("ijepa: ")), None)
    return {"exit_code": job.returncode, "said": line, "seconds": round(time.monotonic() - began)}


def steps(run: Path) -> int:
    """Steps in a run's metrics."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def rank_one(parent: int) -> int:
    """The process that torchrun, process `parent`, started as rank 1."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes().replace(b"LOCAL_RANK=1\0", b""):
            return int(child)
    raise RuntimeError("no rank 1")


@click.command()
@click.argument("scenes", type=click.Path(path_type=Path, exists=True))
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/processes"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(scenes: Path, run: Path, output: Path) -> None:
    """Train on SCENES with two processes and a kill, and compare."""
    from ijepa.evaluation.run import evaluate
    from ijepa.training.run import machine

    found: dict[str, Any] = {
        **machine(),
        "killed": train(scenes, run, kill=True),
        "resumed": train(scenes, run, kill=False),
    }
    seeds = json.loads(SEEDS.read_text())
    for kind, figure in KINDS.items():
        result, _ = evaluate(
            kind, str(run), f"{scenes}/train-*.tar", f"{scenes}/val-*.tar", protocol="demo", baselines=False
        )
        ours, theirs = round(100 * result["rows"][0][figure], 2), seeds[kind]["trained"]
        found[kind] = {"two_processes": ours, "one_process_by_seed": theirs, "least": min(theirs), "most": max(theirs)}
        click.echo(f"{kind}: {found[kind]}")
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
