"""Evaluation of several encoders by one classification protocol, in the same way for all of them.

Classes are matched by name if both sets have names, else by number. A test class that the train set does not have is
refused, because no answer for it could be right. "Chance" is the share of the most frequent class of the test set,
which a constant answer reaches; in a balanced set that is 1 / classes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.sources.base import Source
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.evaluation.context import EvaluationContext
from ijepa.evaluation.features.extract import Indices, PatchEncoder, device_of, extract
from ijepa.evaluation.features.sampling import choose
from ijepa.evaluation.metrics.accuracy import describe
from ijepa.evaluation.protocols import ImageProtocol
from ijepa.evaluation.results.schema import Data, DataSet, EvaluationResult, ResultRow
from ijepa.utils.environment import versions
from ijepa.utils.errors import UserError

Labels = npt.NDArray[np.int64]
MOST_UNNAMED = 100_000
"""Largest number of classes without names. Heads have a row for each number, so one damaged label must not be 10^9."""


@dataclass(frozen=True)
class Origin:
    """One encoder, both sets, the numbers of the used images in them, and the height and width of its input."""

    encoder: PatchEncoder
    train: Source
    test: Source
    train_used: Indices
    test_used: Indices
    image_size: tuple[int, int]
    ranks: World = SINGLE_PROCESS


@dataclass(frozen=True)
class Split:
    """Input of a method: features (n, L, D) and (m, L, D) float16, classes (n,) and (m,) in [0, classes).

    L is 0 if the method did not ask for features of this set.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    origin: Origin
    """Where the features come from, for methods that compute their own."""

    @property
    def device(self) -> torch.device:
        """Device on which heads are trained: that of the encoder."""
        return device_of(self.origin.encoder) if self.origin else torch.device("cpu")


@dataclass(frozen=True)
class Method:
    """A way to classify images by features."""

    kind: str
    """Kind of the result."""
    evaluate: Callable[[Split], dict[str, Any]]
    """Returns the metrics of one encoder."""
    last: int
    """Number of last blocks whose features it reads; 0 for none."""
    train_features: bool = True
    """Whether it reads features of the train images too."""
    notes: Sequence[str] = ()
    """What a reader of the result should know."""


def compare(
    method: Method,
    encoders: Mapping[str, PatchEncoder],
    train: Source,
    test: Source,
    protocol: ImageProtocol,
    context: EvaluationContext,
) -> EvaluationResult:
    """Evaluate encoders by one method on the same images.

    Args:
        method: computes the row of an encoder.
        encoders: the encoders by the names of their rows.
        train, test: labeled sets.
        protocol: how images are selected and read.
        context: its seed selects images if the protocol does not use all.

    Raises:
        UserError: labels missing, classes that do not match, an empty set, or a size that a patch does not divide.
        RunError: as `features.extract`.
    """
    begun = time.perf_counter()
    train_used, test_used = (
        choose(len(source), len(source) if most is None else most, context.seed)
        for source, most in ((train, protocol.train_images), (test, protocol.test_images))
    )
    train_y, test_y, classes = matched_labels(train, test, train_used, test_used)
    size = common_size(encoders, protocol)
    rows = []
    for name, encoder in encoders.items():
        origin = Origin(encoder, train, test, train_used, test_used, size, context.world)
        train_x, test_x = _features(name, origin, method, protocol, context)
        split = Split(train_x, torch.from_numpy(train_y), test_x, torch.from_numpy(test_y), classes, origin)
        row = ResultRow(encoder=name, **method.evaluate(split))
        context.report(f"{method.kind}: {name}: {100 * row['top1']:.2f} %")
        rows.append(row)
    return EvaluationResult(
        kind=method.kind,
        level=None,
        protocol=protocol.model_dump(mode="json"),
        image_size=size,
        seed=context.seed,
        data=Data(
            train=DataSet(**describe(train, train_y)), test=DataSet(**describe(test, test_y)), classes=train.classes
        ),
        chance=float(np.bincount(test_y).max() / len(test_y)),
        rows=tuple(rows),
        versions=versions(),
        notes=tuple(method.notes),
        seconds=round(time.perf_counter() - begun, 2),
    )


def _features(
    name: str, origin: Origin, method: Method, protocol: ImageProtocol, context: EvaluationContext
) -> list[Tensor]:
    """Return the features of the train and the test images; empty ones where the method reads none."""
    features = []
    for role, source, used in (("train", origin.train, origin.train_used), ("test", origin.test, origin.test_used)):
        if not method.last or (role == "train" and not method.train_features):
            features.append(torch.empty(len(used), 0, 0))
            continue
        found = extract(
            origin.encoder,
            source,
            used,
            image_size=origin.image_size,
            last=method.last,
            cache=context.cache,
            label=f"{method.kind}: {name}, {role}",
            crop_fraction=protocol.crop_fraction,
            interpolation=protocol.interpolation,
            batch_size=protocol.forward_batch,
            progress=context.progress,
            ranks=context.world,
        )
        features.append(found)
    return features


def matched_labels(train: Source, test: Source, train_used: Indices, test_used: Indices) -> tuple[Labels, Labels, int]:
    """Return the classes (n,) and (m,) of the used images in the numbering of the train set, and the number of classes.

    Raises:
        UserError: an empty set, labels missing, the same set twice, or a test class without train images.
    """
    for flag, source in (("--train", train), ("--test", test)):
        if not len(source):
            raise UserError(flag, "has no images")
    train_y = train.require_labels("--train")[train_used].astype(np.int64)
    test_y = test.require_labels("--test")[test_used].astype(np.int64)
    if train.fingerprint == test.fingerprint:
        raise UserError("--test", "is the same as the train set", "give different images")
    count = len(train.classes) if train.classes is not None else int(train_y.max()) + 1
    if train.classes is None and count > MOST_UNNAMED:
        first = train.name(int(train_used[train_y.argmax()]))
        problem = f"label {count - 1} of {first} is too large for a class without a name"
        raise UserError("--train", problem, f"use numbers below {MOST_UNNAMED}, or name the classes in classes.txt")
    known = set(np.unique(train_y).tolist())
    if train.classes is not None and test.classes is not None:
        numbers = {name: number for number, name in enumerate(train.classes)}
        to_train = np.array([numbers.get(name, -1) for name in test.classes], dtype=np.int64)
        missing = [test.classes[label] for label in np.unique(test_y) if int(to_train[label]) not in known]
        test_y = to_train[test_y]
    else:
        missing = [str(label) for label in np.unique(test_y) if int(label) not in known]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        problem = f"{len(missing)} of its classes are not in the train set: {names}"
        raise UserError("--test", problem, "give two sets with the same classes")
    if len(known) < 2:
        raise UserError("--train", "all images have one class", "give at least 2 classes")
    return train_y, test_y, count


def common_size(encoders: Mapping[str, PatchEncoder], protocol: ImageProtocol) -> tuple[int, int]:
    """Return height and width of the input in pixels: those of the protocol, or the native ones of the first encoder.

    Raises:
        UserError: the size is not divisible by the patch of an encoder.
    """
    first = next(iter(encoders.values()))
    native = first.grid[0] * first.patch_size, first.grid[1] * first.patch_size
    size = native if protocol.image_size is None else (protocol.image_size, protocol.image_size)
    for name, encoder in encoders.items():
        if any(side % encoder.patch_size for side in size):
            raise UserError(
                f"protocol {protocol.name}: image size {size[0]} x {size[1]}",
                f"is not divisible by the patches of {name}, {encoder.patch_size} pixels",
                f"set image_size to a multiple of {encoder.patch_size}",
            )
    return size
