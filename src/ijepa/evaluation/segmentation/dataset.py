"""Images with their masks, as the segmentation protocols read them.

The whole image is resized to the protocol's square, the mask to the size it is scored at, by
its nearest pixel: a class index must never be interpolated. Every mask is checked against its image and against the
number of classes as it is read, so that a wrong set ends in one line and not in a wrong number.

Where a label map belongs to a set (its layout is known, or one was named), masks are turned into its class numbers as
they are read; two sets may have two maps, as long as their classes are the same.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.loading.crop import Box, Interpolation, crop_resize
from ijepa.data.loading.decode import DecodeError, decode, decode_mask
from ijepa.data.sources.base import Source
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.features.sampling import Indices, encoded
from ijepa.evaluation.segmentation.label_map import IGNORED, LabelError, LabelMap, load_label_map
from ijepa.utils.errors import RunError, UserError

Labels = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Classes:
    """The classes of a set: `count` of them, 0 the first, their names, and the labels that are not scored.

    `maps` holds the label map of each set by its flag; without one, a mask's values are the classes.
    """

    count: int
    names: tuple[str, ...]
    ignore: tuple[int, ...]
    maps: Mapping[str, LabelMap] = field(default_factory=dict)

    @property
    def scored(self) -> int:
        """How many classes count."""
        return self.count - sum(label < self.count for label in self.ignore)


@dataclass(frozen=True)
class Annotated:
    """Chosen samples of a source at one image size, with masks at one size; `flag` names the set to the user.

    `ranks` are the processes that share their forward passes.
    """

    source: Source
    indices: Indices
    flag: str
    image_size: int
    mask_size: int
    ranks: World = SINGLE_PROCESS
    interpolation: Interpolation = "bilinear"

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int, classes: Classes) -> Iterator[tuple[Tensor, Labels]]:
        """Yield pixels (B, 3, S, S) uint8 and masks (B, M, M), `size` images at a time.

        Raises:
            UserError: a mask of another size than its image, a label out of range, an unreadable mask.
            RunError: an unreadable image.
        """
        for start in range(0, len(self.indices), size):
            chosen = self.indices[start : start + size]
            pixels = torch.empty((len(chosen), 3, self.image_size, self.image_size), dtype=torch.uint8)
            masks = np.empty((len(chosen), self.mask_size, self.mask_size), dtype=np.int64)
            for row, index in enumerate(chosen):
                image, mask = read(self.source, int(index), self.flag, classes)
                check_labels(mask, classes, self.flag, self.source, int(index))
                size_wanted = self.image_size, self.image_size
                pixels[row] = crop_resize(image, Box(0, 0, *mask.shape), size_wanted, self.interpolation)
                masks[row] = nearest_resize(mask, (self.mask_size, self.mask_size))
            yield pixels, masks


def patch_features(
    encoder: Encoder, samples: Annotated, classes: Classes, batch: int
) -> Iterator[tuple[Tensor, Labels]]:
    """Yield patch features (B, N, D) float32 and masks (B, M, M); ranks share it. Raises as `Annotated.batches`."""

    def make(numbers: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        for number in numbers:
            some = replace(samples, indices=samples.indices[number * batch : (number + 1) * batch])
            for pixels, masks in some.batches(batch, classes):
                yield encoded(encoder, pixels), torch.from_numpy(masks)

    for patches, masks in samples.ranks.map_in_turns(-(-len(samples) // batch), make):
        yield patches, masks.numpy()


def read(
    source: Source, index: int, flag: str, classes: Classes
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]:
    """Return image (H, W, 3) and mask (H, W) of a sample. Raises as `Annotated.batches`, naming it."""
    sample = source[index]
    mask = _read_mask(sample.mask, sample.name, flag, classes.maps.get(flag))
    try:
        image = decode(sample.image)
    except DecodeError as error:
        raise RunError(f"{sample.name}: {error}") from error
    if image.shape[:2] != mask.shape:
        (h, w), (mh, mw) = image.shape[:2], mask.shape
        raise UserError(flag, f"{sample.name}: the image has {w} x {h} pixels and its mask {mw} x {mh}")
    return image, mask


def check_labels(mask: npt.NDArray[np.integer], classes: Classes, flag: str, source: Source, index: int) -> None:
    """Refuse a mask with a label that is neither a class nor ignored."""
    if int(mask.max()) < classes.count:
        return
    wrong = np.setdiff1d(np.unique(mask), [*range(classes.count), *classes.ignore])
    if len(wrong):
        raise UserError(
            flag,
            f"{source.name(index)}: label {wrong[0]} in the mask is out of range, classes are 0 to {classes.count - 1}",
            "set the protocol's `classes` or `ignore`",
        )


def nearest_resize(values: npt.NDArray[np.integer], size: tuple[int, int]) -> npt.NDArray[np.integer]:
    """Return values (..., H, W) at another height and width, each the one nearest to the new pixel's centre."""
    if values.shape[-2:] == size:
        return values
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.intp), old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


