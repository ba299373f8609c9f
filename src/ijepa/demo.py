"""The whole journey on the built-in scenes, by the same calls a user makes: data, pretraining, evaluation, report.

It trains for as many steps as a small machine manages in minutes, evaluates beside it the encoder as it was initialised
and raw pixels, and the encoder that comes with the package, trained by the same recipe for longer; and it ends in a
table and one HTML page.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.evaluation.diagnostics.online import online_diagnosis
from ijepa.evaluation.run import evaluate
from ijepa.interop.weights import shipped_weights
from ijepa.prepare.scenes.scenes import VERSION, write_scenes
from ijepa.report.page import write_report
from ijepa.training.loop import Callback, pretrain
from ijepa.utils import random as randomness
from ijepa.utils.cores import available_cores
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json, write_json
from ijepa.utils.progress import duration

IMAGES = 12000
KINDS = ("linear", "knn", "segmentation")
SHIPPED = "scenes"
TIMES = "demo.json"
_DIAGNOSE_EVERY = 500


@dataclass(frozen=True)
class Journey:
    """What a demo gave: results by kind, and the page."""

    results: dict[str, dict[str, Any]]
    report: Path


def run(output: Path, *, seed: int = 0, images: int = IMAGES, overrides: dict[str, Any] | None = None) -> Journey:
    """Go the journey into `output`; a demo that was interrupted goes on where it stopped.

    One that was not leaves its wall time, whole and by part, in `output`/demo.json.

    Args:
        output: the run's folder; scenes are drawn into `output`-scenes beside it.
        seed: draws the scenes and everything in the run; evaluations have the same draws for all.
        images: scenes, training and validation together.
        overrides: dotted keys of the `scenes` recipe.

    Raises:
        UserError: the folders hold another run, or other scenes.
    """
    clock = _Clock()
    scenes = output.with_name(output.name + "-scenes")
    whole = not output.exists() and not scenes.exists()
    with clock.part("scenes", f"{images} scenes, drawn into {scenes}"):
        draw(scenes, images=images, seed=seed)
    recipe = Recipe.load("scenes", {"data.path": str(scenes), "seed": seed, **(overrides or {})})
    source = open_dataset(scenes, split="train")
    words = f"pretraining {recipe.steps} steps of {recipe.batch.total} images; labels are read to measure kNN, no more"
    with clock.part("pretraining", words):
        watch = Callback(_DIAGNOSE_EVERY, online_diagnosis(source, recipe.model.image_size))
        info = {"data": {"path": str(scenes.resolve())}}
        pretrain(recipe, source, output, callbacks=[watch], info=info)

    results = {}
    train, test = f"{scenes}/train-*.tar", f"{scenes}/val-*.tar"
    weights = {"trained": str(output)} | ({"longer": SHIPPED} if SHIPPED in shipped_weights() else {})
    for kind in KINDS:
        with clock.part(kind, f"evaluating: {kind}"):
            results[kind], _ = evaluate(kind, weights, train, test, protocol="demo", output=output / "evaluations")
    with clock.part("report", "writing the report"):
        report = write_report(output)
    if whole:
        write_json(output / TIMES, clock.as_json())
    Console().print(summary(results))
    for kind, result in results.items():
        for note in result.get("notes", []):
            print(f"note, {kind}: {note}")
    clock.say(f"done; open {report}")
    return Journey(results, report)


def draw(folder: Path, *, images: int, seed: int) -> None:
    """Draw scenes into `folder`, complete or absent; those that are there already are kept.

    Raises:
        UserError: the folder holds other scenes, or something else.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check(folder, images, seed)
        return
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    write_scenes(beside, images=images, seed=seed, processes=min(2, available_cores()))
    beside.rename(folder)


def _check(folder: Path, images: int, seed: int) -> None:
    hint = "give another --output, or remove that folder"
    if not (folder / "manifest.json").is_file():
        raise UserError(folder, "is not empty and holds no scenes", hint)
    manifest = read_json(folder / "manifest.json")
    there = {key: manifest.get(key) for key in ("seed", "version", "randomness")}
    there["images"] = sum(split["images"] for split in manifest["splits"].values())
    wanted = {"seed": seed, "version": VERSION, "randomness": randomness.VERSION, "images": images}
    for key, value in wanted.items():
        if there[key] != value:
            raise UserError(folder, f"holds scenes of {key} {there[key]}, not {value}", hint)


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


class _Clock:
    """Says what begins, and how long after the start; keeps the wall time of each part."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str, line: str) -> Iterator[None]:
        self.say(line)
        begun = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - begun, 2)

    def say(self, line: str) -> None:
        print(f"[{duration(time.perf_counter() - self._begun)}] {line}", flush=True)

    def as_json(self) -> dict[str, Any]:
        """Wall seconds of the whole and of each part."""
        return {"seconds": round(time.perf_counter() - self._begun, 2), "parts": self._seconds}
