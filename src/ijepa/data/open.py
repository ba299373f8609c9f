"""The one door to images: a path, whatever lies there, becomes a source.

`open_source` is for everybody; `open_set` is for evaluations, which may also name a list of images and ImageNet's kit.
"""

from pathlib import Path

from ijepa.data import paths as listing
from ijepa.data.known_sets import recognise
from ijepa.data.sources import remote
from ijepa.data.sources.arrow import PREFIX, open_saved
from ijepa.data.sources.base import FolderSource, Source, TarSource
from ijepa.data.sources.image_mask_pairs import voc_index, voc_root
from ijepa.data.sources.index import build, cache_root
from ijepa.data.sources.parquet import find as find_tables
from ijepa.data.sources.parquet import open_parquet
from ijepa.data.sources.subset import select
from ijepa.utils.errors import UserError


def open_source(path: str | Path, *, where: str = "data.path", split: str | None = None) -> Source:
    """Return the data set at `path`; see `listing` for what a path may be, and `official` for data sets known by name.

    `split` ("train", "val", "test") chooses where a folder holds several. `where` names the key or flag in errors.

    Raises:
        UserError: nothing there that could be used.
    """
    if str(path).startswith(PREFIX):
        return open_saved(str(path), where, split)
    if remote.is_remote(str(path)):
        return TarSource(build(_fetched(str(path), where, split), where))
    known = recognise(path, where, split)
    if known is not None:
        return known
    tables = find_tables(path, where, split) if str(path) else None
    if tables is not None:
        return open_parquet(tables, where)
    files = listing.find(path, where, split)
    index = build(files, where)
    return TarSource(index) if isinstance(files, listing.Shards) else FolderSource(index)


def open_set(
    path: str, *, where: str, split: str, listed: str | None = None, devkit: str | None = None, labelled: bool = False
) -> Source:
    """Return the data set that an evaluation names, or the part of it that a file lists.

    Args:
        path: as for `open_source`.
        where: the flag of the path; the list's is this and `-list`.
        split: chosen where the path holds several.
        listed: a file of names (see `listed`), or the name of one of Pascal VOC's lists.
        devkit: see `find_imagenet`.
        labelled: whether the images' classes are wanted.

    Raises:
        UserError: nothing there that could be used, or a list that does not fit it.
    """
    flag = f"{where}-list"
    file = None if listed is None else Path(listed).expanduser()
    voc = voc_root(Path(path).expanduser().absolute()) if file is not None else None
    if file is not None and voc is not None:
        own = (voc / "ImageSets" / folder / f"{listed}.txt" for folder in ("Segmentation", "SegmentationAug"))
        file = next((name for name in (file, *own) if name.is_file()), file)
        return select(FolderSource(voc_index(voc, where, None)), file, flag)
    given = None if devkit is None else Path(devkit).expanduser()
    if given is not None and not given.exists():
        raise UserError("--devkit", f"{given} does not exist")
    source = recognise(path, where, split, devkit=given, strict=labelled)
    if source is None:
        source = open_source(path, where=where, split=split)
    return source if file is None else select(source, file, flag)


def _fetched(path: str, where: str, split: str | None) -> listing.Shards:
    """Return local copies of the shards that a URL means; of a folder's splits, one."""
    paths = remote.fetch(remote.find(path, where, split), where, cache_root().with_name("shards"))
    return listing.Shards(paths[0].parent, tuple(paths))
