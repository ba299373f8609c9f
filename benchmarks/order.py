"""The shuffled order of a set of the size of ImageNet-22k: time to open its index, to find a step, and of an epoch.

    python benchmarks/order.py --output benchmarks/results/cpu-order.json

The index is synthetic: arrays of 14,146,391 places, sizes and labels on disk, memory-mapped as a real one is; there are
no images. `resume_seconds` is the longest of a hundred lookups of one step's samples (with their labels, as the loader
reads them) at random steps of a run of 460 epochs.
"""

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ijepa.data.loading.shuffle import Order
from ijepa.data.sources.base import TarSource
from ijepa.data.sources.index import Index, load
from ijepa.utils.environment import machine
from ijepa.utils.files import write_json
from ijepa.utils.random import Stream, random_bits

IMAGES = 14_146_391
_BATCH, _EPOCHS, _LOOKUPS = 2048, 460, 100


def measure(images: int, folder: Path | None) -> dict[str, Any]:
    """Measure both orders on an index of `images`, made in a temporary folder within `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_index(Path(temporary), images)
        start = time.perf_counter()
        source = TarSource(load(Path(temporary)))
        opened = time.perf_counter() - start
        rows = {kind: _measure(source, Order(0, len(source), kind)) for kind in ("global", "blocks")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    click.echo(f"{images:,} images: opened in {1e3 * opened:.1f} ms; peak memory of the process {peak / 1e6:.0f} MB")
    for kind, row in rows.items():
        times = f"any step in {1e3 * row['resume_seconds']:.1f} ms, an epoch in {row['epoch_seconds']:.1f} s"
        click.echo(f"  {kind}: {times}")
    return {"images": images, "batch": _BATCH, "open_seconds": opened, "peak_bytes": peak, "orders": rows}


def _measure(source: TarSource, order: Order) -> dict[str, float]:
    assert source.labels is not None
    steps = _EPOCHS * len(source) // _BATCH
    longest = 0.0
    for word in random_bits(0, Stream.ORDER, np.arange(_LOOKUPS), 1)[:, 0].tolist():
        first = word * steps // 2**32 * _BATCH
        begun = time.perf_counter()
        source.labels[order.indices(np.arange(first, first + _BATCH))].sum()
        longest = max(longest, time.perf_counter() - begun)
    begun = time.process_time()
    for first in range(0, len(source), _BATCH):
        order.indices(np.arange(first, min(first + _BATCH, len(source))))
    return {"resume_seconds": longest, "epoch_seconds": time.process_time() - begun}


def write_index(folder: Path, images: int) -> None:
    """Write the arrays of an index as `data.index` keeps them, without images behind it."""
    shards = -(-images // 3000)
    np.save(folder / "first.npy", np.minimum(np.arange(shards + 1) * 3000, images))
    kinds = {"block": np.uint32, "size": np.uint32, "label": np.int32}
    arrays = ["first", *kinds]
    out = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (images,)) for name, kind in kinds.items()
    }
    for begin in range(0, images, 2**20):  # in pieces: the making should not be what takes the memory
        places = np.arange(begin, min(begin + 2**20, images))
        out["block"][places] = places % 3000 * 220 + 1
        out["size"][places] = 110_000
        out["label"][places] = places % 21_841
    names = [f"train-{number:05d}.tar" for number in range(shards)]
    header = {"root": str(folder), "shards": names, "classes": None, "arrays": arrays}
    header |= {"fingerprint": "made", "stamp": "made"}
    write_json(folder / "index.json", Index(header, {}).header)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Folder for the temporary index.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(folder: Path | None, output: Path) -> None:
    """Measure the shuffled image order."""
    write_json(output, {**machine(), **measure(IMAGES, folder)})


if __name__ == "__main__":
    main()
