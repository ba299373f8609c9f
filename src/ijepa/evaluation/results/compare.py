"""Many results in one comparison, with published results, and never two protocols in one column.

A column is one metric of one protocol on one pair of sets. Results share it if kind, every setting of the protocol,
image size, precision, the sets' fingerprints, their classes and the contents of their label maps are equal. Two files
of a protocol with one name and different settings have two columns. Published results (`published.yaml`, with the
source of each) have columns of their own, named by their data, because no result can prove that it was computed in the
same way.

A row is an encoder, identified by the hash of its weights if the result has one. A cell has several values if results
differ in their seed only.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import yaml

from ijepa.evaluation.results.schema import HEADLINE, METRIC_NAMES, EvaluationResult
from ijepa.evaluation.results.store import read_result
from ijepa.utils.errors import UserError

COMPARED = ("top1", "miou", "miou_overclustered", "corloc", "jf")
"""Metrics that are compared."""


@dataclass(frozen=True)
class Published:
    """Results in percent that a source reports, by encoder."""

    kind: str
    protocol: str
    data: str
    figure: str
    source: str
    values: dict[str, float]


@cache
def published() -> tuple[Published, ...]:
    """Return the published results."""
    text = (resources.files("ijepa.evaluation") / "published.yaml").read_text(encoding="utf-8")
    return tuple(Published(**entry) for entry in yaml.safe_load(text))


@dataclass(frozen=True)
class Cell:
    """A value in percent; `ci` is its 95 % interval if known."""

    percent: float
    ci: tuple[float, float] | None = None
    published: bool = False


@dataclass
class Comparison:
    """Encoders in rows, metrics in columns."""

    rows: dict[str, str] = field(default_factory=dict)
    """Names of the encoders by key, in order."""
    columns: dict[str, list[str]] = field(default_factory=dict)
    """Lines of the head of each column by key, in order."""
    cells: dict[tuple[str, str], list[Cell]] = field(default_factory=dict)
    """Values by keys of row and column."""
    notes: list[str] = field(default_factory=list)

    def add(self, row: str, column: str, cell: Cell) -> None:
        """Add a value to a cell."""
        self.cells.setdefault((row, column), []).append(cell)


def compare_results(files: Sequence[Path], *, with_published: bool = True) -> Comparison:
    """Return the comparison of results in `files`, with published results of the same protocols.

    Raises:
        UserError: no files, or a file that is not the result of an evaluation.
    """
    if not files:
        raise UserError("compare", "no results given", "give files that `ijepa evaluate` wrote")
    results = {file: read_result(file) for file in files}
    found = Comparison()
    for file, result in results.items():
        if result.kind not in HEADLINE:
            raise UserError(file, f"a {result.kind} cannot be compared", "give files that `ijepa evaluate` wrote")
        for row in result.rows:
            name = _encoder_name(result, row.encoder, file)
            found.rows.setdefault(name, name)
            for metric in (key for key in COMPARED if key in row.metrics):
                column = _column_key(result, metric)
                found.columns.setdefault(column, _column_head(result, metric))
                ci = row.ci if metric == result.headline else None
                found.add(name, column, Cell(100 * row[metric], ci and (100 * ci[0], 100 * ci[1])))
        found.notes += [f"{file.name}: {note}" for note in result.notes]
    if with_published:
        _add_published(found, {(result.kind, result.protocol_name) for result in results.values()})
    return found


def _add_published(found: Comparison, protocols: set[tuple[str, str]]) -> None:
    for entry in published():
        if (entry.kind, entry.protocol) not in protocols:
            continue
        column = json.dumps(["published", entry.kind, entry.protocol, entry.data, entry.figure])
        found.columns[column] = [
            f"{entry.kind} {entry.protocol}",
            entry.data,
            "published",
            METRIC_NAMES[entry.figure],
        ]
        found.notes.append(f"{entry.kind} {entry.protocol}, {entry.data}, published: {entry.source}")
        for name, value in entry.values.items():
            found.rows.setdefault(f"{name} (published)", name)
            found.add(f"{name} (published)", column, Cell(value, published=True))


def _encoder_name(result: EvaluationResult, name: str, file: Path) -> str:
    """Return the name of a row: the encoder, its weights, and the beginning of their hash."""
    label, digest = result.weights.get(name), result.weights_sha256.get(name)
    full = name if label is None else f"{name}: {label}"
    return f"{full} [{digest[:8]}]" if digest else f"{full} ({file.stem})"


def _column_key(result: EvaluationResult, metric: str) -> str:
    """Return what two results must have in common to share a column, as text."""
    values, data = result.to_json(), result.data
    sets = [(data.of(role).fingerprint, data.of(role).n) for role in ("train", "test")]
    protocol = {key: value for key, value in result.protocol.items() if key != "description"}
    # The protocol has only the name of a label map, which may be edited; the hash covers its classes.
    classes = [data.classes, data.labels_sha256]
    key = [result.kind, protocol, values.get("image_size"), result.precision, sets, classes, metric]
    return json.dumps(key, sort_keys=True)


def _column_head(result: EvaluationResult, metric: str) -> list[str]:
    test = result.data.test
    level = [] if result.level is None else [f"level {result.level}"]
    data = Path(test.path or (test.fingerprint or "")[:12]).name
    classes = [f"{len(result.data.classes)} classes"] if result.data.classes else []
    precision = [] if result.precision in (None, "float32") else [str(result.precision)]
    protocol = f"{result.kind} {result.protocol_name}"
    return [protocol, *level, f"{data}, n = {test.n}", *classes, *precision, METRIC_NAMES[metric]]
