"""Values of other libraries' `config.json`, each of the kind that it must be."""

from pathlib import Path
from typing import Any

from ijepa.utils.errors import UserError


def whole(values: dict[str, Any], key: str, default: int | None, where: Path) -> int | None:
    """Return a number that counts something; `default` where the file does not say.

    Raises:
        UserError: it is nothing of the kind.
    """
    value = values.get(key, default)
    if value is default:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(where, f"{key} = {value!r}", "a whole number above 0 was expected")
    return value


def size(values: dict[str, Any], key: str, default: int | None, where: Path) -> tuple[int, int] | None:
    """Return height and width in pixels, of one number or two; `default` where the file does not say.

    Raises:
        UserError: it is nothing of the kind.
    """
    value = values.get(key, default)
    if value is None:
        return None
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        raise UserError(where, f"{key} = {value!r}", "one number of pixels, or height and width, was expected")
    return int(sides[0]), int(sides[1])


def table(values: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    """Return a group of values; an empty one where the file has none.

    Raises:
        UserError: it is nothing of the kind.
    """
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(where, f"{key} = {value!r}", "an object was expected")
    return value
