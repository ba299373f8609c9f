"""Label maps: what the values of a mask mean, by YAML.

Data sets store classes as they like: ids with gaps, ids that only together are a class, colours. A label map says which
values make up each class; classes are numbered from 0 in the order they stand in, so that all of evaluation sees
numbers without gaps. What is not scored becomes `IGNORED`. A value that the map does not speak of is an error: it
means that masks and map do not belong together, and would else be a quiet loss of pixels.

    name: street
    classes:
      road: 7                       # one id of an index or palette PNG
      vehicle: [26-28, 31]          # a group; ranges include both ends
      plant: ["#6b8e23", "#98fb98"] # colours of RGB masks
    ignore: [0-6, 255]              # or `rest`: all that no class names
    colours: {road: "#804080"}      # how pictures show classes; if not given, by the first colour among their values

Presets stand in `labels/`.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BeforeValidator, Field, model_validator

from ijepa.data.loading.decode import MaskColors
from ijepa.utils.config import BaseConfig
from ijepa.utils.errors import UserError, did_you_mean

IGNORED = 255
"""The number of what is not scored."""

_IDS = 2**16
_UNKNOWN = -1


class LabelError(ValueError):
    """A mask's value that the map does not speak of; `str()` says which."""


def _values(value: Any) -> Any:
    """Read ids, `first-last` and `#rrggbb`, one or a list, as ids (int) and colours (#rrggbb in lower case)."""
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
            raise ValueError(f"{item!r} is no id, no range such as 3-7 and no colour such as '#80c000'")
    return tuple(found)


Rgb = tuple[int, int, int]

Values = Annotated[tuple[int | str, ...], BeforeValidator(_values)]


class LabelMap(BaseConfig):
    """Which values of a mask make up which class."""

    name: str
    """What results call it."""
    description: str = ""
    """Where it comes from."""
    classes: dict[str, Values] = Field(min_length=2, max_length=IGNORED)
    """The values of each class, numbered in their order."""
    ignore: Annotated[tuple[int | str, ...] | Literal["rest"], BeforeValidator(_values)] = (IGNORED,)
    """Values that are not scored; `rest` is every value that no class names."""

    colours: dict[str, Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")]] = Field(default_factory=dict)
    """How pictures show classes, by their names; they decide nothing else."""

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        strange = next((name for name in self.colours if name not in self.classes), None)
        if strange is not None:
            raise UserError(f"colours: {strange}", "is no class", did_you_mean(strange, self.classes))
        meaning: dict[int | str, str] = {}
        listed = () if self.ignore == "rest" else self.ignore
        for name, values in [*self.classes.items(), ("ignore", listed)]:
            for value in values:
                if meaning.setdefault(value, name) != name:
                    raise UserError("classes", f"{value} stands for {meaning[value]} and for {name}", "give it to one")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, by number."""
        return tuple(self.classes)

    @property
    def palette(self) -> tuple[Rgb, ...]:
        """The colour of every class, by number; empty where one has none."""
        shown = []
        for name, values in self.classes.items():
            code = self.colours.get(name, next((value for value in values if isinstance(value, str)), None))
            if code is None:
                return ()
            shown.append((int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)))
        return tuple(shown)

    @property
    def sha256(self) -> str:
        """SHA-256 of what decides class numbers: classes in their order, and what is not scored."""
        return hashlib.sha256(json.dumps([list(self.classes.items()), self.ignore]).encode()).hexdigest()

    @property
    def reads(self) -> MaskColors:
        """How masks are to be decoded: as colours alone where the map has no ids."""
        values = [value for group in self.classes.values() for value in group]
        if all(isinstance(value, str) for value in values):
            return "only"
        return "accept" if any(isinstance(value, str) for value in values) else "refuse"

    def numbers(self, values: npt.NDArray[np.integer]) -> npt.NDArray[np.int16]:
        """Return class numbers (H, W) of a mask of ids (H, W) or colours (H, W, 3), `IGNORED` where not scored.

        Raises:
            LabelError: a value that is neither a class's nor ignored.
        """
        if values.ndim == 2:
            found = self._by_id[values]
        else:
            red, green, blue = (values[..., channel].astype(np.int32) for channel in range(3))
            codes, numbers = self._by_colour
            colours = red << 16 | green << 8 | blue
            place = np.minimum(np.searchsorted(codes, colours), len(codes) - 1)
            found = np.where(codes[place] == colours, numbers[place], self._other)
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
    def _by_colour(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]:
        pairs = sorted(
            (int(value[1:], 16), number) for value, number in self._meaning.items() if isinstance(value, str)
        )
        codes, numbers = zip(*pairs, strict=True)
        return np.array(codes, dtype=np.int32), np.array(numbers, dtype=np.int16)


def label_maps() -> list[str]:
    """Return the names of the presets."""
    folder = resources.files("ijepa.evaluation") / "labels"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_label_map(name_or_path: str, where: str = "--labels") -> LabelMap:
    """Return a label map: a preset by its name, or a YAML file. `where` names who asked for it.

    Raises:
        UserError: no such preset or file, unknown keys, values of another kind, one value with two meanings.
    """
    if name_or_path in label_maps():
        file: Any = resources.files("ijepa.evaluation") / "labels" / f"{name_or_path}.yaml"
    elif Path(name_or_path).suffix in (".yaml", ".yml"):
        file = Path(name_or_path)
    else:
        raise UserError(where, f"no label map {name_or_path!r}", did_you_mean(name_or_path, label_maps()))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(where, f"{name_or_path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(where, f"{name_or_path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(where, f"{name_or_path} holds no keys and values", f"presets are {', '.join(label_maps())}")
    return LabelMap.read(values, name_or_path)
