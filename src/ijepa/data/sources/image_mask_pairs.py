"""Data sets for segmentation in the layouts they are downloaded in, as images and masks in pairs.

A layout is a line of a table: where images and masks lie below the root, what splits are called there, how a mask's
name follows from its image's, and which label map its values follow (for plain `images/` and `masks/`, the file
`labels.yaml` beside them or a folder above). A layout is recognised by its folders alone. The path may be the root, or
the images' folder of one split (`leftImg8bit/val`), which chooses the split by itself.

Pascal VOC is the exception: its splits are lists of names. `trainaug` masks (SegmentationClassAug) serve those images
only that the original masks do not cover.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ijepa.data.paths import Folder
from ijepa.data.sources.index import Arrays, Index, build, derived, text_item
from ijepa.utils.errors import UserError

LABELS = "labels.yaml"
SPLITS = ("train", "val", "test")
_CAMVID = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_")
_2017 = {"train": "train2017", "val": "val2017"}


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps images and masks: `{}` stands for what a split is called.

    `renamed` is what replaces the end of an image's stem in its mask's; `named` is what image names begin with, where
    folders alone do not tell. `inside` are folders that archives of the set unpack to.
    """

    labels: str
    images: str
    masks: str
    splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    renamed: tuple[str, str] = ("", "")
    named: re.Pattern[str] | None = None
    inside: tuple[str, ...] = ()


LAYOUTS = (
    Layout(
        "ade20k",
        "images/{}",
        "annotations/{}",
        {"train": "training", "val": "validation"},
        inside=("ADEChallengeData2016",),
    ),
    Layout("cityscapes", "leftImg8bit/{}", "gtFine/{}", renamed=("_leftImg8bit", "_gtFine_labelIds")),
    Layout("coco-stuff-27", "images/{}", "annotations/{}", _2017),
    Layout("coco-stuff-27", "images/{}", "stuffthingmaps/{}", _2017),
    Layout("coco-stuff-27", "{}", "stuffthingmaps/{}", _2017),
    Layout("coco-stuff-27", "{}", "stuffthingmaps_trainval2017/{}", _2017),
    Layout("camvid", "{}", "{}annot", named=_CAMVID),
    Layout("camvid", "{}", "{}_labels", renamed=("", "_L"), named=_CAMVID),
    Layout("camvid", "701_StillsRaw_full", "LabeledApproved_full", {}, renamed=("", "_L"), named=_CAMVID),
    Layout("camvid", "images", "masks", {}, named=_CAMVID),
    Layout("", "images/{}", "masks/{}"),
    Layout("", "images", "masks", {}),
)
_VOC = ("VOCdevkit/VOC2012", "VOC2012")


def find_pairs(path: Path, where: str, split: str | None) -> Index | None:
    """Return the index of a data set in one of `LAYOUTS`, None where the folder is in none of them.

    Raises:
        UserError: a split that is not there, several and none chosen, or no images in it.
    """
    for layout in LAYOUTS:
        found = _place(layout, path, where, split)
        if found is not None:
            root, called = found
            return _pairs(layout, root, root / layout.images.format(called), root / layout.masks.format(called), where)
    return None


def _place(layout: Layout, path: Path, where: str, split: str | None) -> tuple[Path, str] | None:
    """Return the root and what the split is called there, None where this is not the layout."""
    for root in (path, *(path / name for name in layout.inside)):
        if not layout.splits:
            if _is_one(layout, root, ""):
                return root, ""
            continue
        there = {name: called for name, called in layout.splits.items() if _is_one(layout, root, called)}
        if there:
            return root, _chosen(there, root, where, split)
    for called in layout.splits.values() or ("",):
        depth = layout.images.count("/") + 1
        root = path.parents[depth - 1] if len(path.parents) >= depth else path
        if path == root / layout.images.format(called) and _is_one(layout, root, called):
            return root, called
    return None


def _is_one(layout: Layout, root: Path, called: str) -> bool:
    images, masks = (root / part.format(called) for part in (layout.images, layout.masks))
    if not (images.is_dir() and masks.is_dir()):
        return False
    if not layout.labels and not layout.splits and _label_file(root) is None:
        return False  # without a label map, this is `listing`'s
    if layout.named is None:
        return True
    with os.scandir(images) as entries:  # one name that is not a hidden file's tells
        first = next((entry.name for entry in entries if not entry.name.startswith(".")), "")
    return layout.named.match(first) is not None


