"""The logs of a run as small charts; templates/panels.yaml defines them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ijepa.interop.weights import shipped_folder, shipped_weights
from ijepa.report.charts import COLORS, Line, line_chart, smoothing_window
from ijepa.report.formatting import format_number
from ijepa.report.images import Picture
from ijepa.report.run_data import Columns, MissingInput, RunData, read_columns

_LONGER = "Same recipe, longer training"


@dataclass(frozen=True)
class Panel:
    """One chart; `last` has the color, the label and the last value of each line, without a label if it is alone."""

    title: str
    caption: str
    last: list[tuple[str, str, str]]
    chart: Picture


@dataclass(frozen=True)
class CurveSection:
    """Charts by group; `diagnose_command` if nothing was measured during training."""

    groups: dict[str, list[Panel]]
    diagnose_command: str | None


def curve_section(run: RunData) -> CurveSection:
    """Return the charts that the logs of a run fill."""
    groups, name = training_panels(run), run.recipe.name
    if not groups:
        raise MissingInput("the run has no metrics", f"ijepa pretrain {name}")
    if name in shipped_weights() and (panels := longer_panels(shipped_folder(name))):
        groups[_LONGER] = panels
    return CurveSection(groups, None if run.diagnostics else f"ijepa pretrain {name} --diagnose-every 500")


def training_panels(run: RunData) -> dict[str, list[Panel]]:
    """Return the charts of a run by group, without empty groups; unknown diagnostics have a chart each."""
    logs = {"metrics": run.metrics, "timings": run.timings, "diagnostics": run.diagnostics}
    definitions = {title: panels for title, panels in _definitions().items() if title != _LONGER}
    known = {key for panels in definitions.values() for each in panels for key in each["lines"]} | {"step"}
    others = [
        {"title": key, "log": "diagnostics", "lines": {key: key}, "caption": "Measured on a fixed batch."}
        for key in sorted(run.diagnostics.keys() - known)
    ]
    groups = {}
    for title, panels in definitions.items():
        groups[title] = _panels(logs, [*panels, *others] if title == "Feature diagnostics" else panels)
    return {title: panels for title, panels in groups.items() if panels}


def longer_panels(folder: Path) -> list[Panel]:
    """Return the charts of weights that are part of the package: how their recipe continues after more steps."""
    logs = {name: read_columns(folder / f"{name}.jsonl") for name in ("metrics", "accuracy")}
    return _panels(logs, _definitions()[_LONGER])


@cache
def _definitions() -> dict[str, list[dict[str, Any]]]:
    file = resources.files("ijepa.report") / "templates/panels.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _panels(logs: Mapping[str, Columns], definitions: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Return a panel for each definition that has a number in at least one of its columns."""
    panels = []
    for each in definitions:
        columns, lines = logs[each["log"]], []
        for key, label in each["lines"].items():
            values = columns.get(key, np.zeros(0))
            known = np.isfinite(values)
            if known.any() and not (each.get("hide_constant") and len(np.unique(values[known])) == 1):
                lines.append(Line(label, columns["step"][known], values[known]))
        if not lines:
            continue
        smooth, window = bool(each.get("smooth")), smoothing_window(len(lines[0].x))
        note = f" Faint: single steps; strong: mean over {window} of them." if smooth and window > 1 else ""
        last = [
            (color, line.label if len(lines) > 1 else "", format_number(line.y[-1]))
            for line, color in zip(lines, COLORS, strict=False)
        ]
        chart = line_chart(each["title"], lines, smooth=smooth, log_scale=bool(each.get("log_scale")))
        panels.append(Panel(each["title"], each["caption"] + note, last, chart))
    return panels
