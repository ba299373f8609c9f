"""Segmentation data sets in the layouts in which they are downloaded, as pairs of images and masks.

A layout says where images and masks are below the root, what the splits are called there, how the name of a mask
follows from the name of its image, and which label map its values follow (for plain `images/` and `masks/`, the file
`labels.yaml` next to them or in the folder above). A layout is recognized by its folders. The path may be the root, or
the folder of the images of one split (`leftImg8bit/val`), which then is the split to read.

Pascal VOC is different: its splits are lists of names. The `trainaug` masks (SegmentationClassAug) are used only for
images that have no original mask.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ijepa.data.paths import Folder
from ijepa.data.sources.index import Index, build, derived_header, text_arrays
from ijepa.data.split import Split, choose_split
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_errors

LABELS = "labels.yaml"
_CAMVID = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_")
_COCO_SPLITS = {Split.TRAIN: "train2017", Split.VAL: "val2017"}
_VOC_FOLDERS = ("VOCdevkit/VOC2012", "VOC2012")


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps images and masks.

    Attributes:
        labels: the label map; "" for the file `LABELS`.
        images, masks: folders; `{}` stands for the name of the split.
        splits: names of the splits; empty if the data set has no splits.
        renamed: the end of an image's stem, and what replaces it in the mask's.
        named: how names of images begin, if the folders alone do not identify the data set.
        inside: folders that archives of the data set unpack to.
    """

    labels: str
    images: str
    masks: str
    splits: Mapping[Split, str] = field(default_factory=lambda: {split: split.value for split in Split})
    renamed: tuple[str, str] = ("", "")
    named: re.Pattern[str] | None = None
    inside: tuple[str, ...] = ()


_ADE20K_SPLITS = {Split.TRAIN: "training", Split.VAL: "validation"}
LAYOUTS = (
    Layout("ade20k", "images/{}", "annotations/{}", _ADE20K_SPLITS, inside=("ADEChallengeData2016",)),
    Layout("cityscapes", "leftImg8bit/{}", "gtFine/{}", renamed=("_leftImg8bit", "_gtFine_labelIds")),
    Layout("coco-stuff-27", "images/{}", "annotations/{}", _COCO_SPLITS),
    Layout("coco-stuff-27", "images/{}", "stuffthingmaps/{}", _COCO_SPLITS),
    Layout("coco-stuff-27", "{}", "stuffthingmaps/{}", _COCO_SPLITS),
    Layout("coco-stuff-27", "{}", "stuffthingmaps_trainval2017/{}", _COCO_SPLITS),
    Layout("camvid", "{}", "{}annot", named=_CAMVID),
    Layout("camvid", "{}", "{}_labels", renamed=("", "_L"), named=_CAMVID),
    Layout("camvid", "701_StillsRaw_full", "LabeledApproved_full", {}, renamed=("", "_L"), named=_CAMVID),
    Layout("camvid", "images", "masks", {}, named=_CAMVID),
    Layout("", "images/{}", "masks/{}"),
    Layout("", "images", "masks", {}),
)


def find_pairs(path: Path, where: str, split: str | None) -> Index | None:
    """Return the index of a data set in one of `LAYOUTS`, or None if the folder has none of them.

    Raises:
        UserError: the split is not there, several are and none is chosen, or there are no images in it.
    """
    # The order of LAYOUTS matters: the last ones match folders that earlier ones describe better.
    for layout in LAYOUTS:
        found = _locate(layout, path, where, split)
        if found is not None:
            return _pair(layout, *found, where)
    return None


def _locate(layout: Layout, path: Path, where: str, split: str | None) -> tuple[Path, str] | None:
    """Return the root and the name of the split, or None if the folder does not have this layout."""
    for root in (path, *(path / name for name in layout.inside)):
        if not layout.splits:
            if _matches(layout, root, ""):
                return root, ""
            continue
        present = [each for each, name in layout.splits.items() if _matches(layout, root, name)]
        if present:
            return root, layout.splits[choose_split(root, present, where, split, "choose one")]
    # Or the path is the folder of the images itself.
    depth = layout.images.count("/") + 1
    root = path.parents[depth - 1] if len(path.parents) >= depth else path
    for name in layout.splits.values() or ("",):
        if path == root / layout.images.format(name) and _matches(layout, root, name):
            return root, name
    return None


