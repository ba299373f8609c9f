"""Label maps: the meaning of the values of a mask, as YAML.

Data sets store classes in different ways: ids with gaps, several ids for one class, colors. A label map states which
values belong to each class. Classes are numbered from 0 in the order of the file, so that the evaluation sees numbers
without gaps. Values that are not scored become `IGNORED`. A value that the map does not have is an error: then mask and
map do not belong together, and without the error pixels would be lost silently.

    name: street
    classes:
      road: 7                       # one id of an index or palette PNG
      vehicle: [26-28, 31]          # several ids; ranges include both ends
      plant: ["#6b8e23", "#98fb98"] # colors of RGB masks
    ignore: [0-6, 255]              # or `rest`: all values that are in no class
    colors: {road: "#804080"}      # colors in figures; default: the first color among the values of a class

Presets are in `labels/`.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from ijepa.config.files import preset_names, read_yaml
from ijepa.data.loading.decode import MaskColors
from ijepa.utils.config import BaseConfig
from ijepa.utils.errors import UserError, did_you_mean

FOLDER = "evaluation/labels"
"""Folder of the presets."""

IGNORED = 255
"""Class number of pixels that are not scored."""

_IDS = 2**16
_UNKNOWN = -1


class LabelError(ValueError):
    """A value of a mask that the map does not have; `str()` names it."""


def _values(value: Any) -> Any:
    """Read ids, `first-last` and `#rrggbb`, one or a list, as ids (int) and colors (#rrggbb in lower case)."""
    if value == "rest":
        return value
    found: list[int | str] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        text = str(item).strip().lower()
        first, dash, last = text.partition("-")
        if text.startswith("#") and len(text) == 7 and not set(text[1:]) - set("0123456789abcdef"):
            found.append(text)
        elif first.isdigit() and (last.isdigit() or not dash) and int(first) <= int(last or first) < _IDS:
            found.extend(range(int(first), int(last or first) + 1))
        else:
            raise ValueError(f"{item!r} is not an id, a range such as 3-7, or a color such as '#80c000'")
    return tuple(found)


Rgb = tuple[int, int, int]

Values = Annotated[tuple[int | str, ...], BeforeValidator(_values)]


class LabelMap(BaseConfig):
    """The values of a mask that belong to each class."""

    name: str
    """Name of the label map in results."""
    description: str = ""
    """Source of the label map."""
    classes: dict[str, Values] = Field(min_length=2, max_length=IGNORED)
    """Values of each class. Classes are numbered in this order."""
    ignore: Annotated[tuple[int | str, ...] | Literal["rest"], BeforeValidator(_values)] = (IGNORED,)
    """Values that are not scored; rest: all values that are in no class."""

    colors: dict[str, Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")]] = Field(default_factory=dict)
    """Colors of classes in figures, by their names."""

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        strange = next((name for name in self.colors if name not in self.classes), None)
        if strange is not None:
            raise UserError(f"colors: {strange}", "is not a class", did_you_mean(strange, self.classes))
        meaning: dict[int | str, str] = {}
        listed = () if self.ignore == "rest" else self.ignore
        for name, values in [*self.classes.items(), ("ignore", listed)]:
            for value in values:
                if meaning.setdefault(value, name) != name:
                    raise UserError(
                        "classes", f"{value} is in both {meaning[value]} and {name}", "remove it from one of them"
                    )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, by number."""
        return tuple(self.classes)

    @property
    def palette(self) -> tuple[Rgb, ...]:
        """RGB color of each class by number; empty if one has none."""
        colors = []
        for name, values in self.classes.items():
            code = self.colors.get(name, next((value for value in values if isinstance(value, str)), None))
            if code is None:
                return ()
            colors.append((int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)))
        return tuple(colors)

    @property
    def sha256(self) -> str:
        """SHA-256 of what determines class numbers: classes in their order, and what is not scored."""
        return hashlib.sha256(json.dumps([list(self.classes.items()), self.ignore]).encode()).hexdigest()

    @property
    def reads(self) -> MaskColors:
        """How to decode masks: as colors only if the map has no ids."""
        values = [value for group in self.classes.values() for value in group]
        if all(isinstance(value, str) for value in values):
            return "only"
        return "accept" if any(isinstance(value, str) for value in values) else "refuse"

    def numbers(self, values: npt.NDArray[np.integer]) -> npt.NDArray[np.int16]:
        """Return class numbers (H, W) of a mask of ids (H, W) or colors (H, W, 3); `IGNORED` where not scored.

        Raises:
            LabelError: a value that is neither in a class nor ignored.
        """
        if values.ndim == 2:
            found = self._by_id[values]
        else:
            red, green, blue = (values[..., channel].astype(np.int32) for channel in range(3))
            codes, numbers = self._by_color
            colors = red << 16 | green << 8 | blue
            place = np.minimum(np.searchsorted(codes, colors), len(codes) - 1)
            found = np.where(codes[place] == colors, numbers[place], self._other)
        if int(found.min()) == _UNKNOWN:
            first = values[found == _UNKNOWN][0]
            shown = str(first) if values.ndim == 2 else "#{:02x}{:02x}{:02x}".format(*first)
            raise LabelError(f"label {shown} in the mask is neither a class nor ignored in the label map {self.name}")
        return found

    @property
    def _other(self) -> int:
        return IGNORED if self.ignore == "rest" else _UNKNOWN

    @cached_property
    def _meaning(self) -> Mapping[int | str, int]:
        meaning = {value: number for number, group in enumerate(self.classes.values()) for value in group}
        return meaning if self.ignore == "rest" else {**meaning, **dict.fromkeys(self.ignore, IGNORED)}

    @cached_property
    def _by_id(self) -> npt.NDArray[np.int16]:
        table = np.full(_IDS, self._other, dtype=np.int16)
        for value, number in self._meaning.items():
            if isinstance(value, int):
                table[value] = number
        return table

    @cached_property
    def _by_color(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]:
        pairs = sorted(
            (int(value[1:], 16), number) for value, number in self._meaning.items() if isinstance(value, str)
        )
        codes, numbers = zip(*pairs, strict=True)
        return np.array(codes, dtype=np.int32), np.array(numbers, dtype=np.int16)


def label_maps() -> list[str]:
    """Return the names of the presets."""
    return preset_names(FOLDER)


def load_label_map(name_or_path: str) -> LabelMap:
    """Return a label map: a preset by its name, or a YAML file.

    Raises:
        UserError: no such preset or file, unknown keys, invalid values, or a value with two meanings.
    """
    file = read_yaml(name_or_path, FOLDER, "label map")
    return LabelMap.read(file.values, file.where)
