"""How many images a CPU-second this machine turns into training pixels, beside the field's usual way.

Both ways work on the same files and the same boxes, in one process and one thread, in turns of a micro-batch, so that
whatever else the machine does falls on both. Time is the process's CPU time; reading is left out (the files are in
memory), because it depends on the disk and not on the method.

The usual way is what `torchvision.transforms` does with Pillow: decode to RGB, crop and resize with the antialiased
bilinear filter, to a float tensor, normalise. Ours is `decode` and `crop_resize`, which end in bytes: normalising is
the device's work. `psnr` compares their bytes with Pillow's, in decibels.

The loader makes whole micro-batches of the same images and boxes in a process of its own, with everything that a recipe
draws for them, and the copy to the parent that trains. Its time is that of both processes; what is left of it beside
`ours`, decode and resize of the same turns, is the loader's overhead, told as a share of decode's time.
"""

import io
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ijepa.config.recipe import Recipe
from ijepa.data.loading.crop import WORDS, Box, crop_resize, random_resized_crop_box
from ijepa.data.loading.decode import Pixels, decode_for, image_size
from ijepa.data.loading.loader import Collate, Loader, LoaderConfig
from ijepa.data.loading.turbojpeg import library
from ijepa.data.loading.workers import Worker
from ijepa.data.open import open_source
from ijepa.data.sources.base import Source
from ijepa.masking.batch import Batch
from ijepa.masking.packing import Packer
from ijepa.utils.allocator import keep_freed_memory
from ijepa.utils.cores import available_cores
from ijepa.utils.random import Stream, words

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


Files = list[tuple[bytes, Box]]
Way = Callable[[int, Files], object]


