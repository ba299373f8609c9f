"""The resolved recipe, and the facts in run.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ijepa.report.formatting import format_value
from ijepa.report.run_data import RunData


@dataclass(frozen=True)
class RecipeSection:
    """The recipe as YAML, and the facts of run.json; None if there is no run.json."""

    recipe: str
    facts: dict[str, str] | None


def recipe_section(run: RunData) -> RecipeSection:
    """Return the recipe and the facts of a run."""
    facts = None if run.info is None else _flat({key: value for key, value in run.info.items() if key != "command"})
    return RecipeSection(run.files.recipe_file.read_text(encoding="utf-8"), facts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values by dotted name, as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[prefix + key] = ", ".join(map(str, value))
        else:
            flat[prefix + key] = "none" if value is None else format_value(value)
    return flat
