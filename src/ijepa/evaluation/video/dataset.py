"""Videos with labeled objects: frames and masks as files, in the layout of DAVIS or in plain folders.

A DAVIS tree has `JPEGImages/480p/NAME/*.jpg`, `Annotations/480p/NAME/*.png` and, to select some of them,
`ImageSets/YEAR/val.txt`. Otherwise `images/NAME/*` and `masks/NAME/*.png` are read. Frames are ordered by name. A mask
has 0 for the ground, the number of an object, or 255 where nothing is scored.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ijepa.data.loading.decode import DecodeError, decode, decode_mask
from ijepa.data.sources.base import read_file
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.names import printable

VOID = 255

_LAYOUTS = (("JPEGImages/480p", "Annotations/480p"), ("images", "masks"))
_ACCEPTED = "give a folder in the layout of DAVIS, or a folder with images/NAME/*.jpg and masks/NAME/*.png"


@dataclass(frozen=True)
class Video:
    """The files of one video. `masks` has None for a frame without a mask; the first frame has one."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]

    def frame(self, number: int) -> npt.NDArray[np.uint8]:
        """Return a frame (H, W, 3).

        Raises:
            RunError: it cannot be read or decoded.
        """
        try:
            return decode(read_file(self.frames[number]))
        except DecodeError as error:
            raise RunError(f"{self.frames[number]}: {error}") from error

    def mask(self, number: int, shape: tuple[int, ...]) -> npt.NDArray[np.integer] | None:
        """Return the mask (H, W) of a frame, or None.

        Raises:
            RunError: it cannot be read.
            UserError: it cannot be decoded, or has another shape than its frame.
        """
        file = self.masks[number]
        if file is None:
            return None
        try:
            mask = decode_mask(read_file(file))
        except DecodeError as error:
            raise UserError(file, f"is not a mask: {error}") from error
        if mask.shape != shape:
            raise UserError(
                file, f"has {mask.shape[1]} x {mask.shape[0]} pixels, but its frame has {shape[1]} x {shape[0]}"
            )
        return mask


def find_videos(root: Path, where: str = "--data", split: str = "val") -> tuple[Video, ...]:
    """Return the videos of a folder, by name.

    Raises:
        UserError: the folder has no videos, or a video has no mask of the first frame or no other mask to score.
    """
    layouts = [(root / images, root / annotations) for images, annotations in _LAYOUTS]
    frames, masks = next((pair for pair in layouts if all(folder.is_dir() for folder in pair)), (None, None))
    if frames is None or masks is None:
        raise UserError(where, f"{root} has no labeled videos", _ACCEPTED)
    names = sorted(folder.name for folder in frames.iterdir() if folder.is_dir())
    lists = sorted(root.glob(f"ImageSets/*/{split}.txt"))
    if lists:
        listed = [line.split()[0] for line in lists[-1].read_text(encoding="utf-8").splitlines() if line.strip()]
        missing = sorted(set(listed) - set(names))
        if missing:
            raise UserError(lists[-1], f"lists {missing[0]}, which is not in {frames}")
        names = sorted(listed)
    if not names:
        raise UserError(where, f"{frames} has no videos", _ACCEPTED)
    return tuple(_video(name, frames / name, masks / name, where) for name in names)


def fingerprint(videos: tuple[Video, ...]) -> str:
    """Return a hash of the names and sizes of all files."""
    digest = hashlib.sha256()
    for video in videos:
        for file in (*video.frames, *video.masks):
            entry = None if file is None else (file.name, file.stat().st_size)
            digest.update(repr((video.name, entry)).encode())
    return digest.hexdigest()


def _video(name: str, frames: Path, masks: Path, where: str) -> Video:
    files = sorted(file for file in frames.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    by_stem = {file.stem: file for file in masks.glob("*.png")}
    found = tuple(by_stem.get(file.stem) for file in files)
    if not found or found[0] is None:
        raise UserError(where, f"the first frame of {name} has no mask", _ACCEPTED)
    if not any(found[1:]):
        raise UserError(where, f"{name} has no mask to score except that of the first frame", _ACCEPTED)
    return Video(printable(name), tuple(files), found)
