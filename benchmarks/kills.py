"""A run that is killed several times, compared bit for bit with one that is not, on a given data set.

    python benchmarks/kills.py DATA --steps 200 --output benchmarks/results/kills.json [--FIELD VALUE ...]

`ijepa pretrain vit-tiny-64` runs once without interruption. Then, for each number of loader processes, it gets SIGKILL
at random steps, and the same command resumes it until the end. Every file of tensors in the last checkpoint and
metrics.jsonl must be the same bytes; otherwise the exit code is 1. Further flags are those of the recipe.
"""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from ijepa.checkpoint.format import list_checkpoints
from ijepa.utils.environment import machine
from ijepa.utils.files import write_json


def killed(command: list[str], run: Path, at: list[int]) -> list[int]:
    """Run to the end, with SIGKILL once the metrics hold each of `at` steps; return what they held when it came."""
    came = []
    for step in at:
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while job.poll() is None and steps(run) < step:
            time.sleep(0.01)
        job.kill()
        if job.wait() >= 0:
            raise click.ClickException(f"the run ended by itself before step {step}; give more --steps")
        came.append(steps(run))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return came


def steps(run: Path) -> int:
    """Steps in a run's metrics."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def differing(run: Path, straight: Path) -> list[str]:
    """Names of the files that are not the same bytes: the last checkpoint's tensors, and the metrics."""
    folders = [list_checkpoints(each / "checkpoints")[-1] for each in (run, straight)]
    names = sorted({file.name for folder in folders for file in folder.glob("*.safetensors")})
    pairs = {name: [folder / name for folder in folders] for name in names}
    pairs["metrics.jsonl"] = [run / "metrics.jsonl", straight / "metrics.jsonl"]
    return [
        name
        for name, (ours, theirs) in pairs.items()
        if not (ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes())
    ]


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--steps", "total", type=click.IntRange(min=20), default=200, show_default=True)
@click.option("--kills", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--workers", type=int, multiple=True, default=(0, 1, 3), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the steps of the kills.")
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/kills"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(
    data: Path,
    flags: tuple[str, ...],
    total: int,
    kills: int,
    workers: tuple[int, ...],
    seed: int,
    run: Path,
    output: Path,
) -> None:
    """Kill runs on DATA and compare them with one that was not killed."""
    shutil.rmtree(run, ignore_errors=True)

    def command(folder: Path, count: int) -> list[str]:
        own = ["--data.path", data, "--output", folder, "--steps", total, "--data.workers", count]
        often = ["--log_every", 1, "--checkpoint.every", max(total // 10, 1)]
        return [sys.executable, "-m", "ijepa", "pretrain", "vit-tiny-64", *map(str, often), *flags, *map(str, own)]

    straight = run / "straight"
    subprocess.run(command(straight, workers[0]), check=True, stdout=subprocess.DEVNULL)
    draw, rows = random.Random(seed), list[dict[str, Any]]()
    for count in workers:
        folder = run / f"workers-{count}"
        at = sorted(draw.sample(range(1, total * 9 // 10), kills))
        came = killed(command(folder, count), folder, at)
        rows.append({"workers": count, "killed_at": came, "differ": differing(folder, straight)})
        click.echo(f"{count} workers, killed at {came}: {', '.join(rows[-1]['differ']) or 'the same bits'}")
    settings = {"data": data.name, "steps": total, "seed": seed, "flags": list(flags)}
    write_json(output, {**machine(), **settings, "runs": rows})
    if any(row["differ"] for row in rows):
        raise click.ClickException("a killed run is not the run it should have been")


if __name__ == "__main__":
    main()
