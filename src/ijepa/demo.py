"""The whole pipeline on built-in scenes, with the functions of the commands: data, pretraining, evaluation, report.

Pretraining takes minutes on a small machine. For comparison, the evaluations include the initial encoder, raw pixels,
and the encoder that is part of the package, which the same recipe trained for longer.
"""

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
from ijepa.evaluation.results.schema import HEADLINE, KIND_NAMES, EvaluationResult
from ijepa.evaluation.run import evaluate
from ijepa.prepare.scenes.scenes import VERSION, write_scenes
from ijepa.report.page import write_report
from ijepa.training.loop import Callback, pretrain
from ijepa.utils import random
from ijepa.utils.cores import available_cores
from ijepa.utils.errors import UserError
from ijepa.utils.files import atomic_dir, read_json, write_json
from ijepa.utils.progress import duration

IMAGES = 12000
KINDS = ("linear", "knn", "segmentation")
_DIAGNOSE_EVERY = 500


@dataclass(frozen=True)
class DemoResult:
    """The results by kind, and the path of the report."""

    results: dict[str, EvaluationResult]
    report: Path


def run(output: Path, *, seed: int = 0, images: int = IMAGES, overrides: dict[str, Any] | None = None) -> DemoResult:
    """Run the pipeline into `output`; a demo that was interrupted continues where it stopped.

    A demo without an interruption writes its duration, total and by part, to `output`/demo.json.

    Args:
        output: the run folder; scenes are drawn into the folder `output`-scenes next to it.
        seed: for the scenes and the run.
        images: number of scenes for training and validation together.
        overrides: dotted keys of the recipe `scenes`.

    Raises:
        UserError: a folder has a different run or different scenes.
    """
    clock = _Clock()
    scenes = output.with_name(output.name + "-scenes")
    from_start = not output.exists() and not scenes.exists()
    with clock.part("scenes", f"{images} scenes generated in {scenes}"):
        draw(scenes, images=images, seed=seed)
    recipe = Recipe.load("scenes", {"data.path": str(scenes), "seed": seed, **(overrides or {})})
    source = open_dataset(scenes, split="train")
    line = f"pretraining, {recipe.steps} steps of {recipe.batch.total} images; labels are used to measure kNN only"
    with clock.part("pretraining", line):
        diagnosis = Callback(_DIAGNOSE_EVERY, online_diagnosis(source, recipe.model.image_size))
        pretrain(recipe, source, output, callbacks=[diagnosis], info={"data": {"path": str(scenes.resolve())}})

    results = {}
    train, test = f"{scenes}/train-*.tar", f"{scenes}/val-*.tar"
    weights = {"trained": str(output), "longer": "scenes"}  # the second is part of the package
    for kind in KINDS:
        with clock.part(kind, f"evaluating: {kind}"):
            results[kind], _ = evaluate(kind, weights, train, test, protocol="demo", output=output / "evaluations")
    with clock.part("report", "writing the report"):
        report = write_report(output)
    if from_start:
        write_json(output / "demo.json", {"seconds": clock.seconds, "parts": clock.parts})
    Console().print(summary(results))
    for kind, result in results.items():
        for note in result.notes:
            print(f"note, {kind}: {note}")
    clock.show(f"done; open {report}")
    return DemoResult(results, report)


def draw(folder: Path, *, images: int, seed: int) -> None:
    """Draw scenes into `folder`, complete or absent; the same scenes are kept if they exist.

    Raises:
        UserError: the folder has other scenes, or something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        with atomic_dir(folder) as partial:
            write_scenes(partial, images=images, seed=seed, processes=min(2, available_cores()))
        return
    hint = "choose a different --output, or remove that folder"
    if not (folder / "manifest.json").is_file():
        raise UserError(folder, "is not empty and has no scenes", hint)
    manifest = read_json(folder / "manifest.json")
    found = {**manifest, "images": sum(split["images"] for split in manifest["splits"].values())}
    expected = {"seed": seed, "version": VERSION, "randomness": random.VERSION, "images": images}
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(folder, f"has scenes with {key} {found.get(key)}, not {value}", hint)


def summary(results: dict[str, EvaluationResult]) -> Table:
    """Return the table at the end: main metrics in percent, a row for each encoder and a column for each kind."""
    table = Table(title="Accuracy and mIoU in %", title_justify="left")
    table.add_column("encoder")
    for kind in results:
        table.add_column(KIND_NAMES[kind], justify="right")
    for rows in zip(*(result.rows for result in results.values()), strict=True):
        percents = (f"{100 * row[HEADLINE[kind]]:.1f}" for kind, row in zip(results, rows, strict=True))
        table.add_row(rows[0].encoder, *percents)
    return table


class _Clock:
    """Prints what starts and the time since the start of the demo, and measures the seconds of each part."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.parts: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 2)

    @contextmanager
    def part(self, name: str, line: str) -> Iterator[None]:
        self.show(line)
        start = self.seconds
        yield
        self.parts[name] = round(self.seconds - start, 2)

    def show(self, line: str) -> None:
        print(f"[{duration(self.seconds)}] {line}", flush=True)
