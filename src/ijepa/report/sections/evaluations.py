"""All metrics of all evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.report.charts import class_chart
from ijepa.report.formatting import format_percent, format_value
from ijepa.report.images import Picture
from ijepa.report.run_data import MissingInput, RunData
from ijepa.report.sections.summary import evaluate_command


@dataclass(frozen=True)
class EvaluationTable:
    """A result, the keys of its metrics, the selected settings by encoder, IoU by class, and the protocol as YAML."""

    result: EvaluationResult
    metrics: list[str]
    settings: dict[str, str]
    class_chart: Picture | None
    protocol: str


def evaluation_section(run: RunData) -> list[EvaluationTable]:
    """Return everything that the evaluations measured."""
    if not run.results:
        raise MissingInput("the run has no evaluations", evaluate_command(run))
    return [
        EvaluationTable(
            result,
            list(dict.fromkeys(key for row in result.rows for key in row.metrics)),
            {row.encoder: _settings(row.settings) for row in result.rows},
            _class_chart(result),
            yaml.safe_dump(result.protocol, sort_keys=False, allow_unicode=True) if result.protocol else "",
        )
        for result in run.results
    ]


def _settings(settings: Mapping[str, Any]) -> str:
    """Return the values of a row that are not metrics: selected settings, and accuracies by k."""
    parts = []
    for key, value in settings.items():
        if key == "top1_by_k":
            parts.append("top-1 by k " + ", ".join(f"{k}: {format_percent(share)}" for k, share in value.items()))
        elif isinstance(value, Mapping):
            parts.append(", ".join(f"{name.replace('_', ' ')} {format_value(inner)}" for name, inner in value.items()))
        else:
            parts.append(f"{key.replace('_', ' ')} {format_value(value)}")
    return "; ".join(parts)


def _class_chart(result: EvaluationResult) -> Picture | None:
    """Return the IoU of every class that is in the masks or in a prediction."""
    # By encoder (classes,); None becomes NaN.
    shares = {row.encoder: np.array(row.per_class, dtype=np.float64) for row in result.rows if row.per_class}
    if not shares:
        return None
    known = np.flatnonzero(~np.isnan(list(shares.values())).all(0))
    names = result.data.classes or ()
    return class_chart(
        [names[i] if i < len(names) else str(i) for i in known],
        {encoder: values[known] for encoder, values in shares.items()},
    )
