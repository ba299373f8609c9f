"""How many images a CPU-second this machine turns into training pixels, beside the field's usual way.

Both ways work on the same files and the same boxes, in one process and one thread, in turns of a few images, so that
whatever else the machine does falls on both. Time is the process's CPU time; reading is left out (the files are in
memory), because it depends on the disk and not on the method.

The usual way is what `torchvision.transforms` does with Pillow: decode to RGB, crop and resize with the antialiased
bilinear filter, to a float tensor, normalise. Ours is `decode` and `crop_resize`, which end in bytes: normalising is
the device's work. `psnr` compares their bytes with Pillow's, in decibels.
"""

import io
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ijepa.batch import Batch, Sequences
from ijepa.data.crop import WORDS, Box, crop_resize, random_resized_crop_box
from ijepa.data.decode import DecodeError, decode
from ijepa.data.decode import image_size as image_size_of
from ijepa.data.loader import Loader, LoaderPlan, StepDataset
from ijepa.data.order import Order
from ijepa.data.sources import Source, open_source
from ijepa.errors import Refused
from ijepa.randomness import Stream, words

_TURN = 32
_RATIO = (3 / 4, 4 / 3)
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def bench_data(
    path: str | Path,
    *,
    images: int = 280,
    repeats: int = 4,
    image_size: tuple[int, int] = (224, 224),
    scale: tuple[float, float] = (0.3, 1.0),
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure both ways on up to `images` images at `path`; return the figures that are printed.

    Raises:
        Refused: nothing there that could be used.
    """
    source = open_source(path)
    chosen = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist()
    files = [file for file in map(source.image, chosen) if _readable(file)]
    if not files:
        raise Refused("data.path", f"none of {len(chosen)} images at {path} can be decoded")
    count = len(files)
    draws = words(0, Stream.CROP, np.arange(count), WORDS)
    sizes = [image_size_of(file) for file in files]
    boxes = [random_resized_crop_box(draw, *size, scale, _RATIO) for draw, size in zip(draws, sizes, strict=True)]
    dataset = StepDataset(
        source, LoaderPlan(_TURN, _TURN), 0, image_size, scale, _RATIO, _bare_batch, Order(0, len(source))
    )

    def ours(i: int) -> Tensor:
        return crop_resize(decode(files[i]), boxes[i], image_size)

    ways: dict[str, Callable[[range], object]] = {
        "usual": lambda turn: [_usual(files[i], boxes[i], image_size) for i in turn],
        "ours": lambda turn: [ours(i) for i in turn],
        "ours: decode": lambda turn: [decode(files[i]) for i in turn],
        # Other images than the turn's, and the same ones over an epoch.
        "ours: loader": lambda turn: dataset[turn.start // _TURN],
    }
    seconds = _measure(ways, count, repeats)
    psnr = np.array([_psnr(ours(i), _exact(files[i], boxes[i], image_size)) for i in range(count)])
    result = {
        "images": count,
        "image_size": list(image_size),
        "images_per_cpu_second": {name: 1 / value for name, value in seconds.items()},
        "ratio": seconds["usual"] / seconds["ours"],
        "loader_overhead": seconds["ours: loader"] / seconds["ours"] - 1,
        "psnr_mean": float(psnr.mean()),
        **{f"psnr_percentile_{q}": float(np.percentile(psnr, q)) for q in (0, 1, 5, 50)},
        "images_per_second_by_workers": _scaling(source, image_size, scale, count),
        "cores_for_4200_images_per_second": 4200 * seconds["ours: loader"],
    }
    _describe(result, echo)
    return result


def _measure(ways: dict[str, Callable[[range], object]], count: int, repeats: int) -> dict[str, float]:
    """Return CPU-seconds an image of each way: the median over repeats, which take turns every few images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    totals = np.zeros((repeats + 1, len(ways)))
    turns = [range(start, min(start + _TURN, count)) for start in range(0, count, _TURN)]
    measured = [turn for turn in turns if len(turn) == _TURN] or turns
    try:
        for repeat in range(repeats + 1):
            for turn in measured:
                for column, way in enumerate(ways.values()):
                    start = time.process_time()
                    way(turn)
                    totals[repeat, column] += time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    images = sum(len(turn) for turn in measured)
    return dict(zip(ways, (np.median(totals[1:], axis=0) / images).tolist(), strict=True))  # the first warms up


def _scaling(
    source: Source, size: tuple[int, int], scale: tuple[float, float], count: int, epochs: int = 3
) -> dict[str, float]:
    """Return images a second of wall time by number of loader processes, up to the machine's cores."""
    found = {}
    steps = max(2, epochs * count // _TURN)
    for workers in range(1, len(os.sched_getaffinity(0)) + 1):
        loader = Loader(
            source,
            seed=0,
            global_batch=_TURN,
            micro_batch=_TURN,
            image_size=size,
            crop_scale=scale,
            crop_ratio=_RATIO,
            collate=_bare_batch,
            workers=workers,
        )
        batches = loader.iterate(0, steps + workers)
        for _ in range(workers):  # starting the processes is not their speed
            next(batches)
        begun = time.perf_counter()
        done = sum(len(batch.pixels) for batch in batches)
        found[str(workers)] = done / (time.perf_counter() - begun)
    return found


def _readable(file: bytes) -> bool:
    try:
        decode(file)
    except DecodeError:
        return False
    return True


def _exact(file: bytes, box: Box, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    top, left, height, width = box
    with Image.open(io.BytesIO(file)) as image:
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
        return np.array(crop.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _usual(file: bytes, box: Box, size: tuple[int, int]) -> Tensor:
    pixels = torch.from_numpy(_exact(file, box, size)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(_MEAN).div_(_STD)


def _psnr(ours: Tensor, exact: npt.NDArray[np.uint8]) -> float:
    error = float(np.mean((ours.permute(1, 2, 0).numpy().astype(np.float64) - exact) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-3))  # at most 78 dB: a level's difference in a thousand values


def _bare_batch(positions: object, pixels: Tensor, indices: object, replaced: object) -> Batch:
    nothing = torch.empty(0, dtype=torch.int64)
    no_sequences = Sequences(nothing, torch.zeros(1, dtype=torch.int32), ())
    return Batch(pixels, no_sequences, no_sequences, no_sequences, no_sequences, nothing.float())


def _describe(result: dict[str, Any], echo: Callable[[str], None]) -> None:
    rates = result["images_per_cpu_second"]
    echo(f"{result['images']} images to {result['image_size'][0]} x {result['image_size'][1]}, images a CPU-second:")
    for name, rate in rates.items():
        echo(f"  {name:14s} {rate:8.1f}   {rate / rates['usual']:.2f} x")
    echo(f"PSNR to the exact path: {result['psnr_mean']:.1f} dB, 1st percentile {result['psnr_percentile_1']:.1f} dB")
    shares = ", ".join(f"{q} %: {result[f'psnr_percentile_{q}']:.1f}" for q in (0, 1, 5, 50))
    echo(f"PSNR by percentile, dB: {shares}")
    by_workers = ", ".join(f"{n}: {rate:.0f}" for n, rate in result["images_per_second_by_workers"].items())
    echo(f"images a second by loader processes (wall time): {by_workers}")
    echo(f"loader beside decode and resize: {100 * result['loader_overhead']:.1f} %")
    echo(f"cores for 4,200 images/s: {result['cores_for_4200_images_per_second']:.1f}")
