"""What a run's folder says, read once: columns of numbers, evaluation results, facts. Nothing is computed here.

Metrics become columns, not rows: a run of three million steps is 24 MB a key that way, and a hundred times that as
dictionaries. A last line without its end was being written when somebody looked, or when the run was killed, and is
left out; anything else that is no JSON is refused with its line.
"""

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.checkpoint.run_dir import Run
from ijepa.config.recipe import Recipe
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json

Numbers = npt.NDArray[np.float64]
Columns = Mapping[str, Numbers]

KINDS = {
    "linear": "Linear probe",
    "knn": "kNN",
    "segmentation": "Segmentation",
    "propagation": "Label propagation",
    "diagnosis": "Diagnosis",
}
"""Kinds of results in the order in which a page shows them, with what it calls them."""

MAIN = {"linear": "top1", "knn": "top1", "segmentation": "miou", "propagation": "jf"}
"""The figure that stands for each kind."""


@dataclass(frozen=True)
class Result:
    """One evaluation: `values` as `ijepa evaluate` wrote it to `file`."""

    file: Path
    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What was evaluated: linear, knn, segmentation, or diagnosis."""
        return str(self.values["kind"])

    @property
    def protocol(self) -> str:
        """The protocol's name, empty where there is none."""
        return str(self.values.get("protocol", {}).get("name", ""))

    @property
    def title(self) -> str:
        """Kind and protocol in words, and the context encoder's name where it stands in the target's place."""
        named = KINDS.get(self.kind, self.kind)
        other = " (context encoder)" if self.values.get("which") == "context" else ""
        return f"{named}, protocol {self.protocol}{other}" if self.protocol else named

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row an encoder, the trained one first; none in a diagnosis."""
        return list(self.values.get("rows", []))

    def row(self, encoder: str) -> dict[str, Any] | None:
        """Return the row of one encoder, or None."""
        return next((row for row in self.rows if row["encoder"] == encoder), None)

    def path(self, role: str) -> str | None:
        """Return the path of the `train` or `test` set, where the result names it."""
        part = self.values.get("data", {}).get(role)
        path = part.get("path") if isinstance(part, dict) else None
        return str(path) if path else None

    def listed(self, role: str) -> str | None:
        """Return the list that chose a part of the `train` or `test` set, where the result names one."""
        part = self.values.get("data", {}).get(role)
        listed = part.get("list") if isinstance(part, dict) else None
        return str(listed) if listed else None


@dataclass(frozen=True)
class Record:
    """A run's files. Columns are empty, and `info` is None, where a file is not there."""

    run: Run
    recipe: Recipe
    info: Mapping[str, Any] | None
    metrics: Columns
    timings: Columns
    diagnostics: Columns
    results: tuple[Result, ...]

    def result(self, *kinds: str) -> Result | None:
        """Return the first result of the first of these kinds that there is."""
        return next((result for kind in kinds for result in self.results if result.kind == kind), None)


def read_record(folder: Path) -> Record:
    """Read a run's folder.

    Raises:
        UserError: the folder holds no run, or one of its files is not what it should be.
    """
    run = Run(folder)
    if not run.recipe_file.is_file():
        raise UserError(folder, "holds no run", "give a folder that `ijepa pretrain` wrote")
    return Record(
        run=run,
        recipe=run.recipe(),
        info=run.info() if run.info_file.is_file() else None,
        metrics=read_columns(run.metrics_file),
        timings=read_columns(run.timings_file),
        diagnostics=read_columns(run.diagnostics_file),
        results=_results(run.evaluations),
    )


def read_columns(file: Path) -> dict[str, Numbers]:
    """Read a file of one JSON object a line as columns (rows,), NaN where a row has no number; empty without a file.

    Raises:
        UserError: a line that is no JSON object with a step.
    """
    if not file.is_file():
        return {}
    columns: dict[str, array[float]] = {}
    missing, rows = float("nan"), 0
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}", f"not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise UserError(f"{file}:{number}", "not a JSON object with a step")
            for key, value in row.items():
                if isinstance(value, int | float) and key not in columns:
                    columns[key] = array("d", [missing]) * rows
            for key, column in columns.items():
                value = row.get(key)
                column.append(float(value) if isinstance(value, int | float) else missing)
            rows += 1
    return {key: np.frombuffer(column, dtype=np.float64) for key, column in columns.items()}


def _results(folder: Path) -> tuple[Result, ...]:
    if not folder.is_dir():
        return ()
    results = []
    for file in sorted(folder.glob("*.json")):
        values = read_json(file)
        rows = values.get("rows")
        told = isinstance(rows, list) and rows and all(isinstance(row, dict) and "encoder" in row for row in rows)
        if "kind" not in values or not (told or isinstance(values.get("numbers"), dict)):
            raise UserError(file, "is no result of an evaluation", "move it out of evaluations/")
        results.append(Result(file, values))
    order = list(KINDS)
    place = {kind: number for number, kind in enumerate(order)}
    return tuple(sorted(results, key=lambda result: (place.get(result.kind, len(order)), result.file.name)))
