"""YAML files that build on one another: presets by name, files by path, and the key `base` with either.

Recipes, evaluation protocols and label maps are read here. Only the form is checked: a file holds keys and values. The
typed classes validate them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ijepa.utils.errors import UserError, did_you_mean

RECIPES = "config/recipes"
"""Folder of the recipe presets."""


@dataclass(frozen=True)
class YamlFile:
    """The content of a YAML file.

    Attributes:
        values: the file's keys and values over those of its base; without the key `base`.
        own: the file's own keys and values alone; without the key `base`.
        base: preset or file that the file builds on; None if it builds on nothing.
        where: what error messages call the file.
    """

    values: dict[str, Any]
    own: dict[str, Any]
    base: str | None
    where: str


def preset_names(folder: str) -> list[str]:
    """Return the sorted names of the presets in `folder`, a path inside the package such as `config/recipes`."""
    files = resources.files("ijepa").joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_yaml(name_or_path: str | Path, folder: str, kind: str, *, _seen: tuple[str, ...] = ()) -> YamlFile:
    """Read a preset or a YAML file, over its `base` if it names one.

    Mappings are merged key by key, at every depth; any other value replaces that of the base.

    Args:
        name_or_path: name of a preset, else path of a YAML file, or of a folder that holds KIND.yaml (a run).
        folder: folder of the presets, as in `preset_names`.
        kind: what error messages call such a file: "recipe", "linear protocol", "label map".

    Raises:
        UserError: no such preset or file, no YAML mapping, or a file that is its own base.
    """
    name = str(name_or_path)
    if name in _seen:
        raise UserError(name, "its `base` leads back to the file itself", "remove one `base` of the cycle")
    where, text = _read(name, folder, kind)
    try:
        own = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(where, f"not YAML: {error}", "fix the line that the message names") from None
    if not isinstance(own, dict):
        raise UserError(where, "not a mapping of keys to values", f"see the presets in ijepa/{folder}")
    base = own.pop("base", None)
    if base is None:
        return YamlFile(own, own, None, where)
    below = read_yaml(str(base), folder, kind, _seen=(*_seen, name))
    return YamlFile(_merge(below.values, own), own, str(base), where)


def _read(name: str, folder: str, kind: str) -> tuple[str, str]:
    """Return what error messages call a preset or file, and its text."""
    presets = preset_names(folder)
    if name in presets:
        return f"{kind} {name}", resources.files("ijepa").joinpath(folder, f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if (path / f"{kind}.yaml").is_file():
        path = path / f"{kind}.yaml"
    if not path.is_file():
        hint = "give a preset or the path of a YAML file; " + did_you_mean(name, presets)
        raise UserError(f"{kind} {name}", "no preset or file has this name", hint)
    try:
        return str(path), path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(path, "not a text file", "give the name of a preset or a YAML file") from None


def _merge(below: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **over}
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = _merge(below[key], value)
    return merged


def set_by_path(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the value at a path of keys, in place; missing levels are created."""
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = inner = inner if isinstance(inner, dict) else {}
        values = inner
    values[path[-1]] = value
