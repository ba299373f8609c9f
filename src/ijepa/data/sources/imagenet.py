"""ImageNet-1K and Tiny-ImageNet as they are downloaded, unless that is a tree of class folders.

The training images are one tar of a thousand class tars, read in place (`nested_tar`). The validation images, in a tar
or a flat folder, come without classes: their names are numbers. The development kit lists the class number of each
image, and the WordNet id of each class number; the training classes are named by WordNet ids. Kaggle's edition has a
table instead. If the usual script (valprep) has moved the images into class folders, none of this is needed.

Tiny-ImageNet's `val` is a folder of images next to `val_annotations.txt`.
"""

import csv
import io
import lzma
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ijepa.data.paths import Folder, Shards
from ijepa.data.sources.base import FolderSource, Source, TarSource
from ijepa.data.sources.index import Index, build, with_labels
from ijepa.data.sources.nested_tar import first_name, nested_index
from ijepa.data.split import Split
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_errors

_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_TARS = {Split.TRAIN: "ILSVRC2012_img_train.tar", Split.VAL: "ILSVRC2012_img_val.tar"}
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE_TABLE = "LOC_val_solution.csv"
_TINY_ANNOTATIONS = "val_annotations.txt"
_HINT = "give --devkit ILSVRC2012_devkit_t12 (folder or .tar.gz) or LOC_val_solution.csv, or put it next to the images"


@dataclass(frozen=True)
class GroundTruth:
    """WordNet ids of the classes, sorted, and the class of validation image 1, 2, ..., as a place in `classes`."""

    classes: list[str]
    labels: list[int]

    @classmethod
    def of(cls, wordnet_ids: list[str], classes: set[str]) -> "GroundTruth":
        """Create it from the WordNet ids of the images."""
        number = {name: i for i, name in enumerate(sorted(classes))}
        return cls(sorted(classes), [number[name] for name in wordnet_ids])


def find_imagenet(
    path: Path, where: str, split: str | None, devkit: Path | None, require_labels: bool
) -> Source | None:
    """Return ImageNet or a part of it, or None if the path is something else.

    Args:
        path: an official tar, a folder that holds them, a folder of validation images, or Tiny-ImageNet's `val`.
        where: the key or flag of the path, for errors.
        split: which tar to read if a folder holds both.
        devkit: folder or archive of the development kit, or Kaggle's table; searched near the images if None.
        require_labels: refuse validation images whose classes are not found; otherwise they have no labels.

    Raises:
        UserError: something of it is missing or damaged.
    """
    if path.is_dir():
        present = {kind: path / name for kind, name in _TARS.items() if (path / name).is_file()}
        if present:
            wanted = Split.TRAIN if Split.of(split) is Split.TRAIN else Split.VAL
            if split is None or wanted not in present:
                names = ", ".join(tar.name for tar in present.values())
                lacking = f" and no {split} images" if split else ""
                raise UserError(where, f"{path} contains {names}{lacking}", "give one file")
            path = present[wanted]
    if path.is_file() and path.suffix == ".tar":
        # The first member tells what the archive is, whatever its name.
        first = first_name(path)
        if first.endswith(".tar"):
            return TarSource(nested_index(path, where))
        if _NUMBERED.fullmatch(first.rpartition("/")[2]):
            return _validation(
                TarSource(build(Shards(path.parent, (path,)), where)), path, where, devkit, require_labels
            )
        return None
    if not path.is_dir():
        return None
    if (path / _TINY_ANNOTATIONS).is_file():
        return FolderSource(_tiny_index(path, where))
    with os.scandir(path) as entries:
        first = next((entry.name for entry in entries if not entry.name.startswith(".")), "")
    if _NUMBERED.fullmatch(first):
        return _validation(FolderSource(build(Folder(path), where)), path, where, devkit, require_labels)
    return None


def _validation(source: Source, path: Path, where: str, devkit: Path | None, require_labels: bool) -> Source:
    """Return the validation images with their labels, or without if the labels are not found and not required."""
    near = path if path.is_dir() else path.parent
    truth = find_ground_truth(near, devkit, where, require_labels)
    if truth is None:
        return source
    labels = []
    for index in range(len(source)):
        name = source.name(index)
        match = _NUMBERED.fullmatch(name.rpartition("/")[2])
        number = int(match[1]) if match else 0
        if not 0 < number <= len(truth.labels):
            raise UserError(where, f"{name} is not one of the {len(truth.labels)} images with known classes")
        labels.append(truth.labels[number - 1])
    return type(source)(with_labels(source.index, labels, truth.classes))


