"""The files of a run, read once: logs as columns of numbers, evaluation results, run.json."""

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
from ijepa.evaluation.results.schema import KIND_NAMES, EvaluationResult
from ijepa.evaluation.results.store import read_result
from ijepa.utils.errors import UserError

Numbers = npt.NDArray[np.float64]
Columns = Mapping[str, Numbers]


class MissingInput(Exception):
    """Something that a section needs is missing: `reason` says what, `command` is the command that makes it."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(reason)
        self.reason, self.command = reason, command


@dataclass(frozen=True)
class RunData:
    """The files of a run. Columns are empty, and `info` is None, if the file is missing."""

    files: Run
    recipe: Recipe
    info: Mapping[str, Any] | None
    metrics: Columns
    timings: Columns
    diagnostics: Columns
    results: tuple[EvaluationResult, ...]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.files.folder

    def result(self, *kinds: str) -> EvaluationResult | None:
        """Return the first result of the first of these kinds that has one."""
        return next((result for kind in kinds for result in self.results if result.kind == kind), None)


def read_run_data(folder: Path) -> RunData:
    """Read the folder of a run.

    Raises:
        UserError: the folder is not a run, or one of its files is damaged.
    """
    run = Run(folder)
    if not run.recipe_file.is_file():
        raise UserError(folder, "is not a run", "give a folder that `ijepa pretrain` wrote")
    order = list(KIND_NAMES)
    results = [read_result(file) for file in sorted(run.evaluations.glob("*.json"))]
    results.sort(key=lambda result: order.index(result.kind) if result.kind in order else len(order))
    return RunData(
        files=run,
        recipe=run.recipe(),
        info=run.info() if run.info_file.is_file() else None,
        metrics=read_columns(run.metrics_file),
        timings=read_columns(run.timings_file),
        diagnostics=read_columns(run.diagnostics_file),
        results=tuple(results),
    )


def read_columns(file: Path) -> dict[str, Numbers]:
    """Read a log, one JSON object per line, as columns (rows,) with NaN where a row has no number.

    Columns of doubles need 24 MB per key for three million steps; a list of dictionaries needs a hundred times that.
    A last line without a line break is left out: it was being written when the run stopped. A missing file has no
    columns.

    Raises:
        UserError: a line is not a JSON object with a step.
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