def bench_data(
    path: str | Path,
    recipe: Recipe,
    *,
    images: int = 280,
    micro: int = 128,
    repeats: int = 12,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the ways on up to `images` images at `path`, cropped and masked by `recipe`; return what is printed.

    `micro` images are a turn, and a micro-batch of the loader's: it spreads what a batch costs over its images.

    Raises:
        UserError: nothing there that could be used.
        RunError: nothing there that can be decoded.
    """
    keep_freed_memory()  # as training does
    source = open_source(path)
    micro = min(micro, images, len(source))
    turns = range(max(1, min(images, len(source)) // micro))
    size = recipe.model.image_hw
    encoder = recipe.model.encoder
    packer = Packer(recipe.mask, recipe.model.grid, recipe.seed, micro, encoder.depth, encoder.drop_path)
    loader = _loader(source, recipe, micro, _Stamped(packer))
    files = {turn: _files(loader, source, recipe, turn) for turn in turns}
    made = torch.empty(micro, 3, *size, dtype=torch.uint8, memory_format=torch.channels_last).numpy()
    worker = Worker(loader.dataset.make, loader.config.pixel_shape, slots=1)
    with _one_core(worker):
        ways: dict[str, Way] = {
            "usual": lambda _, turn: [_usual(file, box, size) for file, box in turn],
            "ours": lambda _, turn: [_ours(*given, size, out) for given, out in zip(turn, made, strict=True)],
            "ours: decode": lambda _, turn: deque((_decoded(file, box) for file, box in turn), maxlen=0),
            "ours: loader": lambda number, _: _made(worker, number),
        }
        rounds = _measure(ways, files, repeats)
    psnr = np.array([_psnr(_ours(file, box, size), _exact(file, box, size)) for t in turns for file, box in files[t]])
    seconds = {name: float(np.median(values)) for name, values in rounds.items()}
    overhead = (rounds["ours: loader"] - rounds["ours"]) / rounds["ours: decode"]
    result = {
        "recipe": recipe.name,
        "images": len(turns) * micro,
        "micro": micro,
        "image_size": list(size),
        "jpeg_boxes": library() is not None,
        "images_per_cpu_second": {name: 1 / value for name, value in seconds.items()},
        "ratio": float(np.median(rounds["usual"] / rounds["ours"])),
        "loader_overhead": float(np.median(overhead)),
        "psnr_mean": float(psnr.mean()),
        **{f"psnr_percentile_{q}": float(np.percentile(psnr, q)) for q in (0, 1, 5, 50)},
        "images_per_second_by_workers": _scaling(source, recipe, micro, packer, 3 * len(turns)),
        "cores_for_4200_images_per_second": 4200 * seconds["ours: loader"],
    }
    _describe(result, echo)
    return result


@dataclass(frozen=True)
class _Stamped:
    """A loader's collate that also says how much CPU time its process has taken, in the place of replaced names."""

    collate: Collate

    def __call__(self, *parts: Any) -> Batch:
        return replace(self.collate(*parts), replaced=(str(time.process_time()),))


def _loader(source: Source, recipe: Recipe, micro: int, collate: Collate, workers: int = 0) -> Loader:
    config = LoaderConfig(
        seed=recipe.seed,
        image_size=recipe.model.image_hw,
        crop_scale=recipe.data.crop_scale,
        crop_ratio=recipe.data.crop_ratio,
        global_batch=micro,
        micro_batch=micro,
        workers=workers,
    )
    return Loader(source, config, collate)


def _files(loader: Loader, source: Source, recipe: Recipe, number: int) -> Files:
    """Return the files and boxes that micro-batch `number` is made of."""
    batch = loader.dataset[number]
    draws = words(recipe.seed, Stream.CROP, batch.positions, WORDS)
    files = [source.image(index) for index in batch.indices]
    scale, ratio = recipe.data.crop_scale, recipe.data.crop_ratio
    return [
        (file, random_resized_crop_box(draw, *image_size(file), scale, ratio))
        for draw, file in zip(draws, files, strict=True)
    ]


def _made(worker: Worker, number: int) -> float:
    """Have a micro-batch made and take it over; return the CPU-seconds that its process has taken until then."""
    worker.ask(number, 0)
    return float(worker.answer(number, 0, pin=False, timeout=None).replaced[0])


@contextmanager
def _one_core(worker: Worker) -> Iterator[None]:
    """Keep this process, with one thread, and `worker`, which ends here, on one core: no two are equally fast.

    Only the number of threads is set where a process has no CPU affinity (macOS).
    """
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    torch.set_num_threads(1)
    for process in (0, worker.process.pid or 0) if cores else ():
        os.sched_setaffinity(process, {min(cores)})
    try:
        yield
    finally:
        worker.end()
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def _measure(ways: dict[str, Way], files: dict[int, Files], repeats: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return CPU-seconds an image of each way by repeat (repeats,); in each they take turns.

    A way that returns a float works in another process too, and tells how much that one has taken since its start.
    """
    totals = np.zeros((repeats + 1, len(ways)))
    elsewhere = 0.0
    for repeat in range(repeats + 1):
        for number, turn in files.items():
            for column, way in enumerate(ways.values()):
                start = time.process_time()
                done = way(number, turn)
                totals[repeat, column] += time.process_time() - start
                if isinstance(done, float):
                    totals[repeat, column] += done - elsewhere
                    elsewhere = done
    images = sum(map(len, files.values()))
    return dict(zip(ways, totals[1:].T / images, strict=True))  # the first warms up


def _scaling(source: Source, recipe: Recipe, micro: int, packer: Packer, steps: int) -> dict[str, float]:
    """Return images a second of wall time by number of loader processes, up to the machine's cores."""
    found = {}
    for workers in range(1, available_cores() + 1):
        batches = _loader(source, recipe, micro, packer, workers).iterate(0, steps + workers)
        for _ in range(workers):  # starting the processes is not their speed
            next(batches)
        begun = time.perf_counter()
        done = sum(len(batch.pixels) for batch in batches)
        found[str(workers)] = done / (time.perf_counter() - begun)
    return found


def _exact(file: bytes, box: Box, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    top, left, height, width = box
    with Image.open(io.BytesIO(file)) as image:
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
        return np.array(crop.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _usual(file: bytes, box: Box, size: tuple[int, int]) -> Tensor:
    pixels = torch.from_numpy(_exact(file, box, size)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(_MEAN).div_(_STD)


def _decoded(file: bytes, box: Box) -> tuple[npt.NDArray[np.uint8], Box]:
    pixels, (inside,) = decode_for(file, lambda height, width: [box])
    return pixels, inside


def _ours(file: bytes, box: Box, size: tuple[int, int], out: Pixels | None = None) -> Tensor:
    return crop_resize(*_decoded(file, box), size, out=out)


def _psnr(ours: Tensor, exact: npt.NDArray[np.uint8]) -> float:
    error = float(np.mean((ours.permute(1, 2, 0).numpy().astype(np.float64) - exact) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-3))  # at most 78 dB: a level's difference in a thousand values


def _describe(result: dict[str, Any], echo: Callable[[str], None]) -> None:
    if not result["jpeg_boxes"]:
        echo("JPEGs are decoded as a whole; with the extra turbojpeg, hardly more than the crop")
    rates = result["images_per_cpu_second"]
    echo(f"{result['images']} images to {result['image_size'][0]} x {result['image_size'][1]}, images a CPU-second:")
    for name, rate in rates.items():
        echo(f"  {name:14s} {rate:8.1f}   {rate / rates['usual']:.2f} x")
    echo(f"PSNR to the exact path: {result['psnr_mean']:.1f} dB, 1st percentile {result['psnr_percentile_1']:.1f} dB")
    shares = ", ".join(f"{q} %: {result[f'psnr_percentile_{q}']:.1f}" for q in (0, 1, 5, 50))
    echo(f"PSNR by percentile, dB: {shares}")
    by_workers = ", ".join(f"{n}: {rate:.0f}" for n, rate in result["images_per_second_by_workers"].items())
    echo(f"images a second by loader processes (wall time): {by_workers}")
    echo(f"loader beside decode and resize: {100 * result['loader_overhead']:.1f} % of decode's time")
    echo(f"cores for 4,200 images/s: {result['cores_for_4200_images_per_second']:.1f}")
