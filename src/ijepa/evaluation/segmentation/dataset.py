"""Images with their masks, as the segmentation protocols read them.

The whole image is resized to the square of the protocol. The mask is resized to the size at which it is scored, by the
nearest pixel, because class numbers must not be interpolated. Every mask is checked against its image and the number of
classes when it is read, so that a wrong set ends in an error and not in a wrong number.

If a set has a label map (its layout is known, or the user gave one), the values of its masks are converted to class
numbers when they are read. Two sets may have different maps if their classes are the same.
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
from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.sampling import Indices, encoded
from ijepa.evaluation.segmentation.label_map import IGNORED, LabelError, LabelMap, load_label_map
from ijepa.utils.errors import RunError, UserError

Labels = npt.NDArray[np.integer]

_SAME_CLASSES = "give a set with the same classes, or a label map by --labels"
_STRAY_LABEL = (
    "if it is a class, set `classes` in the protocol or use a label map (--labels); if not, add it to `ignore`"
)


@dataclass(frozen=True)
class Classes:
    """The classes 0 to `count` - 1 of a set, their names, and the labels that are not scored.

    `maps` has the label map of each set by its flag; without one, the values of a mask are the classes.
    """

    count: int
    names: tuple[str, ...]
    ignore: tuple[int, ...]
    maps: Mapping[str, LabelMap] = field(default_factory=dict)

    @property
    def scored(self) -> int:
        """Number of classes that are scored."""
        return self.count - sum(label < self.count for label in self.ignore)


@dataclass(frozen=True)
class SegmentationDataset:
    """Selected samples of a source at one image size, with masks at one size.

    `flag` is the option by which the user gave the set; `world` are the processes that share the forward passes.
    """

    source: Source
    indices: Indices
    flag: str
    classes: Classes
    image_size: int
    mask_size: int
    interpolation: Interpolation = "bilinear"
    world: World = SINGLE_PROCESS

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, rows: Indices | npt.NDArray[np.bool_]) -> "SegmentationDataset":
        """Return the set of some of these samples, by their places or as a mask (n,)."""
        return replace(self, indices=self.indices[rows])

    def read(self, index: int) -> tuple[npt.NDArray[np.uint8], Labels]:
        """Return image (H, W, 3) and mask (H, W) of a sample of the source.

        Raises:
            UserError: a mask of another size than its image, a label out of range, or an unreadable mask.
            RunError: an unreadable image.
        """
        sample = self.source[index]
        mask = _read_mask(sample.mask, sample.name, self.flag, self.classes.maps.get(self.flag))
        try:
            image = decode(sample.image)
        except DecodeError as error:
            raise RunError(f"{sample.name}: {error}") from error
        if image.shape[:2] != mask.shape:
            (h, w), (mh, mw) = image.shape[:2], mask.shape
            raise UserError(self.flag, f"{sample.name}: the image has {w} x {h} pixels, but its mask has {mw} x {mh}")
        self._check_labels(mask, sample.name)
        return image, mask

    def batches(self, size: int) -> Iterator[tuple[Tensor, Labels]]:
        """Yield pixels (B, 3, S, S) uint8 and masks (B, M, M) of `size` images at a time. Raises as `read`."""
        for start in range(0, len(self.indices), size):
            chosen = self.indices[start : start + size]
            pixels = torch.empty((len(chosen), 3, self.image_size, self.image_size), dtype=torch.uint8)
            masks = np.empty((len(chosen), self.mask_size, self.mask_size), dtype=np.int64)
            for row, index in enumerate(chosen):
                image, mask = self.read(int(index))
                square = self.image_size, self.image_size
                pixels[row] = crop_resize(image, Box(0, 0, *mask.shape), square, self.interpolation)
                masks[row] = nearest_resize(mask, (self.mask_size, self.mask_size))
            yield pixels, masks

    def patch_features(self, encoder: PatchEncoder, batch: int) -> Iterator[tuple[Tensor, Labels]]:
        """Yield patch features (B, N, D) float32 and masks (B, M, M) on every process, in order. Raises as `read`."""

        def compute(numbers: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
            for number in numbers:
                rows = np.arange(len(self))[number * batch : (number + 1) * batch]
                for pixels, masks in self.select(rows).batches(batch):
                    yield encoded(encoder, pixels), torch.from_numpy(masks)

        for patches, masks in self.world.map_in_turns(-(-len(self) // batch), compute):
            yield patches, masks.numpy()

    def _check_labels(self, mask: Labels, name: str) -> None:
        """Refuse a mask with a label that is neither a class nor ignored."""
        classes = self.classes
        if int(mask.max()) < classes.count:
            return
        wrong = np.setdiff1d(np.unique(mask), [*range(classes.count), *classes.ignore])
        if len(wrong):
            problem = f"{name}: label {wrong[0]} in the mask is out of range, classes are 0 to {classes.count - 1}"
            raise UserError(self.flag, problem, "set the protocol's `classes` or `ignore`")


def nearest_resize(values: Labels, size: tuple[int, int]) -> Labels:
    """Return values (..., H, W) at another height and width: at each pixel's center, the value of the nearest pixel."""
    if values.shape[-2:] == size:
        return values
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.intp), old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


def find_classes(
    sources: Mapping[str, Source], count: int | None, ignore: tuple[int, ...], labels: str | None = None
) -> Classes:
    """Return the classes of one or more sets with masks.

    They come from the label map `labels`, or from the sets' own label maps. Without one, their number is `count`, or
    one more than the named classes of the first set (0 is the ground), or it is counted: then all masks are read, and
    the labels of the first set must be 0, 1, ... without a gap, and those of the other sets among them. So one stray
    label is refused and does not add classes.

    Args:
        sources: the sets by their flags.
        count: number of classes that the protocol states.
        ignore: labels that are not scored.
        labels: name or file of a label map.

    Raises:
        UserError: sets whose classes differ, or whose number is not `count`; a stray label, with its mask.
    """
    given = {flag: labels or source.annotation for flag, source in sources.items()}
    maps = {flag: load_label_map(name) for flag, name in given.items() if name}
    if maps:
        return _mapped_classes(maps, list(sources), count, ignore)
    names = next(iter(sources.values())).classes
    for flag, source in sources.items():
        if names is not None and source.classes is not None and source.classes != names:
            problem = f"its classes differ from those of the other set: {_difference(source.classes, names)}"
            raise UserError(flag, problem)
    if count is None:
        count = _count_classes(sources, ignore) if names is None else len(names) + 1
    if names is not None and len(names) == count - 1:
        names = ("ground", *names)
    if names is None or len(names) != count:
        names = tuple(map(str, range(count)))
    return Classes(count, names, ignore)


def _mapped_classes(
    maps: Mapping[str, LabelMap], flags: list[str], count: int | None, ignore: tuple[int, ...]
) -> Classes:
    """Return the classes that label maps give."""
    first = next(iter(maps.values()))
    for flag in flags:
        if flag not in maps:
            problem = f"has no label map, but the other set has the label map {first.name}"
            raise UserError(flag, problem, _SAME_CLASSES)
        if maps[flag].names != first.names:
            problem = f"the classes of its label map {maps[flag].name} differ from those of {first.name}"
            raise UserError(flag, f"{problem}: {_difference(maps[flag].names, first.names)}", _SAME_CLASSES)
    if count not in (None, len(first.names)):
        problem = f"the label map {first.name} has {len(first.names)} classes"
        raise UserError(f"classes = {count}", problem, "remove `classes`")
    if any(label < len(first.names) for label in ignore):
        # The user means values of the masks, but here they would be class numbers.
        problem = f"the label map {first.name} has its own list of labels that are not scored"
        raise UserError(f"ignore = {list(ignore)}", problem, "remove it")
    return Classes(len(first.names), first.names, tuple(sorted({*ignore, IGNORED})), maps)


def _count_classes(sources: Mapping[str, Source], ignore: tuple[int, ...]) -> int:
    """Return the number of classes in the masks of the first set."""
    (first, source), *others = sources.items()
    known = _labels_in_masks(source, first, ignore)
    gap = sorted(set(range(max(known))) - known.keys() - set(ignore))
    if gap:
        problem = f"{known[max(known)]}: its mask has label {max(known)}, but no mask of the set has label {gap[0]}"
        raise UserError(first, problem, _STRAY_LABEL)
    for flag, other in others:
        found = _labels_in_masks(other, flag, ignore)
        stray = min(found.keys() - known.keys(), default=None)
        if stray is not None:
            raise UserError(
                flag, f"{found[stray]}: its mask has label {stray}, but no mask of {first} has it", _STRAY_LABEL
            )
    return max(known) + 1


def _labels_in_masks(source: Source, flag: str, ignore: tuple[int, ...]) -> dict[int, str]:
    """Return the scored labels in all masks of a set, each with the first image that has it."""
    found: dict[int, str] = {}
    for index in range(len(source)):
        name = source.name(index)
        for label in np.unique(_read_mask(source.mask(index), name, flag, None)).tolist():
            found.setdefault(label, name)
    scored = {label: name for label, name in found.items() if label not in ignore}
    if not scored:
        raise UserError(flag, "no pixel of its masks is scored", f"all labels are in ignore = {list(ignore)}")
    return scored


def _difference(names: Collection[str], others: Collection[str]) -> str:
    """Describe how the class names of one set differ from those of another."""
    more, less = ([name for name in a if name not in b] for a, b in ((names, others), (others, names)))
    parts = [f"{verb} {_list(some)}" for verb, some in (("has", more), ("lacks", less)) if some]
    return f"it {' and '.join(parts)}" if parts else "they have a different order"


def _list(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return shown if len(names) <= 3 else f"{shown}, ... ({len(names)})"


def _read_mask(data: bytes | None, name: str, flag: str, labels: LabelMap | None) -> Labels:
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
