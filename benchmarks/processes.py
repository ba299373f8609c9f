"""The demo's pretraining in float32 on two processes, by the command that a user types, compared with one process.

    python benchmarks/processes.py losses runs/demo-scenes --output benchmarks/results/demo-losses.json

takes 20 steps on one process and on two, and compares their losses.

    python benchmarks/processes.py killed runs/demo-scenes --output benchmarks/results/demo-processes.json

trains to the end: one of the two processes gets SIGKILL after step 700 of 2,000. The run must end by itself, and the
same command must finish it. The metrics of the trained encoder are then compared with those of one process in
`demo-seeds.json`, for the same seed and over all seeds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

SEEDS = Path(__file__).parent / "results" / "demo-seeds.json"
KINDS = {"linear": "top1", "knn": "top1"}
KILL_AFTER = 700
SEED = 0
"""The seed of the recipe, which nothing here changes."""


def command(processes: int, scenes: Path, run: Path, *more: str) -> list[str]:
    """Return the command for a number of processes."""
    launched = (
        () if processes == 1 else ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")
    )
    recipe = ("pretrain", "scenes", "--data.path", str(scenes), "--output", str(run), "--precision.autocast", "none")
    return [sys.executable, "-m", *launched, "ijepa", *recipe, *more]


def compare(scenes: Path, folder: Path, count: int) -> dict[str, Any]:
    """Return the losses of the first steps on one process and on two; the runs stay in `folder`."""
    schedule = ("--steps", str(count), "--schedule.warmup", "50 %")
    found: dict[str, Any] = {"steps": count}
    for processes, name in ((1, "one_process"), (2, "two_processes")):
        whole = command(processes, scenes, folder / name, *schedule)
        subprocess.run(whole, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
        found[name] = [row["loss"] for row in metrics(folder / name)]
    pairs = zip(found["one_process"], found["two_processes"], strict=True)
    return {**found, "largest_gap": max(abs(one - two) for one, two in pairs)}


def train(scenes: Path, run: Path, *, kill: bool) -> dict[str, Any]:
    """Run or resume on two processes; with `kill`, end rank 1 after a step and return how the other rank ended."""
    began = time.monotonic()
    whole = command(2, scenes, run)
    job = subprocess.Popen(whole, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    killed = 0
    while kill and not killed and job.poll() is None:
        time.sleep(1)
        if len(metrics(run)) >= KILL_AFTER:
            killed = rank_one(job.pid)
            os.kill(killed, signal.SIGKILL)
    said = (job.communicate()[1] or "").splitlines()
    line = next((line for line in said if line.startswith("ijepa: ")), None)
    return {"exit_code": job.returncode, "said": line, "seconds": round(time.monotonic() - began)}


def beside_seeds(ours: float, kind: str, seeds: dict[str, Any]) -> dict[str, Any]:
    """Compare the result of two processes with that of one, for the same seed and over all seeds."""
    theirs = seeds[kind]["trained"]
    same = next(value for value, run in zip(theirs, seeds["runs"], strict=True) if run["seed"] == SEED)
    return {
        "two_processes": ours,
        "one_process_same_seed": same,
        "one_process_by_seed": theirs,
        "least": min(theirs),
        "most": max(theirs),
        "within_spread": min(theirs) <= ours <= max(theirs),
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, one row per step; none before it has started."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rank_one(parent: int) -> int:
    """Return the process that torchrun, process `parent`, started as rank 1."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes().replace(b"LOCAL_RANK=1\0", b""):
            return int(child)
    raise RuntimeError("no rank 1")


@click.group()
def main() -> None:
    """Train the demo's recipe on two processes and compare."""


@main.command()
@click.argument("scenes", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def losses(scenes: Path, steps: int, output: Path) -> None:
    """Compare the losses of the first steps on SCENES."""
    from ijepa.utils.environment import machine

    with TemporaryDirectory() as folder:
        found = {**machine(), **compare(scenes, Path(folder), steps)}
    output.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(f"the largest gap of {steps} losses: {found['largest_gap']:.2g}")


@main.command()
@click.argument("scenes", type=click.Path(path_type=Path, exists=True))
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/processes"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def killed(scenes: Path, run: Path, output: Path) -> None:
    """Train all steps on SCENES, with a kill after some of them."""
    from ijepa.evaluation.run import evaluate
    from ijepa.utils.environment import machine

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
        found[kind] = beside_seeds(round(100 * result.rows[0][figure], 2), kind, seeds)
        click.echo(f"{kind}: {found[kind]}")
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
