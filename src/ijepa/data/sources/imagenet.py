"""ImageNet-1K and Tiny-ImageNet as they are downloaded, where that is no tree of class folders.

The training images come as one tar of a thousand class tars, read in place (`nested`). The validation images come
without classes, in a tar or a flat folder: their names are numbers, and the development kit holds, for each number, a
class's number, and for each class's number its WordNet id, by which the training folders are named. Kaggle's edition
has a table in its place. Once the usual script (valprep) has moved the images into class folders, none of this is
needed.

Tiny-ImageNet's `val` is a folder of images beside `val_annotations.txt`.
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

import numpy as np

from ijepa.data.paths import Folder, Shards
from ijepa.data.sources.base import FolderSource, Source, TarSource
from ijepa.data.sources.index import Index, build, derived, text_item
from ijepa.data.sources.nested_tar import first_name, nested_index
from ijepa.utils.errors import UserError

_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_TABLE = "LOC_val_solution.csv"
_ANNOTATIONS = "val_annotations.txt"
_MEND = "give --devkit ILSVRC2012_devkit_t12 (the folder or its .tar.gz) or LOC_val_solution.csv, or put it beside them"


@dataclass(frozen=True)
class Truth:
    """Classes of the validation images: `labels` of image 1, 2, ..., and the WordNet ids that they number."""

    classes: list[str]
    labels: list[int]


def find_imagenet(path: Path, where: str, split: str | None, devkit: Path | None, strict: bool) -> Source | None:
    """Return ImageNet or a part of it at a path, None where it is something else.

    Args:
        path: an official tar, a folder that holds them, a folder of validation images, or Tiny-ImageNet's `val`.
        where: names the path in errors.
        split: which tar, where a folder holds both.
        devkit: the development kit's folder or archive, or Kaggle's table; looked for near the images if None.
        strict: refuse validation images whose classes are not found; else they have none.
    """
    if path.is_dir() and any((path / name).is_file() for name in _TARS.values()):
        wanted = _TARS.get("train" if split and split.startswith("train") else "val")
        if split is None or wanted is None or not (path / wanted).is_file():
            held = ", ".join(name for name in _TARS.values() if (path / name).is_file())
            raise UserError(
                where, f"{path} holds {held}" + (f" and no {split} images" if split else ""), "give one file"
            )
        path = path / wanted
    if path.is_file() and path.suffix == ".tar":
        first = first_name(path)
        if first.endswith(".tar"):
            return TarSource(nested_index(path, where))
        if _NUMBERED.fullmatch(first.rpartition("/")[2]):
            index = build(Shards(path.parent, (path,)), where)
            truth = find_truth(path.parent, devkit, where, strict)
            bare = TarSource(index)
            return bare if truth is None else TarSource(_labelled(index, bare, truth, where))
        return None
    if not path.is_dir():
        return None
    if (path / _ANNOTATIONS).is_file():
        return FolderSource(_tiny(path, where))
    with os.scandir(path) as entries:
        first = next((entry.name for entry in entries if not entry.name.startswith(".")), "")
    if not _NUMBERED.fullmatch(first):
        return None
    index = build(Folder(path), where)
    truth = find_truth(path, devkit, where, strict)
    bare_folder = FolderSource(index)
    return bare_folder if truth is None else FolderSource(_labelled(index, bare_folder, truth, where))


def find_truth(near: Path, given: Path | None, where: str, strict: bool) -> Truth | None:
    """Return the validation images' classes, from what was given or lies near the images.

    Raises:
        UserError: what was given holds none, or nothing is found and `strict` wants it.
    """
    if given is not None:
        return _table(given, "--devkit") if given.suffix == ".csv" else _kit(given, "--devkit", strict)
    for folder in (near, near.parent):
        kits = sorted(folder.glob("ILSVRC2012_devkit_t12*"), key=lambda kit: not kit.is_dir())
        for kit in kits:
            if kit.is_dir() or kit.name.endswith((".tar.gz", ".tgz", ".tar")):
                return _kit(kit, where, strict)
    for folder in (near, *list(near.parents)[:4]):  # Kaggle's images lie in ILSVRC/Data/CLS-LOC/val below it
        if (folder / _TABLE).is_file():
            return _table(folder / _TABLE, where)
    if strict:
        raise UserError(where, f"{near} holds ImageNet's validation images, whose classes are elsewhere", _MEND)
    return None


def _kit(kit: Path, where: str, strict: bool) -> Truth | None:
    """Return what a development kit says: an id from 1 on for every image, and which WordNet id that is."""
    numbers = [int(word) for word in _of_kit(kit, _TRUTH, where).split() if word.isdigit()]
    try:
        from scipy.io import loadmat
    except ImportError:
        if not strict:
            return None
        raise UserError(where, f"reading {kit} needs scipy", "pip install 'ijepa-pretrain[evaluation]'") from None
    try:
        synsets = loadmat(io.BytesIO(_of_kit(kit, "meta.mat", where)), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        labels = [names[number] for number in numbers]
    except UserError:
        raise
    except Exception as error:  # a MATLAB file may be broken in any way
        raise UserError(where, f"{kit}: meta.mat does not name the classes: {error}") from error
    return _numbered(labels, sorted(names.values()))


def _of_kit(kit: Path, name: str, where: str) -> bytes:
    """Return a file of the development kit, a folder or an archive."""
    try:
        if kit.is_dir():
            place = next((folder / name for folder in (kit / "data", kit) if (folder / name).is_file()), None)
            if place is not None:
                return place.read_bytes()
        else:
            with tarfile.open(kit) as archive:
                for member in archive:
                    if member.isfile() and member.name.rpartition("/")[2] == name:
                        file = archive.extractfile(member)
                        return b"" if file is None else file.read()
    except OSError as error:
        raise UserError(where, f"{kit} cannot be read: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise UserError(where, f"{kit} is no folder and no archive: {error}", _MEND) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(where, f"{kit} is damaged: {error}", "fetch it again") from error
    raise UserError(where, f"{kit} holds no {name}", _MEND)


def _table(file: Path, where: str) -> Truth:
    """Return what Kaggle's table says: `ILSVRC2012_val_00000001,n01751748 110 ...`, in any order."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = dict(row[:2] for row in list(csv.reader(lines))[1:])
        names = [rows[f"ILSVRC2012_val_{number:08d}"].split()[0] for number in range(1, len(rows) + 1)]
    except OSError as error:
        raise UserError(where, f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, csv.Error) as error:
        raise UserError(where, f"{file} is not the table of the validation images: {error}", _MEND) from error
    return _numbered(names, sorted(set(names)))


