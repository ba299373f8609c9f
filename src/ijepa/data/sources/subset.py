"""A part of a data set, chosen by a file of names, such as ImageNet's 1 % and 10 % subsets or Pascal VOC's trainaug.

A line names an image by its path, relative to the root of the data or to a folder above it, or by the end of its path
(`n01440764_10026.JPEG`), with or without suffix. Further words on the line and a leading slash are ignored. The samples
keep the order of the data set, so the order of the lines does not matter.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.base import Source
from ijepa.data.sources.index import SUFFIXES, Index, derived_header
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_errors


class Subset(Source):
    """Chosen samples of another source."""

    def __init__(self, source: Source, chosen: npt.NDArray[np.int64]) -> None:
        self.source, self.chosen = source, chosen
        self.index, self.classes, self.annotation = source.index, source.classes, source.annotation
        self.labels = None if source.labels is None else source.labels[chosen]
        whole = Index({"fingerprint": source.fingerprint, "stamp": source.stamp}, {})
        hashes = derived_header(whole, *map(str, chosen.tolist()))
        self.fingerprint, self.stamp = hashes["fingerprint"], hashes["stamp"]

    def __reduce__(self) -> tuple[Any, ...]:
        return Subset, (self.source, self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def has_masks(self) -> bool:
        """Whether any sample of the whole data set has a mask."""
        return self.source.has_masks

    def without_mask(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return np.flatnonzero(np.isin(self.chosen, self.source.without_mask()))

    def _name(self, index: int) -> str:
        return self.source.name(int(self.chosen[index]))

    def _image(self, index: int) -> bytes:
        return self.source.image(int(self.chosen[index]))

    def _mask(self, index: int) -> bytes | None:
        return self.source.mask(int(self.chosen[index]))


def select(source: Source, file: Path, where: str) -> Subset:
    """Return the samples that a file of names lists; `where` is the flag of the file.

    Raises:
        UserError: the file cannot be read or is empty, a line names no image, or a line names several.
    """
    try:
        with read_errors(where, file):
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(where, f"{file} is not a list of names: {error}") from error
    wanted: dict[str, int] = {}  # a name, and its line
    ends: dict[str, int] = {}  # the end of a line's path, because the path may begin above the root
    for number, line in enumerate(lines):
        for name in (line, line.split()[0]) if line else ():  # a name may contain spaces
            wanted.setdefault(_plain(name), number)
            for end in _path_ends(_plain(name)):
                ends.setdefault(end, number)
    if not wanted:
        raise UserError(where, f"{file} lists no images")
    sample_of: dict[int, int] = {}  # by line
    for index in range(len(source)):
        name = _plain(source.name(index))
        line_number = next((wanted[end] for end in _path_ends(name) if end in wanted), ends.get(name))
        if line_number is None:
            continue
        if line_number in sample_of:
            both = f"both {source.name(sample_of[line_number])} and {source.name(index)}"
            problem = f"{file}, line {line_number + 1}: {lines[line_number]} names {both}"
            raise UserError(where, problem, "write more of the path")
        sample_of[line_number] = index
    missing = sorted(set(wanted.values()) - sample_of.keys())
    if missing:
        problem = f"{len(missing)} lines do not match an image of the data set, the first is line {missing[0] + 1}"
        raise UserError(where, f"{file}: {problem}: {lines[missing[0]]}")
    return Subset(source, np.array(list(sample_of.values()), dtype=np.int64))


def _plain(name: str) -> str:
    """Return a name without a leading slash and without the suffix of an image."""
    name = name.removeprefix("./").lstrip("/")
    stem, _, suffix = name.rpartition(".")
    return stem if suffix.lower() in SUFFIXES else name


def _path_ends(name: str) -> list[str]:
    """Return a path, then the path without its first folder, and so on: ["a/b/c", "b/c", "c"]."""
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
