"""Results of evaluations as tables of text."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ijepa.evaluation.results.compare import Cell, Comparison
from ijepa.evaluation.results.schema import EvaluationResult

_WIDTH = 110
"""Width of a table in characters."""


def result_table(result: EvaluationResult) -> str:
    """Return a result as text: metrics in percent, IoU by class if there is any, chance level, notes."""
    keys = list(result.rows[0].metrics)
    level = "" if result.level is None else f", level {result.level}"
    precision = "" if result.precision is None else f", {result.precision}"
    table = _table(f"{result.kind}, protocol {result.protocol_name}{level}{precision}", "encoder", keys)
    for row in result.rows:
        table.add_row(row.encoder, *(f"{100 * row[key]:.2f}" for key in keys))
    text = _render(table, _WIDTH)
    if any(row.per_class for row in result.rows):
        text += _render(_class_table(result), _WIDTH)
    if result.chance is not None:
        text += f"chance: {100 * result.chance:.2f}\n"
    return text + "".join(f"note: {note}\n" for note in result.notes)


def comparison_table(comparison: Comparison) -> str:
    """Return a comparison as text, followed by notes and sources."""
    title = "Evaluations, in percent; compare values of the same column only"
    table = _table(title, "encoder", [])
    for head in comparison.columns.values():
        table.add_column(Text("\n".join(head)), justify="right")
    for key, name in comparison.rows.items():
        cells = (comparison.cells.get((key, column), []) for column in comparison.columns)
        table.add_row(Text(name), *("\n".join(map(_cell, values)) or "-" for values in cells))
    text = _render(table, max(_WIDTH, 30 + 24 * len(comparison.columns)))
    return text + "".join(f"{note}\n" for note in comparison.notes)


def _cell(cell: Cell) -> str:
    if cell.published:
        return f"{cell.percent:.1f}"
    return f"{cell.percent:.2f}" + (f" ({cell.ci[0]:.1f} to {cell.ci[1]:.1f})" if cell.ci else "")


def _class_table(result: EvaluationResult) -> Table:
    """Return IoU by class, with a column for each encoder; a class that does not occur has none."""
    table = _table("IoU by class", "class", [row.encoder for row in result.rows])
    for number, name in enumerate(result.data.classes or ()):
        values = [row.per_class[number] if row.per_class else None for row in result.rows]
        table.add_row(name, *("-" if value is None else f"{100 * value:.2f}" for value in values))
    return table


def _table(title: str, first: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _render(table: Table, width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
