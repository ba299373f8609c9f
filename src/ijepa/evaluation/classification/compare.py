"""What the protocols on whole images share: one question asked of several encoders, one form of answer.

Classes are matched by name where both sets name theirs, else by number, and a test class that the train set does not
hold is refused: it could only ever be wrong. "Chance" is the share of the test set's commonest class, what a constant
answer may reach; in a balanced set that is 1 / classes.

A result is a dictionary, ready for JSON and the same in every run but for `seconds`:

    kind, level, protocol     what was done; `level` is None for protocols that train heads on labels or let them vote
    image_size, seed          height and width in pixels of what encoders saw; the seed of what was drawn
    data.train, data.test     `n`, `classes` (how many occur), `fingerprint`; data.classes: names, or None
    chance                    as above, a share like all accuracies
    rows                      one an encoder: `encoder`, `top1`, `top5`, `ci` [low, high], and the method's own
    versions, notes, seconds  what numbers may depend on; what a reader should know; the time it took
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.sources.base import Source
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.evaluation.features.extract import Encoder, Indices, Progress, device_of, extract
from ijepa.evaluation.features.sampling import choose
from ijepa.evaluation.metrics.accuracy import describe
from ijepa.evaluation.protocols import ImageProtocol
from ijepa.utils.environment import versions
from ijepa.utils.errors import UserError

Labels = npt.NDArray[np.int64]
MOST_UNNAMED = 100_000
"""Classes that a set may have without naming them: one damaged label must not make a table of a billion columns."""


@dataclass(frozen=True)
class Origin:
    """One encoder, both sets, the used images' numbers in them, and height and width at which they are seen."""

    encoder: Encoder
    train: Source
    test: Source
    train_used: Indices
    test_used: Indices
    image_size: tuple[int, int]
    ranks: World = SINGLE_PROCESS


@dataclass(frozen=True)
class Split:
    """What a method gets to see: features (n, L, D) and (m, L, D) float16, classes (n,) and (m,) in [0, classes).

    L is 0 for methods that want none made beforehand, as some do of the train images alone.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    origin: Origin
    """Where the features come from, for methods that make more of them."""

    @property
    def device(self) -> torch.device:
        """Where heads on these features are trained: beside the encoder."""
        return device_of(self.origin.encoder) if self.origin else torch.device("cpu")


def compare(
    kind: str,
    encoders: Mapping[str, Encoder],
    train: Source,
    test: Source,
    protocol: ImageProtocol,
    method: Callable[[Split], dict[str, Any]],
    *,
    last: int,
    train_features: bool = True,
    seed: int,
    cache: Path | None,
    progress: Progress | None,
    notes: Sequence[str] = (),
    ranks: World = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Return the result of one protocol: a row for every encoder, made by `method` from its features.

    Args:
        kind: what the result calls itself.
        encoders: by the name that their row shall have.
        train, test: labelled sets.
        protocol: see `protocol`.
        method: from features and classes to the row.
        last: blocks whose features it wants, 0 for none.
        train_features: whether it wants those of the train images, too.
        seed: chooses images, where the protocol does not take all.
        cache: folder of cached features.
        progress: told a line now and then.
        notes: what a reader of the result should know.
        ranks: the processes that share the work.

    Raises:
        UserError: labels missing, classes that do not match, an empty set, a size that a patch does not divide.
        RunError: as `features.extract`.
    """
    begun = time.perf_counter()
    used = {
        flag: choose(len(source), len(source) if most is None else most, seed)
        for flag, source, most in (("train", train, protocol.train_images), ("test", test, protocol.test_images))
    }
    train_y, test_y, classes = matched_labels(train, test, used["train"], used["test"])
    size = common_size(encoders, protocol)
    rows = []
    for name, encoder in encoders.items():
        train_x, test_x = (
            extract(
                encoder,
                source,
                used[role],
                image_size=size,
                last=last,
                cache=cache,
                label=f"{kind}: {name}, {role}",
                crop_fraction=protocol.crop_fraction,
                interpolation=protocol.interpolation,
                batch_size=protocol.forward_batch,
                progress=progress,
                ranks=ranks,
            ).x
            if last and (train_features or role == "test")
            else torch.empty(len(used[role]), 0, 0)
            for role, source in (("train", train), ("test", test))
        )
        origin = Origin(encoder, train, test, used["train"], used["test"], size, ranks)
        split = Split(train_x, torch.from_numpy(train_y), test_x, torch.from_numpy(test_y), classes, origin)
        rows.append({"encoder": name, **method(split)})
        if progress is not None:
            progress(f"{kind}: {name}: {100 * rows[-1]['top1']:.2f} %")
    return {
        "kind": kind,
        "level": None,
        "protocol": protocol.model_dump(mode="json"),
        "image_size": list(size),
        "seed": seed,
        "data": {
            "train": describe(train, train_y),
            "test": describe(test, test_y),
            "classes": None if train.classes is None else list(train.classes),
        },
        "chance": float(np.bincount(test_y).max() / len(test_y)),
        "rows": rows,
        "versions": versions(),
        "notes": list(notes),
        "seconds": round(time.perf_counter() - begun, 2),
    }


