"""The whole journey on the built-in scenes, by the same calls a user makes: data, pretraining, evaluation, report.

It trains for as many steps as a small machine manages in minutes, evaluates beside it the encoder as it was initialised
and raw pixels, and the encoder that comes with the package, trained by the same recipe for longer; and it ends in a
table and one HTML page.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ijepa.data.sources import open_source
from ijepa.evaluation.monitoring import online_diagnosis
from ijepa.evaluation.run import evaluate
from ijepa.interop.weights import shipped_weights
from ijepa.prepare.scenes import write_scenes
from ijepa.recipe import Recipe
from ijepa.report.page import write_report
from ijepa.training.loop import Callback, pretrain
from ijepa.training.monitor import duration

IMAGES = 12000
KINDS = ("linear", "knn", "segmentation")
SHIPPED = "scenes"
_DIAGNOSE_EVERY = 500


@dataclass(frozen=True)
class Journey:
    """What a demo gave: results by kind, and the page."""

    results: dict[str, dict[str, Any]]
    report: Path


def run(output: Path, *, seed: int = 0, images: int = IMAGES, overrides: dict[str, Any] | None = None) -> Journey:
    """Go the journey into `output`; a demo that was interrupted goes on where it stopped.

    Args:
        output: the run's folder; scenes are drawn into `output`-scenes beside it.
        seed: draws the scenes and everything in the run.
        images: scenes, training and validation together.
        overrides: dotted keys of the `scenes` recipe.
    """
    begun = time.perf_counter()
    scenes = output.with_name(output.name + "-scenes")
    if not (scenes / "manifest.json").is_file():
        _say(begun, f"drawing {images} scenes into {scenes}")
        write_scenes(scenes, images=images, seed=seed, processes=min(2, os.cpu_count() or 1))
    recipe = Recipe.load("scenes", {"data.path": str(scenes), "seed": seed, **(overrides or {})})
    source = open_source(scenes, split="train")
    _say(begun, f"pretraining {recipe.steps} steps of {recipe.batch.total} images; labels are not read")
    watch = Callback(_DIAGNOSE_EVERY, online_diagnosis(source, recipe.model.image_hw))
    info = {"data": {"path": str(scenes.resolve()), "fingerprint": source.fingerprint}}
    pretrain(recipe, source, output, callbacks=[watch], info=info)

    results = {}
    train, test = f"{scenes}/train-*.tar", f"{scenes}/val-*.tar"
    weights = {"trained": str(output)} | ({"longer": SHIPPED} if SHIPPED in shipped_weights() else {})
    for kind in KINDS:
        _say(begun, f"evaluating: {kind}")
        results[kind], _ = evaluate(kind, weights, train, test, protocol="demo", output=output / "evaluations")
    _say(begun, "writing the report")
    report = write_report(output)
    Console().print(summary(results))
    _say(begun, f"done; open {report}")
    return Journey(results, report)


def summary(results: dict[str, dict[str, Any]]) -> Table:
    """Return the closing table: a row an encoder, a column a protocol."""
    table = Table(title="Accuracy and mIoU in %", title_justify="left")
    table.add_column("encoder")
    columns = {
        "linear": ("linear probe", "top1"),
        "knn": ("kNN", "top1"),
        "segmentation": ("segmentation", "miou"),
    }
    for kind in results:
        table.add_column(columns[kind][0], justify="right")
    names = [row["encoder"] for row in next(iter(results.values()))["rows"]]
    for name in names:
        cells = []
        for kind, result in results.items():
            (row,) = (row for row in result["rows"] if row["encoder"] == name)
            cells.append(f"{100 * row[columns[kind][1]]:.1f}")
        table.add_row(name, *cells)
    return table


def _say(begun: float, line: str) -> None:
    print(f"[{duration(time.perf_counter() - begun)}] {line}", flush=True)
