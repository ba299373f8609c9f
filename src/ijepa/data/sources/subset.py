"""A part of a data set, given by a file of names: ImageNet's 1 % and 10 % subsets, Pascal VOC's trainaug.

A line names an image by its path, from the data's root or from above it, or by the end of its path
(`n01440764_10026.JPEG`), with or without suffix; more words on the line and a leading slash are passed over. The
samples stay in the set's own order, so that the order of a list decides nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.base import Source
from ijepa.data.sources.index import SUFFIXES, Index, derived
from ijepa.utils.errors import UserError


class Listed(Source):
    """Chosen samples of another source, as a source of its own."""

    def __init__(self, source: Source, chosen: npt.NDArray[np.int64]) -> None:
        self.source, self.chosen = source, chosen
        self.index, self.classes, self.annotation = source.index, source.classes, source.annotation
        self.labels = None if source.labels is None else source.labels[chosen]
        part = Index({"fingerprint": source.fingerprint, "stamp": source.stamp}, {})
        marks = derived(part, *map(str, chosen.tolist()))
        self.fingerprint, self.stamp = marks["fingerprint"], marks["stamp"]

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "chosen": self.chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["chosen"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def has_masks(self) -> bool:
        """Whether any sample of the whole set has a mask."""
        return self.source.has_masks

    def _name(self, index: int) -> str:
        return self.source.name(int(self.chosen[index]))

    def _image(self, index: int) -> bytes:
        return self.source.image(int(self.chosen[index]))

    def _mask(self, index: int) -> bytes | None:
        return self.source.mask(int(self.chosen[index]))

    def _without_mask(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.chosen, self.source._without_mask()))


def select(source: Source, file: Path, where: str) -> Listed:
    """Return the samples that a file of names lists; `where` is the flag that gave it.

    Raises:
        UserError: the file cannot be read or is empty, a line names no image, or one names several.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(where, f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(where, f"{file} is no list of names: {error}") from error
    wanted: dict[str, int] = {}
    longer: dict[str, int] = {}  # ends of the lines: a list may begin above the root
    for number, line in enumerate(lines):
        for name in (line, line.split()[0]) if line else ():
            wanted.setdefault(_plain(name), number)
            for tail in _tails(_plain(name)):
                longer.setdefault(tail, number)
    if not wanted:
        raise UserError(where, f"{file} names no image")
    found: dict[int, int] = {}
    chosen = []
    for index in range(len(source)):
        name = _plain(source.name(index))
        line_of = next((wanted[tail] for tail in _tails(name) if tail in wanted), longer.get(name))
        if line_of is None:
            continue
        if line_of in found:
            both = f"{source.name(found[line_of])} and {source.name(index)}"
            raise UserError(where, f"{file}, line {line_of + 1}: {lines[line_of]} is {both}", "give more of the path")
        found[line_of] = index
        chosen.append(index)
    missing = sorted(set(wanted.values()) - found.keys())
    if missing:
        problem = f"{len(missing)} of its lines name no image of the set, the first is line {missing[0] + 1}"
        raise UserError(where, f"{file}: {problem}: {lines[missing[0]]}")
    return Listed(source, np.array(chosen, dtype=np.int64))


def _plain(name: str) -> str:
    """Return a name without leading slash and without the suffix of an image."""
    name = name.removeprefix("./").lstrip("/")
    stem, _, suffix = name.rpartition(".")
    return stem if suffix.lower() in SUFFIXES else name


def _tails(name: str) -> Sequence[str]:
    """Return a path, and what is left of it without its first folders."""
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
