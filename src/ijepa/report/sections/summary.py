"""The facts at the top of the page, and the table of main metrics."""

from dataclasses import dataclass

import numpy as np

from ijepa.evaluation.results.schema import HEADLINE, METRIC_NAMES, EvaluationResult
from ijepa.report.formatting import format_number, format_percent
from ijepa.report.run_data import MissingInput, RunData
from ijepa.training.metrics import duration

_ENCODERS = {
    "trained": "target encoder of this run",
    "random": "the same encoder with its initial weights",
    "pixels": "raw pixels, no encoder",
}
CHANCE = {
    "linear": ("most frequent class", "the share of the most frequent class"),
    "knn": ("most frequent class", "the share of the most frequent class"),
    "segmentation": ("one class everywhere", "the mIoU if every pixel has the most frequent class"),
    "propagation": ("first mask, unchanged", "the J&F of the first mask, repeated for every frame"),
}
"""The answer that reaches the chance level of each kind: for a table cell, and for a sentence."""


@dataclass(frozen=True)
class SummaryColumn:
    """One evaluation: the heading of its column, percentages by encoder, the best encoder, and chance."""

    kind: str
    protocol: str
    metric: str
    percent: dict[str, str]
    best: set[str]
    chance: tuple[str, str] | None


@dataclass(frozen=True)
class Summary:
    """The main metric of each evaluation, one row for each encoder; `encoders` has their descriptions."""

    columns: list[SummaryColumn]
    encoders: dict[str, str]


def headline_facts(run: RunData) -> dict[str, str]:
    """Return a few facts of the run by name."""
    recipe, metrics, info, model = run.recipe, run.metrics, run.info or {}, run.recipe.model
    facts = {}
    if metrics:
        step = int(metrics["step"][-1])
        facts |= {"steps": format_number(step), "images seen": format_number(step * recipe.batch.total)}
    if "images" in info:
        facts["images in the data set"] = format_number(info["images"])
    facts |= {f"final {name}": format_number(metrics[name][-1]) for name in ("loss", "skill") if name in metrics}
    if "seconds" in run.timings:
        facts["training time"] = duration(float(np.nansum(run.timings["seconds"])))
    height, width = model.image_hw
    encoder = f"ViT, width {model.encoder.width}, {model.encoder.depth} layers, {model.patch_size} px patches"
    facts |= {"encoder": encoder, "image size": f"{width} × {height} px"}
    return facts | {"batch size": format_number(recipe.batch.total), "seed": str(recipe.seed)}


def summary_section(run: RunData) -> Summary:
    """Return the table of main metrics."""
    results = [result for result in run.results if result.headline]
    if not results:
        raise MissingInput("the run has no evaluations", evaluate_command(run))
    columns = [_column(result) for result in results]
    encoders = {}
    for result in results:
        for row in result.rows:
            described = _ENCODERS.get(row.encoder) or result.weights.get(row.encoder, "")
            encoders[row.encoder] = encoders.get(row.encoder) or described
    return Summary(columns, encoders)


def _column(result: EvaluationResult) -> SummaryColumn:
    key = HEADLINE[result.kind]
    best = max(row[key] for row in result.rows)
    kind, _, protocol = result.title.partition(", ")
    return SummaryColumn(
        kind,
        protocol,
        METRIC_NAMES[key],
        percent={row.encoder: format_percent(row[key]) for row in result.rows},
        best={row.encoder for row in result.rows if row[key] == best},
        chance=None if result.chance is None else (format_percent(result.chance), CHANCE[result.kind][0]),
    )


def evaluate_command(run: RunData) -> str:
    """Return a command that evaluates the run."""
    return f"ijepa evaluate linear {run.folder} --train PATH --test PATH"
