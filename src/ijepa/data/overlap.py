"""Find images that are in two data sets: a model must not be tested on images that it was trained on.

A sample is identified by the place of its bytes: an archive and the position in it, or the path of its file. Links to
whole archives and folders are followed; copies are not detected. Archives are compared first, so that only samples in
shared shards are compared one by one, and two sets of millions of images cost no more than their shards' names.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.base import Source
from ijepa.data.sources.subset import Subset
from ijepa.utils.errors import UserError

Numbers = npt.NDArray[np.int64]

_CHUNK = 1 << 16


def refuse_overlap(train: Source, test: Source) -> None:
    """Check that no image is in both sets. Two sets with the same fingerprint are accepted: they are meant to be one.

    Raises:
        UserError: an image is in both.
    """
    if train.fingerprint == test.fingerprint:
        return
    (train_whole, train_chosen), (test_whole, test_chosen) = _flatten(train), _flatten(test)
    train_archives, test_archives = _archives(train_whole), _archives(test_whole)
    if train_archives and test_archives:
        shared = {path: number for number, path in enumerate(sorted({*train_archives} & {*test_archives}))}
        if not shared:
            return
        test_places = _places(test_whole, test_chosen, test_archives, shared)
        both = _rows_in(test_places, _places(train_whole, train_chosen, train_archives, shared))
    elif not (train_archives or test_archives):
        both = _shared_files(train_whole, train_chosen, test_whole, test_chosen)
    else:
        return
    if len(both):
        first = test.name(int(both[0]))
        problem = f"{len(both)} of its {len(test)} images are in the train set, the first is {first}"
        raise UserError("--test", problem, "give images that are not in --train")


def _flatten(source: Source) -> tuple[Source, Numbers | None]:
    """Return the whole source that a subset was chosen from, and which of its samples were; None for all."""
    if not isinstance(source, Subset):
        return source, None
    whole, chosen = _flatten(source.source)
    return whole, source.chosen if chosen is None else chosen[source.chosen]


def _archives(source: Source) -> list[str]:
    """Return the files that hold many samples each; empty if each sample has a file of its own."""
    header = source.index.header
    root = header.get("root", header.get("folder", ""))
    return [os.path.realpath(Path(root) / name) for name in header.get("shards", header.get("files", []))]


def _places(source: Source, chosen: Numbers | None, archives: list[str], shared: dict[str, int]) -> Numbers:
    """Return a number for each chosen sample that identifies its bytes in any source; -1 outside shared archives."""
    samples = np.arange(len(source)) if chosen is None else chosen
    arrays = source.index.arrays
    if "first" in arrays:  # tar shards
        file = np.searchsorted(arrays["first"], samples, side="right") - 1
        place = arrays["block"][samples].astype(np.int64)
    elif "offset" in arrays:  # CIFAR
        file, place = arrays["file"][samples], arrays["offset"][samples]
    elif "group" in arrays:  # parquet: the row in the file
        ends = arrays["ends"]
        group = np.searchsorted(ends, samples, side="right")
        first_group = group - arrays["group"][group]  # of the same file
        file, place = arrays["file"][group], samples - np.where(first_group > 0, ends[first_group - 1], 0)
    else:  # Arrow: the row in all files together
        file, place = np.zeros(len(samples), dtype=np.int64), samples
    number = np.array([shared.get(path, -1) for path in archives])[file]
    return np.where(number < 0, -1, number << 40 | place)


def _rows_in(places: Numbers, known: Numbers) -> Numbers:
    """Return the rows of `places` whose value is in `known`. Only `places` is sorted: `known` may be much larger."""
    order = np.argsort(places, kind="stable")
    ordered, known = places[order], known[known >= 0]
    at = np.minimum(np.searchsorted(ordered, known), len(ordered) - 1)
    return np.sort(order[np.unique(at[ordered[at] == known])])


def _shared_files(train: Source, train_chosen: Numbers | None, test: Source, test_chosen: Numbers | None) -> Numbers:
    """Return the rows of test samples whose files are also train samples. One root has to be within the other."""
    train_root, test_root = (os.path.realpath(source.index.header["root"]) for source in (train, test))
    above = os.path.commonpath([train_root, test_root])
    if above not in (train_root, test_root):
        return np.empty(0, dtype=np.int64)
    row_of = {path: row for row, path in enumerate(_paths(test, test_chosen, os.path.relpath(test_root, above)))}
    train_paths = _paths(train, train_chosen, os.path.relpath(train_root, above))
    return np.array(sorted(row_of[path] for path in train_paths if path in row_of), dtype=np.int64)


def _paths(source: Source, chosen: Numbers | None, prefix: str) -> Iterator[bytes]:
    """Yield the chosen samples' paths; `prefix` is the path of their root from the common folder."""
    start_of_path = b"" if prefix == "." else os.fsencode(prefix) + b"/"
    text, ends = source.index.arrays["names"], source.index.arrays["ends"]
    samples = np.arange(len(ends)) if chosen is None else chosen
    for start in range(0, len(samples), _CHUNK):  # in chunks, because a list of millions of Python ints is large
        some = samples[start : start + _CHUNK]
        begins = np.where(some > 0, ends[some - 1], 0).tolist()
        for begin, end in zip(begins, ends[some].tolist(), strict=True):
            yield start_of_path + text[begin:end].tobytes()
