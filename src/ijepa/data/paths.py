"""From the path that was typed to the files it means: shards, or a folder of images.

Understood are a class-folder tree, a flat folder, `images/` beside `masks/`, a folder of tar shards, one tar, a
brace pattern (`train-{0000..0127}.tar`) and a glob; parquet files are `parquet`'s. Where a folder holds several splits,
as shards or as folders named train, val or test (validation, training, train2017 too), one has to be chosen: training
on the test set by mistake is not offered.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ijepa.utils.errors import UserError

_SPLIT = re.compile(r"(train|val|test)(ing|id|idation)?(?![A-Za-z])")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ACCEPTED = "give a folder of images, a tree of class folders, or tar shards (PATH/train-{0000..0127}.tar)"


@dataclass(frozen=True)
class Shards:
    """Tar shards, in their order, under the folder that holds them."""

    root: Path
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Folder:
    """A folder of image files: with `masks`, the folder of matching masks; else its sub-folders are classes."""

    root: Path
    masks: Path | None = None


def find(path: str | Path, where: str, split: str | None = None) -> Shards | Folder:
    """Return the files that `path` means; `where` is the key or flag it came from.

    Raises:
        UserError: nothing there, nothing of the kind, or several splits and none chosen.
    """
    if not str(path):
        raise UserError(where, "no path given", _ACCEPTED)
    try:
        given = Path(path).expanduser().absolute()
        if given.is_dir():
            return _in_folder(given, where, split)
        if given.exists():
            return _tars([given], where)
        return _pattern(given, where)
    except OSError as error:
        raise UserError(where, f"{path} cannot be read: {error.strerror}") from error


def _pattern(given: Path, where: str) -> Shards:
    """Return the shards that a brace pattern or a glob means."""
    text = str(given)
    if "{" in text:
        paths = [Path(name) for name in expand_braces(text)]
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise UserError(where, f"{missing[0]} does not exist", f"{len(missing)} of {len(paths)} files are missing")
        return _tars(paths, where)
    if any(sign in text for sign in "*?["):
        found = sorted(Path(given.anchor).glob(str(given.relative_to(given.anchor))))
        if not found:
            raise UserError(where, f"{given} matches nothing", _ACCEPTED)
        return _tars(found, where)
    raise UserError(where, f"{given} does not exist", _ACCEPTED)


def expand_braces(text: str) -> list[str]:
    """Return what `{0000..0127}` and `{a,b}` stand for, as a shell would, in order."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    body = match.group(1)
    numbers = _RANGE.fullmatch(body)
    if numbers is None:
        choices = body.split(",")
    else:
        ends = numbers.groups()
        padded = any(end.startswith("0") and len(end) > 1 for end in ends)
        width = max(map(len, ends)) if padded else 0
        first, last = map(int, ends)
        step = 1 if first <= last else -1
        choices = [str(i).zfill(width) for i in range(first, last + step, step)]
    return [text[: match.start()] + choice + rest for choice in choices for rest in expand_braces(text[match.end() :])]


def _in_folder(root: Path, where: str, split: str | None) -> Shards | Folder:
    with os.scandir(root) as listed:
        entries = sorted((e for e in listed if not e.name.startswith(".")), key=lambda e: e.name)
    if not entries:
        raise UserError(where, f"{root} is empty", _ACCEPTED)
    folders = [entry.name for entry in entries if entry.is_dir()]
    tars = [entry.name for entry in entries if entry.name.endswith(".tar") and entry.is_file()]
    if {"images", "masks"} <= set(folders):
        return Folder(root / "images", root / "masks")
    split_folders = _split_folders(folders)
    if tars and split_folders:
        raise UserError(
            where, f"{root} holds both tar files and the folders {', '.join(split_folders)}", "give one of them"
        )
    if tars:
        return _tars([root / name for name in choose(root, tars, where, split, "*.tar")], where)
    if split_folders:
        chosen = choose(root, split_folders, where, split, "")
        if len(chosen) > 1:
            raise UserError(where, f"{root} holds {', '.join(chosen)}", f"give one, as {root / chosen[0]}")
        return _in_folder(root / chosen[0], where, None)
    return Folder(root)


def _split_folders(folders: list[str]) -> list[str]:
    """Return the folders that are splits, where folders are splits and not classes: a class may be called train."""
    named = [name for name in folders if _split_of(name)]
    return named if len({_split_of(name) for name in named}) > 1 or len(named) == len(folders) else []


def splits(path: Path) -> list[str]:
    """Return which of train, val and test a folder holds, as shards, parquet files or folders; none of one set."""
    if not path.is_dir():
        return []
    visible = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    names = [entry.name for entry in visible if entry.suffix == ".tar"] or parquet_files(path)
    names = names or parquet_files(path / "data") or _split_folders([e.name for e in visible if e.is_dir()])
    present = {_split_of(name) for name in names}
    return [split for split in ("train", "val", "test") if split in present]


def parquet_files(folder: Path) -> list[str]:
    """Return the names of the parquet files in a folder of such, sorted; none where it holds tars or folders."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    found = sorted(entry.name for entry in visible if entry.name.endswith(".parquet"))
    if not found or any(entry.name.endswith(".tar") or entry.is_dir() for entry in visible):
        return []
    return found


def _tars(paths: list[Path], where: str) -> Shards:
    other = next((p for p in paths if p.suffix != ".tar" and not _is_tar(p)), None)
    if other is not None:
        raise UserError(where, f"{other} is not a tar archive", _ACCEPTED)
    return Shards(Path(os.path.commonpath([p.parent for p in paths])), tuple(paths))


def _is_tar(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(512)[257:262] == b"ustar"


def choose(root: Path | str, names: list[str], where: str, split: str | None, suffix: str) -> list[str]:
    """Return the names of the split asked for; all of them where names speak of no split, or of one only.

    Raises:
        UserError: several splits and none chosen, or not the one asked for.
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(_split_of(name), []).append(name)
    present = sorted(by_split.keys() - {""})
    if not present:
        return names
    if split is not None:
        if _split_of(split) not in present:
            raise UserError(where, f"{root} holds no {split}, only {', '.join(present)}")
        return by_split[_split_of(split)]
    if len(present) > 1:
        raise UserError(
            where,
            f"{root} holds several splits: {', '.join(present)}",
            f"give one, as {root}/{present[0]}{'-' if suffix else ''}{suffix}",
        )
    return names


def _split_of(name: str) -> str:
    match = _SPLIT.match(name)
    return match.group(1) if match else ""
