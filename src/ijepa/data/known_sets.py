"""Data sets known by name, recognised by what lies at a path; everything else is `listing`'s.

Looked for, in this order: Pascal VOC, sets of images and masks in pairs (`layouts`), CIFAR (`cifar`), ImageNet's tars
and validation images (`imagenet`); at the path, then in the folder of the wanted split below it.
"""

import re
from pathlib import Path

from ijepa.data.sources.base import FolderSource, Source
from ijepa.data.sources.cifar import find_cifar
from ijepa.data.sources.image_mask_pairs import find_pairs, voc_index, voc_root
from ijepa.data.sources.imagenet import find_imagenet
from ijepa.data.sources.index import require_regular
from ijepa.utils.errors import UserError

_ALSO = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_ELSEWHERE = re.compile(r"[a-z0-9]{2,}:")


def recognise(
    path: str | Path, where: str, split: str | None, *, devkit: Path | None = None, strict: bool = False
) -> Source | None:
    """Return the data set at a path if it is one of those known by name; see `find_imagenet` for the last two.

    Raises:
        UserError: it is one, and something of it is missing or broken; or a file that is not a regular one.
    """
    if not str(path) or _ELSEWHERE.match(str(path)):
        return None
    try:
        given = Path(path).expanduser().absolute()
        if not given.exists():
            return None
        if not given.is_dir():
            require_regular(given, given.stat(), where)
        below = [given / name for name in _ALSO.get(split or "", ()) if (given / name).is_dir()]
        for place in (given, *below):
            found = _known(place, where, split, devkit, strict)
            if found is not None:
                return found
    except OSError as error:
        raise UserError(where, f"{error.filename or path} cannot be read: {error.strerror}") from error
    return None


def _known(place: Path, where: str, split: str | None, devkit: Path | None, strict: bool) -> Source | None:
    if place.is_dir():
        voc = voc_root(place)
        index = find_pairs(place, where, split) if voc is None else voc_index(voc, where, split)
        if index is not None:
            return FolderSource(index)
    cifar = find_cifar(place, where, split)
    return find_imagenet(place, where, split, devkit, strict) if cifar is None else cifar
