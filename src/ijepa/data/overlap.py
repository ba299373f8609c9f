"""Images that are in two sets at once: what a set is tested on must not be what was trained on or looked up.

A sample is told by where its bytes lie: the archive and the place in it, or the file's path. Links to whole archives
and folders are followed; copies are not seen. Archives are compared first, so that two sets of millions cost what
their shards' names do, and only samples in shared shards are looked at one by one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.base import Source
from ijepa.data.sources.subset import Listed
from ijepa.utils.errors import UserError

Numbers = npt.NDArray[np.int64]

_TURN = 1 << 16


def refuse_overlap(train: Source, test: Source) -> None:
    """Check that no image is in both sets; of two that are the same throughout, fingerprints tell.

    Raises:
        UserError: an image is in both.
    """
    if train.fingerprint == test.fingerprint:
        return
    (whole, chosen), (other, asked) = _whole(train), _whole(test)
    ours, theirs = _archives(whole), _archives(other)
    if ours and theirs:
        shared = {path: number for number, path in enumerate(sorted({*ours} & {*theirs}))}
        if not shared:
            return
        places, known = _places(other, asked, theirs, shared), _places(whole, chosen, ours, shared)
        both = _among(places, known)
    elif not (ours or theirs):
        both = _same_files(whole, chosen, other, asked)
    else:
        return
    if len(both):
        first = test.name(int(both[0]))
        problem = f"{len(both)} of its {len(test)} images are in the train set, the first is {first}"
        raise UserError("--test", problem, "give images that are not in --train")


def _whole(source: Source) -> tuple[Source, Numbers | None]:
    """Return the source that a part was chosen from, and which of its samples were; None for all."""
    if not isinstance(source, Listed):
        return source, None
    whole, chosen = _whole(source.source)
    return whole, source.chosen if chosen is None else chosen[source.chosen]


def _archives(source: Source) -> list[str]:
    """Return the files that hold a source's samples, many in one; empty where each has a file of its own."""
    header = source.index.header
    root = header.get("root", header.get("folder", ""))
    return [os.path.realpath(Path(root) / name) for name in header.get("shards", header.get("files", []))]


def _places(source: Source, chosen: Numbers | None, archives: list[str], shared: dict[str, int]) -> Numbers:
    """Return a number for the place of each chosen sample, the same in every source; -1 outside of shared archives."""
    numbers = np.array([shared.get(path, -1) for path in archives])
    samples = np.arange(len(source)) if chosen is None else chosen
    arrays = source.index.arrays
    if "first" in arrays:
        file = np.searchsorted(arrays["first"], samples, side="right") - 1
        place = arrays["block"][samples].astype(np.int64)
    elif "offset" in arrays:
        file, place = arrays["file"][samples], arrays["offset"][samples]
    elif "group" in arrays:  # rows of row groups, a file's groups one after another
        ends = arrays["ends"]
        group = np.searchsorted(ends, samples, side="right")
        before = group - arrays["group"][group]  # each file's first group
        file, place = arrays["file"][group], samples - np.where(before > 0, ends[before - 1], 0)
    else:  # rows of several files in one
        file, place = np.zeros(len(samples), dtype=np.int64), samples
    return np.where(numbers[file] < 0, -1, numbers[file] << 40 | place)


def _among(asked: Numbers, known: Numbers) -> Numbers:
    """Return the rows of `asked` whose place is among those `known`, by one pass over these: they may be many more."""
    order = np.argsort(asked, kind="stable")
    ordered, known = asked[order], known[known >= 0]
    at = np.minimum(np.searchsorted(ordered, known), len(ordered) - 1)
    return np.sort(order[np.unique(at[ordered[at] == known])])


def _same_files(train: Source, chosen: Numbers | None, test: Source, asked: Numbers | None) -> Numbers:
    """Return which of the samples asked for are files of the other source; only folders within one another share."""
    ours, theirs = (os.path.realpath(source.index.header["root"]) for source in (train, test))
    above = os.path.commonpath([ours, theirs])
    if above not in (ours, theirs):
        return np.empty(0, dtype=np.int64)
    tested = {path: row for row, path in enumerate(_paths(test, asked, os.path.relpath(theirs, above)))}
    known = _paths(train, chosen, os.path.relpath(ours, above))
    return np.array(sorted(tested[path] for path in known if path in tested), dtype=np.int64)


def _paths(source: Source, chosen: Numbers | None, below: str) -> Iterator[bytes]:
    """Yield the chosen samples' paths from a folder above, their root being `below` it."""
    arrays, prefix = source.index.arrays, b"" if below == "." else os.fsencode(below) + b"/"
    text, ends = arrays["names"], arrays["ends"]
    samples = np.arange(len(ends)) if chosen is None else chosen
    for start in range(0, len(samples), _TURN):  # in turns: a list of all would be Python objects by the million
        some = samples[start : start + _TURN]
        begins = np.where(some > 0, ends[some - 1], 0).tolist()
        for begin, end in zip(begins, ends[some].tolist(), strict=True):
            yield prefix + text[begin:end].tobytes()