def find_classes(
    sources: Collection[tuple[Source, str]], count: int | None, ignore: tuple[int, ...], labels: str | None = None
) -> Classes:
    """Return the classes of one or more sets with masks, each beside the flag that names it.

    They are those of the label map `labels` (a name or a file), else of the sets' own label maps. Without one their
    number is `count`, else one more than the named classes of the first set (0 is ground), else what the masks of the
    first set show, all of which are then read: labels from 0 on without a gap. One stray label must not add classes
    in silence, so that a gap is refused, and so is a label in another set that the first lacks.

    Raises:
        UserError: sets whose classes differ, or another number of them than `count`; labels as above, with the mask.
    """
    given = {flag: labels or source.annotation for source, flag in sources}
    maps = {flag: load_label_map(name, "--labels" if labels else flag) for flag, name in given.items() if name}
    if maps:
        return _mapped(maps, [flag for _, flag in sources], count, ignore)
    names = next(iter(sources))[0].classes
    for source, flag in sources:
        if names is not None and source.classes is not None and source.classes != names:
            raise UserError(flag, f"its classes are not those of the other set: {_difference(source.classes, names)}")
    if count is None and names is not None:
        count = len(names) + 1
    if count is None:
        count = _counted(sources, ignore)
    if names is not None and len(names) == count - 1:
        names = ("ground", *names)
    if names is None or len(names) != count:
        names = tuple(map(str, range(count)))
    return Classes(count, names, ignore)


_OWN = "give a set of the same classes, or the label map by --labels"


def _mapped(maps: Mapping[str, LabelMap], flags: list[str], count: int | None, ignore: tuple[int, ...]) -> Classes:
    """Return the classes that label maps give, by flag."""
    first = next(iter(maps.values()))
    for flag in flags:
        if flag not in maps:
            raise UserError(flag, f"has no label map, and the other set is labelled as {first.name}", _OWN)
        if maps[flag].names != first.names:
            problem = f"its classes, labelled as {maps[flag].name}, are not those of {first.name}"
            raise UserError(flag, f"{problem}: {_difference(maps[flag].names, first.names)}", _OWN)
    if count not in (None, len(first.names)):
        raise UserError(f"classes = {count}", f"the label map {first.name} has {len(first.names)}", "drop `classes`")
    if any(label < len(first.names) for label in ignore):  # meant for the masks' values: here it would be a class
        raise UserError(f"ignore = {list(ignore)}", f"the label map {first.name} says what is not scored", "drop it")
    return Classes(len(first.names), first.names, tuple(sorted({*ignore, IGNORED})), maps)


def _counted(sources: Collection[tuple[Source, str]], ignore: tuple[int, ...]) -> int:
    """Return the number of classes that the first set's masks show; the others' labels must be among them."""
    (first, where), *others = sources
    known = _present(first, where, ignore)
    gap = sorted(set(range(max(known))) - known.keys() - set(ignore))
    if gap:
        problem = f"{known[max(known)]}: label {max(known)} in its mask, and {gap[0]}, below it, in none of the set's"
        raise UserError(where, problem, _COUNTED)
    for source, flag in others:
        strange = {label: name for label, name in _present(source, flag, ignore).items() if label not in known}
        if strange:
            label = min(strange)
            raise UserError(flag, f"{strange[label]}: label {label} in its mask is in none of {where}'s", _COUNTED)
    return max(known) + 1


_COUNTED = (
    "if it is a class, say how many there are by the protocol's `classes` or a label map (--labels); else `ignore`"
)


def _present(source: Source, flag: str, ignore: tuple[int, ...]) -> dict[int, str]:
    """Return the labels that occur in a set's masks, all of which are read, each with the first image that has it."""
    found: dict[int, str] = {}
    for index in range(len(source)):
        name = source.name(index)
        for label in np.unique(_read_mask(source.mask(index), name, flag, None)).tolist():
            found.setdefault(label, name)
    scored = {label: name for label, name in found.items() if label not in ignore}
    if not scored:
        raise UserError(flag, "no pixel of its masks is scored", f"all are in ignore = {list(ignore)}")
    return scored


def _difference(names: Collection[str], others: Collection[str]) -> str:
    """Say how the names of one set's classes differ from another's."""
    more, less = ([name for name in a if name not in b] for a, b in ((names, others), (others, names)))
    said = [f"{verb} {_list(some)}" for verb, some in (("has", more), ("lacks", less)) if some]
    return f"it {' and '.join(said)}" if said else "they stand in another order"


def _list(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return shown if len(names) <= 3 else f"{shown}, ... ({len(names)})"


def _read_mask(data: bytes | None, name: str, flag: str, labels: LabelMap | None) -> npt.NDArray[np.integer]:
    if data is None:
        raise UserError(flag, f"{name} has no mask")
    try:
        if labels is None:
            return decode_mask(data)
        return labels.numbers(decode_mask(data, labels.reads))
    except LabelError as error:
        raise UserError(flag, f"{name}: {error}", "give the label map of these masks by --labels") from error
    except DecodeError as error:
        raise UserError(flag, f"the mask of {name}: {error}") from error
