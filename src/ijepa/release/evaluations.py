"""The evaluations that a card shows: those of the weights that are released, known by their hash, and no others.

A run's folder may hold results of an earlier checkpoint, or of the context encoder. A row is shown where its weights'
hash is that of one of the release's encoders, or where it is a baseline beside such a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ijepa.evaluation.features.extract import weights_hash
from ijepa.evaluation.results.compare import COMPARED
from ijepa.evaluation.results.schema import METRIC_NAMES
from ijepa.evaluation.results.store import read_result
from ijepa.interop.weights import Weights, Which, load_encoder
from ijepa.release.markup import markdown_table
from ijepa.utils.names import printable


@dataclass(frozen=True)
class Shown:
    """A result of `kind`, and which encoder of the release each of its rows is; baselines are in no row of it."""

    result: dict[str, Any]
    encoders: dict[str, Which]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the release's encoders and of baselines; those of other weights are left out."""
        others = set(self.result.get("weights", {})) - set(self.encoders)
        return [row for row in self.result["rows"] if row["encoder"] not in others]

    def called(self, row: dict[str, Any]) -> str:
        """What a row is called."""
        name = row["encoder"]
        return f"{name} (context encoder)" if self.encoders.get(name) == "context" else name


def of_release(found: Weights, files: Sequence[Path]) -> tuple[list[Shown], list[str]]:
    """Return what the results in `files` say of the released weights, and the names of files that say nothing.

    The target encoder's come first.

    Raises:
        UserError: a file is no result.
    """
    results = {file: read_result(file).to_json() for file in files}
    # Before training the two are equal: the target, which comes first, then has the name.
    hashes = (
        {weights_hash(load_encoder(found.folder, which)): which for which in reversed(get_args(Which))} if files else {}
    )
    shown, others = [], []
    for file, result in results.items():
        digests = result.get("weights_sha256", {})
        ours = {name: hashes[digests[name]] for name in result.get("weights", {}) if digests.get(name) in hashes}
        if ours:
            shown.append(Shown(result, ours))
        else:
            others.append(file.name)
    shown.sort(key=lambda each: "target" not in each.encoders.values())
    return shown, others


def evaluation_section(shown: Sequence[Shown], others: Sequence[str]) -> str:
    """Return the card's tables, one a result."""
    left = f"Not shown, as they are of other weights than these: {', '.join(f'`{name}`' for name in others)}."
    parts = ["## Evaluation"]
    if shown:
        parts.append("A table is one protocol; numbers of different protocols do not compare.")
        parts += [_table(each) for each in shown]
    else:
        parts.append("None was made of these weights.")
    return "\n\n".join([*parts, left] if others else parts)


def index_entries(each: Shown) -> list[dict[str, Any]]:
    """Return what the hub's index reads of a result: the target encoder's figures alone."""
    row = next((row for row in each.rows if each.encoders.get(row["encoder"]) == "target"), None)
    if row is None:
        return []
    result = each.result
    metrics = [
        {
            "type": "accuracy" if key == "top1" else key,
            "name": f"{METRIC_NAMES[key]} (%)",
            "value": round(100 * row[key], 2),
        }
        for key in COMPARED
        if isinstance(row.get(key), float)
    ]
    task = "image-segmentation" if result["kind"] == "segmentation" else "image-classification"
    where = data_name(result["data"].get("test", {}).get("path"))
    named = {"type": task, "name": f"{result['kind']}, protocol {result['protocol']['name']}"}
    return [{"task": named, "dataset": {"type": where, "name": where}, "metrics": metrics}]


def data_name(path: object) -> str:
    """Return the printable name of data at a path: the last part that is not a pattern of files."""
    parts = [part for part in Path(str(path or "unknown")).parts if not set(part) & set("*?[{")]
    return printable(parts[-1]) if parts else "unknown"


def _table(each: Shown) -> str:
    result = each.result
    figures = [key for key in COMPARED if any(isinstance(row.get(key), float) for row in each.rows)]
    rows = [
        (each.called(row), *(f"{100 * row[key]:.2f}" if isinstance(row.get(key), float) else "-" for key in figures))
        for row in each.rows
    ]
    level = "" if result.get("level") is None else f", level {result['level']}"
    count = result["data"].get("test", {}).get("n")
    title = f"**{result['kind']}, protocol `{result['protocol']['name']}`{level}**, {count} test images, in %"
    notes = "".join(f"\n\n{note}" for note in result.get("notes", []))
    return f"{title}\n\n{markdown_table(('encoder', *(METRIC_NAMES[key] for key in figures)), rows)}{notes}"
