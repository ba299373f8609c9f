"""Many results in one table, the published figures beside them, and never two protocols in one column.

A column is one figure of one protocol on one pair of sets: results share it where kind, every setting of the protocol,
image size, precision, the sets' fingerprints, their classes and what their label maps hold are the same. Two files of a
protocol's name whose settings differ have two columns. Published figures (`published.yaml`, a source for each) have
columns of their own, headed by their data: no result here can prove that it was made as they were.

A row is an encoder, told apart by its weights' hash where the result has it. A figure that occurs twice in a cell, as
of two seeds, is shown twice.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ijepa.evaluation.protocols import KINDS
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json

FIGURES = {
    "top1": "top-1",
    "miou": "mIoU",
    "miou_overclustered": "mIoU, overclustered",
    "corloc": "CorLoc",
    "jf": "J&F",
}
"""Keys of rows that are compared, by what the table calls them."""


@dataclass(frozen=True)
class Published:
    """Figures in per cent that a source reports, by encoder."""

    kind: str
    protocol: str
    data: str
    figure: str
    source: str
    values: dict[str, float]


@cache
def published() -> tuple[Published, ...]:
    """Return the published figures that stand beside results."""
    text = (resources.files("ijepa.evaluation") / "published.yaml").read_text(encoding="utf-8")
    return tuple(Published(**entry) for entry in yaml.safe_load(text))


def read_result(file: Path) -> dict[str, Any]:
    """Return a result that can be compared.

    Raises:
        UserError: the file is missing, no JSON, or no result of an evaluation.
    """
    values = read_json(file)
    rows, data = values.get("rows"), values.get("data")
    known = values.get("kind") in KINDS and isinstance(values.get("protocol"), dict) and isinstance(data, dict)
    if not known or not isinstance(rows, list) or not all(isinstance(row, dict) and "encoder" in row for row in rows):
        raise UserError(file, "is no result of an evaluation", "give files that `ijepa evaluate` wrote")
    return values


def compare_results(files: Sequence[Path], *, beside: bool = True, width: int | None = None) -> str:
    """Return one table of the results in `files`, as text; `beside` adds published figures of the same protocols.

    Raises:
        UserError: no files, or one that is no result.
    """
    if not files:
        raise UserError("compare", "no results given", "give files that `ijepa evaluate` wrote")
    results = {file: read_result(file) for file in files}
    columns: dict[str, list[str]] = {}
    cells: dict[tuple[str, str], list[str]] = {}
    rows: dict[str, str] = {}
    for file, result in results.items():
        for row in result["rows"]:
            name = _encoder(result, row["encoder"], file)
            rows.setdefault(name, name)
            for figure in (key for key in FIGURES if isinstance(row.get(key), float)):
                column = _column(result, figure)
                columns.setdefault(column, _head(result, figure))
                cells.setdefault((name, column), []).append(_shown(row, figure))
    sources = []
    kinds = {(result["kind"], result["protocol"].get("name")) for result in results.values()}
    for entry in published() if beside else ():
        if (entry.kind, entry.protocol) not in kinds:
            continue
        column = json.dumps(["published", entry.kind, entry.protocol, entry.data, entry.figure])
        columns[column] = [f"{entry.kind} {entry.protocol}", entry.data, "published", FIGURES[entry.figure]]
        sources.append(f"{entry.kind} {entry.protocol}, {entry.data}, published: {entry.source}")
        for name, value in entry.values.items():
            rows.setdefault(f"{name} (published)", name)
            cells[f"{name} (published)", column] = [f"{value:.1f}"]
    shown = Table(title="Evaluations, in per cent; compare down a column, not across", title_justify="left")
    shown.add_column("encoder")
    for head in columns.values():
        shown.add_column(Text("\n".join(head)), justify="right")
    for name in rows:
        shown.add_row(Text(name), *("\n".join(cells.get((name, column), ["-"])) for column in columns))
    console = Console(width=width or max(110, 30 + 24 * len(columns)), force_terminal=False)
    with console.capture() as captured:
        console.print(shown)
    notes = [f"{file.name}: {note}" for file, result in results.items() for note in result.get("notes", [])]
    return captured.get() + "".join(f"{line}\n" for line in (*notes, *sources))


def _encoder(result: dict[str, Any], name: str, file: Path) -> str:
    """Return what a row is called: the encoder, its weights, and the beginning of their hash."""
    label = result.get("weights", {}).get(name)
    digest = result.get("weights_sha256", {}).get(name)
    told = name if label is None else f"{name}: {label}"
    return f"{told} [{digest[:8]}]" if digest else f"{told} ({file.stem})"


def _column(result: dict[str, Any], figure: str) -> str:
    data = result["data"]
    sets = [data.get(role, {}).get("fingerprint") for role in ("train", "test")]
    counts = [data.get(role, {}).get("n") for role in ("train", "test")]
    classes = [data.get("classes"), data.get("labels_sha256")]  # of a label map the protocol has the name alone
    protocol = {key: value for key, value in result["protocol"].items() if key != "description"}
    key = [result["kind"], protocol, result.get("image_size"), result.get("precision"), sets, counts, classes, figure]
    return json.dumps(key, sort_keys=True)


def _head(result: dict[str, Any], figure: str) -> list[str]:
    test = result["data"].get("test", {})
    level = [] if result.get("level") is None else [f"level {result['level']}"]
    where = Path(str(test.get("path") or test.get("fingerprint", "")[:12])).name
    protocol = f"{result['kind']} {result['protocol'].get('name')}"
    classes = result["data"].get("classes")
    counted = [f"{len(classes)} classes"] if classes else []
    precision = [] if result.get("precision", "float32") == "float32" else [result["precision"]]
    return [protocol, *level, f"{where}, n = {test.get('n')}", *counted, *precision, FIGURES[figure]]


def _shown(row: dict[str, Any], figure: str) -> str:
    text = f"{100 * row[figure]:.2f}"
    if figure in ("top1", "miou", "jf") and "ci" in row:
        low, high = row["ci"]
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return text
