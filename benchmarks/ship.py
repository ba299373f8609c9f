"""Make a run's weights part of the package: python benchmarks/ship.py RUN --train P --test P

Writes src/ijepa/weights/NAME, where NAME is that of the recipe: recipe.yaml, target_encoder.safetensors of the last
checkpoint, metrics.jsonl (every 50th step), accuracy.jsonl (linear probe and kNN by protocol `demo`, for every kept
checkpoint and for the initial encoder) and about.json, which states its origin. The run should have kept its
checkpoints (`--checkpoint.keep`).
"""

import json
import shutil
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--train", required=True)
@click.option("--test", required=True)
@click.option("--output", type=click.Path(path_type=Path), help="Another folder than the package's.")
@click.option("--every", type=click.IntRange(min=1), default=50, help="Steps between the metrics that are kept.")
def main(run: Path, train: str, test: str, output: Path | None, every: int) -> None:
    """Ship RUN."""
    from ijepa import Recipe
    from ijepa.evaluation.run import evaluate

    recipe = Recipe.load(run / "recipe.yaml")
    saved = {int(folder.name.removeprefix("step-")): folder for folder in sorted((run / "checkpoints").glob("step-*"))}
    weights = {str(step): str(folder) for step, folder in saved.items()}
    rows: dict[int, dict[str, float]] = {}
    for kind in ("linear", "knn"):
        result, _ = evaluate(kind, weights, train, test, protocol="demo", output=run / "curve", progress=click.echo)
        for row in result.rows:
            if row.encoder != "pixels":
                rows.setdefault(0 if row.encoder == "random" else int(row.encoder), {})[kind] = row["top1"]

    out = output or Path(__file__).parents[1] / "src" / "ijepa" / "weights" / recipe.name
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(recipe.data.path or "", "scenes"))
    shutil.copy(saved[max(saved)] / "target_encoder.safetensors", out)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[every - 1 :: every]))
    curve = [json.dumps({"step": step, **rows[step]}) + "\n" for step in sorted(rows)]
    (out / "accuracy.jsonl").write_text("".join(curve))
    info = json.loads((run / "run.json").read_text())
    timings = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    hours = sum(row["seconds"] for row in timings) / 3600
    about = {
        "what": f"target encoder of the {recipe.name} recipe after {max(saved)} of {recipe.steps} steps",
        "images": info["images"],
        "hours": round(hours, 2),
        **{key: info[key] for key in ("versions", "commit", "devices", "cpu", "seed") if key in info},
    }
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    click.echo(f"shipped: {out}")


if __name__ == "__main__":
    main()
