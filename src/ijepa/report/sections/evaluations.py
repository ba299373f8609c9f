"""All metrics of all evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from ijepa.evaluation.results.schema import HEADLINE, METRIC_NAMES, EvaluationResult, ResultRow
from ijepa.report.charts import class_chart
from ijepa.report.formatting import format_number, format_percent, format_value
from ijepa.report.images import Picture
from ijepa.report.run_data import MissingInput, RunData
from ijepa.report.sections.summary import CHANCE, evaluate_command


@dataclass(frozen=True)
class EvaluationTable:
    """One result: its metrics by column, IoU by class, and the protocol as YAML.

    A row is an encoder, a pair of value and interval for each metric, and the selected settings.
    """

    result: EvaluationResult
    metrics: list[str]
    rows: list[tuple[str, list[tuple[str, str]], str]]
    chance: str
    samples: str
    class_chart: Picture | None
    protocol: str


def evaluation_section(run: RunData) -> list[EvaluationTable]:
    """Return everything that the evaluations measured."""
    if not run.results:
        raise MissingInput("the run has no evaluations", evaluate_command(run))
    return [_table(result) for result in run.results]


def _table(result: EvaluationResult) -> EvaluationTable:
    keys = list(dict.fromkeys(key for row in result.rows for key in row.metrics))
    return EvaluationTable(
        result,
        [METRIC_NAMES.get(key, key) for key in keys],
        rows=[(row.encoder, [_cell(row, key) for key in keys], _settings(row.settings)) for row in result.rows],
        chance=CHANCE.get(result.kind, ("", ""))[1],
        samples="videos" if result.kind == "propagation" else "images",
        class_chart=_class_chart(result),
        protocol=yaml.safe_dump(result.protocol, sort_keys=False, allow_unicode=True) if result.protocol else "",
    )


def _cell(row: ResultRow, key: str) -> tuple[str, str]:
    """Return a share in percent, any other number as it is, and the interval of a main metric."""
    if key not in row.metrics:
        return "–", ""
    value = format_percent(row[key], 2) if key in METRIC_NAMES else format_number(row[key])
    if key not in HEADLINE.values() or row.ci is None:
        return value, ""
    return value, " to ".join(map(format_percent, row.ci))


def _settings(settings: Mapping[str, Any]) -> str:
    """Return the values of a row that are not metrics: selected settings, and accuracies by k."""
    parts = []
    for key, value in settings.items():
        name = key.replace("_", " ")
        if key == "top1_by_k":
            parts.append("top-1 by k " + ", ".join(f"{k}: {format_percent(share)}" for k, share in value.items()))
        elif isinstance(value, Mapping):
            parts.append(", ".join(f"{inner.replace('_', ' ')} {format_value(v)}" for inner, v in value.items()))
        else:
            parts.append(f"{name} {format_value(value)}")
    return "; ".join(parts)


def _class_chart(result: EvaluationResult) -> Picture | None:
    """Return the IoU of every class that is in the masks or in a prediction."""
    # (encoders, classes); None becomes NaN
    shares = {row.encoder: np.array(row.per_class, dtype=np.float64) for row in result.rows if row.per_class}
    if not shares:
        return None
    known = np.flatnonzero(~np.isnan(list(shares.values())).all(0))
    names = result.data.classes or ()
    return class_chart(
        [names[i] if i < len(names) else str(i) for i in known],
        {encoder: values[known] for encoder, values in shares.items()},
    )
