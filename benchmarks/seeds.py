"""Gather the demo over seeds: python benchmarks/seeds.py RUN RUN RUN --output benchmarks/results/demo-seeds.json

Each RUN is the folder of an `ijepa demo --seed N --output RUN`. For every protocol, the margin is the metric of the
trained encoder minus the better one of a randomly initialized encoder of the same architecture and raw pixels. The wall
time of the demo, in total and by part, is recorded for each run.
"""

import json
from pathlib import Path
from typing import Any

import click

FIGURES = {"linear": "top1", "knn": "top1", "segmentation": "miou"}


def gather(runs: list[Path]) -> dict[str, Any]:
    """Return figures in %, by protocol, encoder and run, with margins."""
    found: dict[str, Any] = {"runs": []}
    for run in runs:
        info = json.loads((run / "run.json").read_text())
        about = {key: info[key] for key in ("seed", "versions", "commit", "devices", "cpu") if key in info}
        times = run / "demo.json"  # exists unless the demo was interrupted
        about["wall"] = json.loads(times.read_text()) if times.is_file() else None
        found["runs"].append(about)
    for kind, figure in FIGURES.items():
        rows: dict[str, list[float]] = {}
        for run in runs:
            (file,) = (run / "evaluations").glob(f"{kind}-demo.json")
            for row in json.loads(file.read_text())["rows"]:
                rows.setdefault(row["encoder"], []).append(round(100 * row[figure], 2))
        margins = [t - max(r, p) for t, r, p in zip(rows["trained"], rows["random"], rows["pixels"], strict=True)]
        found[kind] = {**rows, "margin": [round(m, 2) for m in margins], "least_margin": round(min(margins), 2)}
    return found


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(runs: tuple[Path, ...], output: Path) -> None:
    """Gather RUNS into one JSON."""
    found = gather(list(runs))
    output.write_text(json.dumps(found, indent=1) + "\n")
    for kind in FIGURES:
        click.echo(f"{kind}: {found[kind]}")


if __name__ == "__main__":
    main()
