"""Indexing tar shards: CPU time and size an image, at two sizes, and what they give for ImageNet-22k.

The shards are made for it: three members a sample (`jpg`, `cls`, `json`) as real ones have, images of `BYTES` bytes
that are holes in the file, so that a million of them need no disk to speak of but headers, and no header shares a read
with the next sample's. CPU time is that of all indexing processes together. A straight line through both sizes, with a
fixed part and one for each image, gives the figure for 14,146,391.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ijepa.data.open import open_source
from ijepa.data.sources.index import cache_root
from ijepa.utils.environment import machine
from ijepa.utils.errors import RunError

BYTES = 12_000
IMAGENET_22K = 14_146_391
GOAL_SECONDS, GOAL_BYTES = 240.0, 300e6
_A_SHARD = 3_000


def bench_index(
    *,
    images: Sequence[int] = (250_000, 1_000_000),
    folder: Path | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Index synthetic shards of each number of images in a new folder within `folder`; return what is printed.

    Raises:
        RunError: the disk refuses.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        before = os.environ.get("IJEPA_CACHE")
        os.environ["IJEPA_CACHE"] = f"{kept}/cache"
        try:
            for count in images:
                rows.append(_row(Path(kept) / str(count), count))
                echo(_line(rows[-1]))
        except OSError as error:
            raise RunError(f"{kept}: {error.strerror}") from None
        finally:
            os.environ.pop("IJEPA_CACHE")
            if before is not None:
                os.environ["IJEPA_CACHE"] = before
    result = {**machine(), "rows": rows, "image_bytes": BYTES, "members": 3}
    if len(rows) > 1:
        whole = {key: _extended(rows, key) for key in ("cpu_seconds", "index_bytes")}
        result["imagenet_22k"] = {"images": IMAGENET_22K, **whole}
        echo(
            f"{IMAGENET_22K:,} images: {whole['cpu_seconds']:.0f} CPU-seconds (goal < {GOAL_SECONDS:.0f}), "
            f"{whole['index_bytes'] / 1e6:.0f} MB (goal < {GOAL_BYTES / 1e6:.0f})"
        )
    return result


def write_shards(folder: Path, count: int, *, shard: int = _A_SHARD) -> None:
    """Write `count` samples of three members into shards of `shard` samples; images are holes."""
    folder.mkdir(parents=True)
    gap = -(-BYTES // 512) * 512
    for first in range(0, count, shard):
        with (folder / f"train-{first // shard:05d}.tar").open("wb") as file:
            for number in range(first, min(first + shard, count)):
                key = f"{number:09d}"
                label = str(number % 1000).encode()
                file.write(_header(f"{key}.jpg", BYTES))
                file.seek(gap, os.SEEK_CUR)
                small = b"".join(
                    _header(f"{key}.{field}", len(data)) + data.ljust(512, b"\0")
                    for field, data in (("cls", label), ("json", b'{"label": ' + label + b"}"))
                )
                file.write(small)
            file.write(bytes(1024))


def _row(folder: Path, count: int) -> dict[str, Any]:
    write_shards(folder, count)
    begun, wall = _cpu(), time.perf_counter()
    source = open_source(folder)
    cpu, wall = _cpu() - begun, time.perf_counter() - wall
    if len(source) != count or source.labels is None:
        raise RunError(f"{folder}: {len(source)} of {count} images were indexed")
    begun = _cpu()
    open_source(folder)
    again = _cpu() - begun
    size = sum(file.stat().st_size for file in cache_root().rglob("*.npy"))
    shutil.rmtree(cache_root())
    shutil.rmtree(folder)
    return {
        "images": count,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "index_bytes": size,
        "cpu_seconds_again": again,
    }


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _extended(rows: list[dict[str, Any]], key: str) -> float:
    small, large = rows[0], rows[-1]
    slope = (large[key] - small[key]) / (large["images"] - small["images"])
    return float(large[key] + slope * (IMAGENET_22K - large["images"]))


def _header(name: str, size: int) -> bytes:
    head = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 0
    tail = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    total = sum(head) + sum(tail) + 8 * 32
    return head + b"%06o\0 " % total + tail


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['images']:,} images: {row['cpu_seconds']:.1f} CPU-seconds, {row['wall_seconds']:.1f} s, "
        f"{row['index_bytes'] / row['images']:.1f} bytes an image; again {row['cpu_seconds_again']:.2f} CPU-seconds"
    )