def _numbered(names: list[str], classes: list[str]) -> Truth:
    number = {name: i for i, name in enumerate(classes)}
    return Truth(classes, [number[name] for name in names])


def _labelled(index: Index, source: Source, truth: Truth, where: str) -> Index:
    """Return an index of validation images with their labels."""
    labels = []
    for i in range(len(source)):
        match = _NUMBERED.fullmatch(source.name(i).rpartition("/")[2])
        number = int(match.group(1)) if match else 0
        if not 0 < number <= len(truth.labels):
            raise UserError(
                where, f"{source.name(i)} is none of the {len(truth.labels)} images whose classes are known"
            )
        labels.append(truth.labels[number - 1])
    return with_labels(index, labels, truth.classes)


def _tiny(path: Path, where: str) -> Index:
    """Return the index of Tiny-ImageNet's val: `val_0.JPEG`, a tab, a WordNet id, and a box."""
    file = path / _ANNOTATIONS
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line]
    named = {row[0]: row[1] for row in rows if len(row) > 1}
    index = build(Folder(path / "images" if (path / "images").is_dir() else path), where)
    names = [text_item(index.arrays, "names", "ends", i) for i in range(len(index.arrays["ends"]))]
    missing = next((name for name in names if name not in named), None)
    if missing is not None:
        raise UserError(where, f"{file} has no class for {missing}")
    classes = sorted(set(named.values()))
    return with_labels(index, [classes.index(named[name]) for name in names], classes)


def with_labels(index: Index, labels: list[int], classes: list[str]) -> Index:
    """Return an index whose samples have these labels, numbers of these classes."""
    header = {**index.header, "classes": classes, **derived(index, *classes, *map(str, labels))}
    return Index(header, {**index.arrays, "label": np.array(labels, dtype=np.int32)})
