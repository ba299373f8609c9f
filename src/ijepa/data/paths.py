"""Find the files that a path means: tar shards or a folder of images.

A path may be a tree of class folders, a flat folder, `images/` next to `masks/`, a folder of tar shards, one tar, a
brace pattern (`train-{0000..0127}.tar`) or a glob. `sources.parquet` finds parquet files. If a folder holds several
splits, as shards or as folders (`train`, `validation`, `val2017`), the user has to choose one, to avoid training on
a test set by mistake.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ijepa.data.split import Split, choose_split
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_errors

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_HINT = "give a folder of images, a tree of class folders, or tar shards (PATH/train-{0000..0127}.tar)"


@dataclass(frozen=True)
class Shards:
    """Tar shards in order, and a folder that contains them all."""

    root: Path
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Folder:
    """A folder of image files. Its sub-folders are classes, unless `masks` is a folder of matching masks."""

    root: Path
    masks: Path | None = None


def find_files(path: str | Path, where: str, split: str | None = None) -> Shards | Folder:
    """Return the files that `path` means; `where` is the key or flag that it comes from.

    Raises:
        UserError: there are no such files, or several splits and none chosen.
    """
    if not str(path):
        raise UserError(where, "no path given", _HINT)
    given = Path(path).expanduser().absolute()
    with read_errors(where, given):
        if given.is_dir():
            return _find_in_folder(given, where, split)
        # An existing file is taken as it is, even if its name contains braces or wildcards.
        if given.exists():
            return _shards([given], where)
        if "{" in str(given):
            return _shards(_expand_existing(given, where), where)
        if any(sign in str(given) for sign in "*?["):
            found = sorted(Path(given.anchor).glob(str(given.relative_to(given.anchor))))
            if found:
                return _shards(found, where)
            raise UserError(where, f"{given} matches nothing", _HINT)
        raise UserError(where, f"{given} does not exist", _HINT)


def expand_braces(text: str) -> list[str]:
    """Return the words that `{0000..0127}` and `{a,b}` stand for, as in a shell, in order."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    numbers = _RANGE.fullmatch(match[1])
    if numbers is None:
        choices = match[1].split(",")
    else:
        ends = numbers.groups()
        padded = any(end.startswith("0") and len(end) > 1 for end in ends)  # as bash: {8..010} gives 008, 009, 010
        width = max(map(len, ends)) if padded else 0
        first, last = map(int, ends)
        step = 1 if first <= last else -1
        choices = [str(i).zfill(width) for i in range(first, last + step, step)]
    return [text[: match.start()] + choice + rest for choice in choices for rest in expand_braces(text[match.end() :])]


def find_splits(path: Path) -> list[Split]:
    """Return the splits that a folder holds as shards, parquet files or folders; empty if it is one set."""
    if not path.is_dir():
        return []
    visible = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    names = [entry.name for entry in visible if entry.suffix == ".tar"] or parquet_files(path)
    names = names or parquet_files(path / "data") or _split_folders([e.name for e in visible if e.is_dir()])
    present = {Split.of(name) for name in names}
    return [split for split in Split if split in present]


def parquet_files(folder: Path) -> list[str]:
    """Return the sorted names of the parquet files in a folder; empty if it also holds tars or folders."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    if any(entry.name.endswith(".tar") or entry.is_dir() for entry in visible):
        return []
    return sorted(entry.name for entry in visible if entry.name.endswith(".parquet"))


def select_split(root: Path | str, names: list[str], where: str, split: str | None, suffix: str) -> list[str]:
    """Return the names that belong to the chosen split; all of them if none of the names begins with a split.

    Raises:
        UserError: the chosen split is not there, or several are and none is chosen.
    """
    # Names without a split, such as `extra.tar`, are used only if there is nothing to choose.
    by_split: dict[Split, list[str]] = {}
    for name in names:
        found = Split.of(name)
        if found is not None:
            by_split.setdefault(found, []).append(name)
    if not by_split or (split is None and len(by_split) == 1):
        return names
    present = sorted(by_split)
    example = f"give one of them, for example {root}/{present[0]}{'-' if suffix else ''}{suffix}"
    return by_split[choose_split(root, present, where, split, example)]


def _find_in_folder(root: Path, where: str, split: str | None) -> Shards | Folder:
    with os.scandir(root) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    if not entries:
        raise UserError(where, f"{root} is empty", _HINT)
    folders = [entry.name for entry in entries if entry.is_dir()]
    tars = [entry.name for entry in entries if entry.name.endswith(".tar") and entry.is_file()]
    # Before the check for splits, because these two folders are one data set and not two classes.
    if {"images", "masks"} <= set(folders):
        return Folder(root / "images", root / "masks")
    split_folders = _split_folders(folders)
    if tars and split_folders:
        problem = f"{root} contains both tar files and the folders {', '.join(split_folders)}"
        raise UserError(where, problem, "give one of them")
    if tars:
        return _shards([root / name for name in select_split(root, tars, where, split, "*.tar")], where)
    if split_folders:
        chosen = select_split(root, split_folders, where, split, "")
        if len(chosen) > 1:
            raise UserError(
                where, f"{root} contains {', '.join(chosen)}", f"give one of them, for example {root / chosen[0]}"
            )
        return _find_in_folder(root / chosen[0], where, None)
    return Folder(root)


def _split_folders(folders: list[str]) -> list[str]:
    """Return the folders that are splits; empty if the folders are classes (a class may be called train)."""
    named = [name for name in folders if Split.of(name)]
    are_splits = len({Split.of(name) for name in named}) > 1 or len(named) == len(folders)
    return named if are_splits else []


def _expand_existing(pattern: Path, where: str) -> list[Path]:
    paths = [Path(name) for name in expand_braces(str(pattern))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(where, f"{missing[0]} does not exist", f"{len(missing)} of {len(paths)} files are missing")
    return paths


def _shards(paths: list[Path], where: str) -> Shards:
    other = next((path for path in paths if path.suffix != ".tar" and not _is_tar(path)), None)
    if other is not None:
        raise UserError(where, f"{other} is not a tar archive", _HINT)
    return Shards(Path(os.path.commonpath([path.parent for path in paths])), tuple(paths))


def _is_tar(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(512)[257:262] == b"ustar"
