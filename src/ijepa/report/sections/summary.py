"""The facts at the top of the page, and the table of main metrics."""

from dataclasses import dataclass

import numpy as np

from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.report.formatting import format_number
from ijepa.report.run_data import MissingInput, RunData
from ijepa.utils.progress import duration

_ENCODERS = {
    "trained": "target encoder of this run",
    "random": "the same encoder with its initial weights",
    "pixels": "raw pixels, no encoder",
}


@dataclass(frozen=True)
class Summary:
    """Results that have a main metric, and what each encoder in them is, by its name."""

    results: list[EvaluationResult]
    encoders: dict[str, str]


def headline_facts(run: RunData) -> dict[str, str]:
    """Return a few facts of the run by name."""
    recipe, metrics, info, model = run.recipe, run.metrics, run.info or {}, run.recipe.model
    facts: dict[str, str] = {}
    if metrics:
        step = int(metrics["step"][-1])
        facts |= {"steps": format_number(step), "images seen": format_number(step * recipe.batch.total)}
    if "images" in info:
        facts["images in the data set"] = format_number(info["images"])
    facts |= {f"final {name}": format_number(metrics[name][-1]) for name in ("loss", "skill") if name in metrics}
    if "seconds" in run.timings:
        facts["training time"] = duration(float(np.nansum(run.timings["seconds"])))
    height, width = model.image_size
    encoder = f"ViT, width {model.encoder.width}, {model.encoder.depth} layers, {model.patch_size} px patches"
    facts |= {"encoder": encoder, "image size": f"{width} × {height} px"}
    return facts | {"batch size": format_number(recipe.batch.total), "seed": str(recipe.seed)}


def summary_section(run: RunData) -> Summary:
    """Return the table of main metrics."""
    results = [result for result in run.results if result.headline]
    if not results:
        raise MissingInput("the run has no evaluations", evaluate_command(run))
    encoders: dict[str, str] = {}
    for result in results:
        for row in result.rows:
            encoders[row.encoder] = encoders.get(row.encoder) or result.weights.get(row.encoder, "")
    return Summary(results, {name: _ENCODERS.get(name, label) for name, label in encoders.items()})


def evaluate_command(run: RunData) -> str:
    """Return a command that evaluates the run."""
    return f"ijepa evaluate linear {run.folder} --train PATH --test PATH"
