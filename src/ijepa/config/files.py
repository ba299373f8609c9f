"""Recipes as files: presets by name, YAML on a `base`, and dotted keys laid over both. Nothing is validated here."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ijepa.utils.errors import UserError, did_you_mean


def presets() -> list[str]:
    """Return the presets' names."""
    folder = resources.files("ijepa.config") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_layers(name_or_path: str, *, seen: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """Read a recipe's YAML, its `base` first, unvalidated: (values, what to call it in errors)."""
    if name_or_path in seen:
        raise UserError(name_or_path, "is its own base")
    if name_or_path in presets():
        file, where = resources.files("ijepa.config") / "recipes" / f"{name_or_path}.yaml", f"recipe {name_or_path}"
        text = file.read_text()
    else:
        path = Path(name_or_path)
        if path.is_dir() and (path / "recipe.yaml").is_file():
            path = path / "recipe.yaml"
        where = str(path)
        if not path.is_file():
            hint = did_you_mean(name_or_path, presets()) + ", or a YAML file's path"
            raise UserError(f"recipe {name_or_path}", "no preset or file of that name", hint)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(where, "is no text", "give a preset's name or a YAML file") from None
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(where, f"not YAML: {error}", "fix the line named") from None
    if not isinstance(values, dict):
        raise UserError(where, "not a mapping of keys to values", "see `ijepa pretrain --help` for the keys")
    base = values.pop("base", None)
    if base is not None:
        under, _ = read_layers(str(base), seen=(*seen, name_or_path))
        _merge(under, values)
        values = under
    return values, where


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


def set_by_path(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the value at a path of keys, in place."""
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = inner = inner if isinstance(inner, dict) else {}
        values = inner
    values[path[-1]] = value
