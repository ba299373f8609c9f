"""Open a data set: `open_dataset` turns any supported path into a source."""

import re
from pathlib import Path

from ijepa.data.paths import Shards, find_files
from ijepa.data.sources.arrow import PREFIX, open_saved
from ijepa.data.sources.base import FolderSource, Source, TarSource
from ijepa.data.sources.cifar import find_cifar
from ijepa.data.sources.image_mask_pairs import find_pairs, voc_index, voc_root
from ijepa.data.sources.imagenet import find_imagenet
from ijepa.data.sources.index import build, cache_root, require_regular
from ijepa.data.sources.parquet import find_parquet, open_parquet
from ijepa.data.sources.remote import download, find_remote, is_remote
from ijepa.data.sources.subset import select
from ijepa.data.split import Split
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_errors

_PROTOCOL = re.compile(r"[a-z0-9]{2,}:")


def open_dataset(
    path: str | Path,
    *,
    where: str = "data.path",
    split: str | None = None,
    names: str | None = None,
    devkit: str | None = None,
    require_labels: bool = False,
) -> Source:
    """Return the data set at `path`.

    Args:
        path: see `paths` and the modules of `sources` for the supported forms.
        where: the key or flag of the path, for errors; the flag of `names` is this and `-list`.
        split: "train", "val" or "test", if the path holds several.
        names: a file with names of images (see `subset`), or the name of one of Pascal VOC's lists; all images if None.
        devkit: see `find_imagenet`.
        require_labels: refuse ImageNet's validation images if their classes are not found.

    Raises:
        UserError: there is no data set, or a list that does not fit it.
    """
    if names is not None:
        return _open_subset(path, where, split, names, devkit, require_labels)
    kit = None if devkit is None else Path(devkit).expanduser()
    if kit is not None and not kit.exists():
        raise UserError("--devkit", f"{kit} does not exist")
    if str(path).startswith(PREFIX):
        return open_saved(str(path), where, split)
    if is_remote(str(path)):
        shards = download(find_remote(str(path), where, split), where, cache_root().with_name("shards"))
        return TarSource(build(Shards(shards[0].parent, tuple(shards)), where))
    known = detect_known_dataset(path, where, split, devkit=kit, require_labels=require_labels)
    if known is not None:
        return known
    tables = find_parquet(path, where, split) if str(path) else None
    if tables is not None:
        return open_parquet(tables, where)
    files = find_files(path, where, split)
    index = build(files, where)
    return TarSource(index) if isinstance(files, Shards) else FolderSource(index)


def _open_subset(
    path: str | Path, where: str, split: str | None, names: str, devkit: str | None, require_labels: bool
) -> Source:
    flag, file = f"{where}-list", Path(names).expanduser()
    voc = voc_root(Path(path).expanduser().absolute())
    if voc is None:
        whole = open_dataset(path, where=where, split=split, devkit=devkit, require_labels=require_labels)
        return select(whole, file, flag)
    lists = (voc / "ImageSets" / folder / f"{names}.txt" for folder in ("Segmentation", "SegmentationAug"))
    file = next((each for each in (file, *lists) if each.is_file()), file)
    return select(FolderSource(voc_index(voc, where, None)), file, flag)


def detect_known_dataset(
    path: str | Path, where: str, split: str | None, *, devkit: Path | None = None, require_labels: bool = False
) -> Source | None:
    """Return the data set at a path if it is a known one in the layout in which it is downloaded, else None.

    These are searched at the path, then in the folder of the split below it: Pascal VOC, pairs of images and masks
    (`image_mask_pairs`), CIFAR, ImageNet's tars and validation images.

    Raises:
        UserError: a part of a known data set is missing or damaged, or the path is not a regular file.
    """
    if not str(path) or _PROTOCOL.match(str(path)):
        return None
    given = Path(path).expanduser().absolute()
    with read_errors(where, given):
        if not given.exists():
            return None
        if not given.is_dir():
            require_regular(given, given.stat(), where)
        known = Split.of(split)
        below = [given / name for name in (known.aliases if known else ()) if (given / name).is_dir()]
        for place in (given, *below):
            source = _detect_at(place, where, split, devkit, require_labels)
            if source is not None:
                return source
    return None


def _detect_at(place: Path, where: str, split: str | None, devkit: Path | None, require_labels: bool) -> Source | None:
    if place.is_dir():
        voc = voc_root(place)
        index = find_pairs(place, where, split) if voc is None else voc_index(voc, where, split)
        if index is not None:
            return FolderSource(index)
    cifar = find_cifar(place, where, split)
    return find_imagenet(place, where, split, devkit, require_labels) if cifar is None else cifar