def _matches(layout: Layout, root: Path, split_name: str) -> bool:
    images, masks = (root / part.format(split_name) for part in (layout.images, layout.masks))
    if not (images.is_dir() and masks.is_dir()):
        return False
    if not layout.labels and not layout.splits and _label_file(root) is None:
        return False  # without a label map, `paths.find_files` handles images/ and masks/
    if layout.named is None:
        return True
    with os.scandir(images) as entries:  # one file is enough
        first = next((entry.name for entry in entries if not entry.name.startswith(".")), "")
    return layout.named.match(first) is not None


def _label_file(root: Path) -> Path | None:
    return next((file for file in (root / LABELS, root.parent / LABELS) if file.is_file()), None)


def _pair(layout: Layout, root: Path, split_name: str, where: str) -> Index:
    """Return the index of the images of a split, each with the mask whose name follows from its own."""
    images, masks = root / layout.images.format(split_name), root / layout.masks.format(split_name)
    image_index, mask_index = build(Folder(images), where), build(Folder(masks), where)
    names = image_index.texts("names")
    mask_of = {_stem(name): name for name in mask_index.texts("names") if name.lower().endswith(".png")}
    old, new = layout.renamed
    matching = [
        mask_of.get(_stem(name).removesuffix(old) + new, "") if _stem(name).endswith(old) else "" for name in names
    ]
    if not any(matching):
        example = f"{_stem(names[0]).removesuffix(old)}{new}.png"
        raise UserError(
            where,
            f"{masks} contains no mask of the images in {images}",
            f"a mask would be named {example}, for example",
        )
    file = None if layout.labels else _label_file(root)
    label_text = "" if file is None else file.read_text(encoding="utf-8", errors="replace")
    labels = layout.labels or (str(file) if file else None)
    return _index(images, masks, names, matching, labels, [image_index, mask_index, layout.labels, label_text])


def voc_index(root: Path, where: str, split: str | None) -> Index:
    """Return the index of a Pascal VOC tree: the list of a split, or all images with a mask if `split` is None.

    Raises:
        UserError: there is no such list, it is empty, or it names images that are missing.
    """
    images, masks = build(Folder(root / "JPEGImages"), where), dict[str, str]()
    made_of: list[Index | str] = [images, split or ""]
    for kind in ("SegmentationClassAug", "SegmentationClass"):  # the original masks last, so that they win
        if (root / kind).is_dir():
            index = build(Folder(root / kind), where)
            made_of.append(index)
            masks.update({_stem(name): f"{kind}/{name}" for name in index.texts("names")})
    files = {_stem(name): name for name in images.texts("names")}
    if split is None:
        names = [stem for stem in files if stem in masks]
    else:
        file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        with read_errors(where, file):
            names = file.read_text(encoding="utf-8").split()
        made_of.extend(names)
    if not names:
        raise UserError(
            where, f"{root} contains no images of the split" if split else f"{root} contains no masks of its images"
        )
    missing = [name for name in names if name not in files]
    if missing:
        problem = f"{len(missing)} of {len(names)} images are missing, the first is {missing[0]}"
        raise UserError(where, f"{root}: {problem}")
    paths = [f"JPEGImages/{files[name]}" for name in names]
    return _index(root, root, paths, [masks.get(name, "") for name in names], "voc", made_of)


def voc_root(path: Path) -> Path | None:
    """Return the folder of a Pascal VOC tree at `path` or below it, or None."""
    for root in (path, *(path / name for name in _VOC_FOLDERS)):
        if all((root / name).is_dir() for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")):
            return root
    return None


def _stem(name: str) -> str:
    """Return a relative path without its suffix."""
    return name.rpartition(".")[0]


def _index(
    images: Path,
    masks: Path,
    names: Sequence[str],
    matching: Sequence[str],
    labels: str | None,
    made_of: Sequence[Index | str],
) -> Index:
    header = {"root": str(images), "masks": str(masks), "classes": None, "annotation": labels}
    arrays = text_arrays("names", names) | text_arrays("mask_names", matching)
    return Index({**header, **derived_header(*made_of)}, arrays)