def _label_file(root: Path) -> Path | None:
    return next((file for file in (root / LABELS, root.parent / LABELS) if file.is_file()), None)


def _chosen(there: dict[str, str], root: Path, where: str, split: str | None) -> str:
    wanted = next((name for name in SPLITS if split is not None and split.startswith(name)), split)
    if wanted is not None and wanted in there:
        return there[wanted]
    if wanted is not None:
        raise UserError(where, f"{root} holds no {wanted}, only {', '.join(there)}")
    if len(there) > 1:
        raise UserError(where, f"{root} holds several splits: {', '.join(there)}", "choose one")
    return next(iter(there.values()))


def _pairs(layout: Layout, root: Path, images: Path, masks: Path, where: str) -> Index:
    one, other = build(Folder(images), where), build(Folder(masks), where)
    names = _items(one)
    masked = {name.rpartition(".")[0]: name for name in _items(other) if name.lower().endswith(".png")}
    old, new = layout.renamed
    stems = (name.rpartition(".")[0] for name in names)
    matching = [masked.get(stem[: len(stem) - len(old)] + new, "") if stem.endswith(old) else "" for stem in stems]
    if not any(matching):
        example = f"{names[0].rpartition('.')[0].removesuffix(old)}{new}.png"
        raise UserError(where, f"{masks} holds no mask of the images in {images}", f"{example} would be one")
    file = None if layout.labels else _label_file(root)
    written = "" if file is None else file.read_text(encoding="utf-8", errors="replace")
    labels = layout.labels or (str(file) if file else None)
    return _index(images, masks, names, matching, labels, [one, other, layout.labels, written])


def voc_index(root: Path, where: str, split: str | None) -> Index:
    """Return the index of a Pascal VOC tree: a split's list, or all that has a mask where none is asked for.

    Raises:
        UserError: no such list, or names in it that are no images.
    """
    images, masks = build(Folder(root / "JPEGImages"), where), dict[str, str]()
    kinds = [name for name in ("SegmentationClassAug", "SegmentationClass") if (root / name).is_dir()]
    made_of: list[Index | str] = [images, split or ""]
    for kind in kinds:  # the original masks last, so that they win
        index = build(Folder(root / kind), where)
        made_of.append(index)
        masks.update({name.rpartition(".")[0]: f"{kind}/{name}" for name in _items(index)})
    files = {name.rpartition(".")[0]: name for name in _items(images)}
    if split is None:
        names = [stem for stem in files if stem in masks]
    else:
        file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        try:
            names = file.read_text(encoding="utf-8").split()
        except OSError as error:
            raise UserError(where, f"{file} cannot be read: {error.strerror}") from error
        made_of.extend(names)
    missing = [name for name in names if name not in files]
    if missing or not names:
        problem = (
            f"{len(missing)} of {len(names)} images are missing, the first is {missing[0]}" if missing else "empty"
        )
        raise UserError(where, f"{root}: {problem}")
    matching = [masks.get(name, "") for name in names]
    return _index(root, root, [f"JPEGImages/{files[name]}" for name in names], matching, "voc", made_of)


def voc_root(path: Path) -> Path | None:
    """Return the folder of a Pascal VOC tree, None where there is none."""
    for root in (path, *(path / name for name in _VOC)):
        if all((root / name).is_dir() for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")):
            return root
    return None


def _items(index: Index) -> list[str]:
    return [text_item(index.arrays, "names", "ends", i) for i in range(len(index.arrays["ends"]))]


def _index(
    images: Path,
    masks: Path,
    names: Sequence[str],
    matching: Sequence[str],
    labels: str | None,
    made_of: Sequence[Index | str],
) -> Index:
    arrays: Arrays = {}
    arrays["names"], arrays["ends"] = text_array(names)
    arrays["mask_names"], arrays["mask_ends"] = text_array(matching)
    header = {
        "root": str(images),
        "masks": str(masks),
        "classes": None,
        "annotation": labels,
        **derived(*made_of),
    }
    return Index(header, arrays)


def text_array(items: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return items as one text array of an `Index`: bytes, and the ends of the items in them."""
    encoded = [os.fsencode(item) for item in items]
    ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends
