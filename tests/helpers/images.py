"""Small images, shards and folders for tests."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ijepa.masking.batch import Batch, Sequences


def picture(number: int, height: int = 40, width: int = 52) -> np.ndarray:
    """Return a smooth image with some noise, different for each number."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width]
    phase = rng.uniform(0, 6, 3)
    waves = [np.sin(x / rng.uniform(4, 9) + p) * np.cos(y / rng.uniform(4, 9)) for p in phase]
    return (128 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, format: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


def jpeg(number: int, height: int = 40, width: int = 52) -> bytes:
    return encoded(picture(number, height, width), quality=90)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if format == tarfile.PAX_FORMAT:
                info.mtime = 1700000000.25  # a fraction needs a pax header, as in shards of webdataset
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: Sequence[int], *, prefix: str = "train") -> Path:
    """Write shards of small JPEGs with labels 0, 1, 2 in turn; image i is `jpeg(i)` with a size that depends on i."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members.append((f"s{number:04d}.jpg", jpeg(number, 24 + number % 5 * 4, 24 + number % 7 * 3)))
            members.append((f"s{number:04d}.cls", b"%d" % (number % 3)))
            number += 1
        write_tar(folder / f"{prefix}-{shard:04d}.tar", members)
    return folder


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def bare_batch(positions: np.ndarray, pixels: torch.Tensor, indices: Sequence[int], replaced: Sequence[str]) -> Batch:
    """Return a batch whose patch lists only contain its positions."""
    numbers = Sequences(
        torch.from_numpy(positions.copy()), torch.tensor([0, len(positions)], dtype=torch.int32), (len(positions),)
    )
    weight = torch.from_numpy(positions.astype(np.float32))
    return Batch(
        pixels,
        numbers,
        numbers,
        numbers,
        numbers,
        weight,
        drop_path_rows=(None, numbers),
        positions=tuple(positions.tolist()),
        indices=tuple(indices),
        replaced=tuple(replaced),
    )