def matched_labels(train: Source, test: Source, train_used: Indices, test_used: Indices) -> tuple[Labels, Labels, int]:
    """Return the used images' classes (n,) and (m,) by the train set's numbers, and how many numbers there are.

    Raises:
        UserError: an empty set, labels missing, the same set twice, or a test class that the train images lack.
    """
    for flag, source in (("--train", train), ("--test", test)):
        if not len(source):
            raise UserError(flag, "holds no images")
    train_y = train.require_labels("--train")[train_used].astype(np.int64)
    test_y = test.require_labels("--test")[test_used].astype(np.int64)
    if train.fingerprint == test.fingerprint:
        raise UserError("--test", "is the train set", "give images that are not trained on")
    count = len(train.classes) if train.classes is not None else int(train_y.max()) + 1
    if train.classes is None and count > MOST_UNNAMED:  # heads and votes have a column for every number
        first = train.name(int(train_used[train_y.argmax()]))
        problem = f"label {count - 1} of {first} is too large for a class without a name"
        raise UserError("--train", problem, f"number classes below {MOST_UNNAMED}, or name each in classes.txt")
    known = set(np.unique(train_y).tolist())
    if train.classes is not None and test.classes is not None:
        numbers = {name: number for number, name in enumerate(train.classes)}
        to_train = np.array([numbers.get(name, -1) for name in test.classes], dtype=np.int64)
        strange = [test.classes[label] for label in np.unique(test_y) if int(to_train[label]) not in known]
        test_y = to_train[test_y]
    else:
        strange = [str(label) for label in np.unique(test_y) if int(label) not in known]
    if strange:
        shown = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        raise UserError(
            "--test",
            f"{len(strange)} of its classes are not in the train set: {shown}",
            "give two sets of the same classes",
        )
    if len(known) < 2:
        raise UserError("--train", "all images are of one class", "give at least 2 classes")
    return train_y, test_y, count


def common_size(encoders: Mapping[str, Encoder], protocol: ImageProtocol) -> tuple[int, int]:
    """Return height and width in pixels at which all encoders see the images: the protocol's, else the first's native.

    Raises:
        UserError: an encoder's patch does not divide it.
    """
    first = next(iter(encoders.values()))
    native = first.grid[0] * first.patch_size, first.grid[1] * first.patch_size
    size = native if protocol.image_size is None else (protocol.image_size, protocol.image_size)
    for name, encoder in encoders.items():
        if any(side % encoder.patch_size for side in size):
            raise UserError(
                f"protocol {protocol.name}: image size {size[0]} x {size[1]}",
                f"the patches of {name}, {encoder.patch_size} pixels, do not divide it",
                f"give an image_size that is a multiple of {encoder.patch_size}",
            )
    return size