def find_ground_truth(near: Path, given: Path | None, where: str, required: bool) -> GroundTruth | None:
    """Return the classes of the validation images from `given`, or from a file near the images.

    Raises:
        UserError: `given` does not contain them, or nothing is found although it is required.
    """
    if given is not None:
        return _read_table(given, "--devkit") if given.suffix == ".csv" else _read_kit(given, "--devkit", required)
    for folder in (near, near.parent):
        # An unpacked kit before an archive, which takes longer to read.
        for kit in sorted(folder.glob("ILSVRC2012_devkit_t12*"), key=lambda kit: not kit.is_dir()):
            if kit.is_dir() or kit.name.endswith((".tar.gz", ".tgz", ".tar")):
                return _read_kit(kit, where, required)
    for folder in (near, *list(near.parents)[:4]):  # Kaggle's images are in ILSVRC/Data/CLS-LOC/val below the table
        if (folder / _KAGGLE_TABLE).is_file():
            return _read_table(folder / _KAGGLE_TABLE, where)
    if required:
        raise UserError(where, f"{near} contains the validation images of ImageNet without their classes", _HINT)
    return None


def _read_kit(kit: Path, where: str, required: bool) -> GroundTruth | None:
    """Read a development kit: a class number from 1 on for each image, and the WordNet id of each class number."""
    numbers = [int(word) for word in _read_kit_file(kit, _GROUND_TRUTH, where).split() if word.isdigit()]
    try:
        from scipy.io import loadmat
    except ImportError:
        if not required:
            return None
        raise UserError(where, f"reading {kit} needs scipy", "pip install 'ijepa-pretrain[evaluation]'") from None
    meta = _read_kit_file(kit, "meta.mat", where)
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Synsets with children are groups of classes.
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        return GroundTruth.of([names[number] for number in numbers], set(names.values()))
    except Exception as error:  # scipy raises many types on a broken file
        raise UserError(where, f"{kit}: meta.mat does not name the classes: {error}") from error


def _read_kit_file(kit: Path, name: str, where: str) -> bytes:
    """Return a file of the development kit, which is a folder or an archive."""
    try:
        if kit.is_dir():
            found = next((folder / name for folder in (kit / "data", kit) if (folder / name).is_file()), None)
            if found is not None:
                return found.read_bytes()
        else:
            with tarfile.open(kit) as archive:
                for member in archive:
                    if member.isfile() and member.name.rpartition("/")[2] == name:
                        file = archive.extractfile(member)
                        return b"" if file is None else file.read()
    except OSError as error:
        raise UserError(where, f"{kit} cannot be read: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise UserError(where, f"{kit} is neither a folder nor an archive: {error}", _HINT) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(where, f"{kit} is damaged: {error}", "download it again") from error
    raise UserError(where, f"{kit} contains no {name}", _HINT)


def _read_table(file: Path, where: str) -> GroundTruth:
    """Read Kaggle's table: lines `ILSVRC2012_val_00000001,n01751748 110 ...`, in any order."""
    try:
        with read_errors(where, file), file.open(newline="", encoding="utf-8") as lines:
            rows = dict(row[:2] for row in list(csv.reader(lines))[1:])
        names = [rows[f"ILSVRC2012_val_{number:08d}"].split()[0] for number in range(1, len(rows) + 1)]
    except (ValueError, LookupError, csv.Error) as error:
        raise UserError(where, f"{file} is not the table of the validation images: {error}", _HINT) from error
    return GroundTruth.of(names, set(names))


def _tiny_index(path: Path, where: str) -> Index:
    """Return the index of Tiny-ImageNet's val: lines of `val_0.JPEG`, a tab, a WordNet id, and a box."""
    file = path / _TINY_ANNOTATIONS
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line]
    class_of = {row[0]: row[1] for row in rows if len(row) > 1}
    index = build(Folder(path / "images" if (path / "images").is_dir() else path), where)
    names = index.texts("names")
    missing = next((name for name in names if name not in class_of), None)
    if missing is not None:
        raise UserError(where, f"{file} has no class for {missing}")
    classes = sorted(set(class_of.values()))
    return with_labels(index, [classes.index(class_of[name]) for name in names], classes)
