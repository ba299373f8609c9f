"""Indexing tar shards: CPU time and index size per image at several sizes, extrapolated to ImageNet-22k.

    python benchmarks/index.py --output benchmarks/results/cpu-index.json

The shards are synthetic: three members per sample (`jpg`, `cls`, `json`) as real ones have, with images of `BYTES`
bytes that are holes in the file. A million of them take little disk space, and a read of one header does not contain
the next sample's. CPU time is that of all indexing processes together. A straight line through the smallest and the
largest size gives the figure for 14,146,391 images.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ijepa.data.open import open_dataset
from ijepa.data.sources.index import cache_root
from ijepa.utils.environment import machine
from ijepa.utils.errors import RunError
from ijepa.utils.files import write_errors, write_json

BYTES = 12_000
IMAGENET_22K = 14_146_391
GOAL_SECONDS, GOAL_BYTES = 240.0, 300e6
PER_SHARD = 3_000


def measure(sizes: Sequence[int], folder: Path | None) -> dict[str, Any]:
    """Index synthetic shards of each number of images in a temporary folder within `folder`.

    Raises:
        RunError: the shards cannot be written.
    """
    rows = []
    before = os.environ.get("IJEPA_CACHE")
    with tempfile.TemporaryDirectory(dir=folder) as temporary, write_errors(temporary):
        os.environ["IJEPA_CACHE"] = f"{temporary}/cache"
        try:
            for count in sizes:
                rows.append(_row(Path(temporary) / str(count), count))
                click.echo(_line(rows[-1]))
        finally:
            os.environ.pop("IJEPA_CACHE")
            if before is not None:
                os.environ["IJEPA_CACHE"] = before
    result: dict[str, Any] = {"rows": rows, "image_bytes": BYTES, "members": 3}
    if len(rows) > 1:
        whole = {key: _extrapolated(rows, key) for key in ("cpu_seconds", "index_bytes")}
        result["imagenet_22k"] = {"images": IMAGENET_22K, **whole}
        click.echo(
            f"{IMAGENET_22K:,} images: {whole['cpu_seconds']:.0f} CPU-seconds (goal < {GOAL_SECONDS:.0f}), "
            f"{whole['index_bytes'] / 1e6:.0f} MB (goal < {GOAL_BYTES / 1e6:.0f})"
        )
    return result


def write_shards(folder: Path, count: int, *, shard: int = PER_SHARD) -> None:
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
    source = open_dataset(folder)
    cpu, wall = _cpu() - begun, time.perf_counter() - wall
    if len(source) != count or source.labels is None:
        raise RunError(f"{folder}: {len(source)} of {count} images were indexed")
    begun = _cpu()
    open_dataset(folder)
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


def _extrapolated(rows: list[dict[str, Any]], key: str) -> float:
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


@click.command()
@click.option(
    "--images",
    "sizes",
    type=int,
    multiple=True,
    default=(250_000, 1_000_000),
    help="Data set sizes, in ascending order.",
)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Folder for the temporary shards.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(sizes: tuple[int, ...], folder: Path | None, output: Path) -> None:
    """Measure indexing of tar shards."""
    if min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
        raise click.BadParameter("give positive numbers in ascending order", param_hint="--images")
    write_json(output, {**machine(), **measure(sizes, folder)})


if __name__ == "__main__":
    main()
