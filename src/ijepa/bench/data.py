"""Images per CPU-second that this machine turns into training pixels, compared with the usual pipeline of the field.

Both methods process the same files and boxes in one process and one thread, and take turns of one micro-batch. The
files are in memory: reading depends on the disk and not on the method.

The usual method is that of `torchvision.transforms` with Pillow: decode to RGB, crop, resize with the antialiased
bilinear filter, convert to a float tensor, normalize. Ours is `decode_for` and `crop_resize`, which end in bytes,
because the device normalizes. PSNR compares these bytes with Pillow's, in decibels.

The loader makes whole micro-batches of the same images and boxes in its own process, with everything that a recipe
draws for them, and copies them to the parent that trains. Its time is that of both processes. What it takes more than
decoding and resizing in the same turns is its overhead, given as a share of the decoding time.
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
from ijepa.data.loading.decode import Pixels, decode_for
from ijepa.data.loading.loader import Collate, Loader, LoaderConfig
from ijepa.data.loading.turbojpeg import library
from ijepa.data.loading.workers import Worker
from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.masking.batch import Batch
from ijepa.masking.packing import Packer
from ijepa.utils.allocator import keep_freed_memory
from ijepa.utils.cores import available_cores
from ijepa.utils.random import Stream, random_bits

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

Files = list[tuple[bytes, Box]]


def bench_data(
    path: str | Path, recipe: Recipe, *, images: int = 280, micro: int = 128, repeats: int = 12
) -> dict[str, Any]:
    """Measure the methods on up to `images` images at `path`, cropped and masked by `recipe`, `micro` per turn.

    Raises:
        UserError: no usable data set at `path`.
        RunError: no image can be decoded.
    """
    keep_freed_memory()  # as training does
    source = open_dataset(path)
    micro = min(micro, images, len(source))
    turns = range(max(1, min(images, len(source)) // micro))
    size, encoder = recipe.model.image_size, recipe.model.encoder
    packer = Packer(recipe.mask, recipe.model.grid, recipe.seed, micro, encoder.depth, encoder.drop_path)
    loader = _loader(source, recipe, micro, _CpuTime(packer))
    files = [_files(loader, source, recipe, turn) for turn in turns]
    made = torch.empty(micro, 3, *size, dtype=torch.uint8, memory_format=torch.channels_last).numpy()
    worker = Worker(loader.dataset.make, loader.config.pixel_shape, slots=1)
    methods: dict[str, Callable[[int], object]] = {
        "usual": lambda turn: [_usual(*given, size) for given in files[turn]],
        "ours": lambda turn: [our_crop(*given, size, out) for given, out in zip(files[turn], made, strict=True)],
        "ours: decode": lambda turn: deque((_decoded(*given) for given in files[turn]), maxlen=0),
        "ours: loader": lambda turn: _batch(worker, turn),
    }
    with _one_core(worker):
        rounds = _measure(methods, turns, repeats) / (len(turns) * micro)
    usual, ours, decode, whole = rounds
    psnrs = [psnr(our_crop(*given, size), pillow_crop(*given, size)) for turn in files for given in turn]
    return {
        "recipe": recipe.name,
        "images": len(turns) * micro,
        "micro": micro,
        "image_size": list(size),
        "jpeg_boxes": library() is not None,
        "images_per_cpu_second": dict(zip(methods, (1 / np.median(rounds, axis=1)).tolist(), strict=True)),
        "ratio": float(np.median(usual / ours)),
        "loader_overhead": float(np.median((whole - ours) / decode)),
        "psnr_mean": float(np.mean(psnrs)),
        **{f"psnr_percentile_{q}": float(np.percentile(psnrs, q)) for q in (0, 1, 5, 50)},
        "images_per_second_by_workers": _scaling(source, recipe, micro, packer, 3 * len(turns)),
        "cores_for_4200_images_per_second": 4200 * float(np.median(whole)),
    }


@dataclass(frozen=True)
class _CpuTime:
    """A loader's collate that also returns the CPU time of its process, in place of the replaced names."""

    collate: Collate

    def __call__(self, *parts: Any) -> Batch:
        return replace(self.collate(*parts), replaced=(str(time.process_time()),))


def _loader(source: Source, recipe: Recipe, micro: int, collate: Collate, workers: int = 0) -> Loader:
    config = LoaderConfig(
        seed=recipe.seed,
        image_size=recipe.model.image_size,
        crop_scale=recipe.data.crop_scale,
        crop_ratio=recipe.data.crop_ratio,
        global_batch=micro,
        micro_batch=micro,
        workers=workers,
    )
    return Loader(source, config, collate)


def image_size(file: bytes) -> tuple[int, int]:
    """Return (height, width) of an image file."""
    with Image.open(io.BytesIO(file)) as image:
        return image.height, image.width


def _files(loader: Loader, source: Source, recipe: Recipe, number: int) -> Files:
    """Return the files and boxes of micro-batch `number`."""
    batch = loader.dataset[number]
    draws = random_bits(recipe.seed, Stream.CROP, batch.positions, WORDS)
    scale, ratio = recipe.data.crop_scale, recipe.data.crop_ratio
    return [
        (file, random_resized_crop_box(draw, *image_size(file), scale, ratio))
        for draw, file in zip(draws, map(source.image, batch.indices), strict=True)
    ]


def _batch(worker: Worker, number: int) -> float:
    """Have a micro-batch made and copy it; return the CPU-seconds that the worker has used since its start."""
    worker.ask(number, 0)
    return float(worker.answer(number, 0, pin=False, timeout=None).replaced[0])


@contextmanager
def _one_core(worker: Worker) -> Iterator[None]:
    """Pin this process, with one thread, and `worker` to one core, because cores differ in speed. End the worker.

    Where a process has no CPU affinity (macOS), only the number of threads is set.
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


def _measure(methods: dict[str, Callable[[int], object]], turns: range, repeats: int) -> npt.NDArray[np.float64]:
    """Return CPU-seconds (methods, repeats); within a repeat the methods take turns.

    A method that returns a float also works in another process, and returns the CPU time of that since its start.
    """
    totals = np.zeros((len(methods), repeats + 1))
    elsewhere = 0.0
    for repeat in range(repeats + 1):
        for turn in turns:
            for row, method in enumerate(methods.values()):
                start = time.process_time()
                result = method(turn)
                totals[row, repeat] += time.process_time() - start
                if isinstance(result, float):
                    totals[row, repeat] += result - elsewhere
                    elsewhere = result
    return totals[:, 1:]  # the first repeat warms up


def _scaling(source: Source, recipe: Recipe, micro: int, packer: Packer, steps: int) -> dict[str, float]:
    """Return images per second of wall time by number of loader processes, up to the number of cores."""
    rates = {}
    for workers in range(1, available_cores() + 1):
        batches = _loader(source, recipe, micro, packer, workers).iterate(0, steps + workers)
        for _ in range(workers):  # do not measure the start of the processes
            next(batches)
        start = time.perf_counter()
        images = sum(len(batch.pixels) for batch in batches)
        rates[str(workers)] = images / (time.perf_counter() - start)
    return rates


def pillow_crop(file: bytes, box: Box, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Decode, crop and resize with Pillow: (H, W, 3)."""
    top, left, height, width = box
    with Image.open(io.BytesIO(file)) as image:
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
        return np.array(crop.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _usual(file: bytes, box: Box, size: tuple[int, int]) -> Tensor:
    pixels = torch.from_numpy(pillow_crop(file, box, size)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(_MEAN).div_(_STD)


def _decoded(file: bytes, box: Box) -> tuple[npt.NDArray[np.uint8], Box]:
    pixels, (inside,) = decode_for(file, lambda height, width: [box])
    return pixels, inside


def our_crop(file: bytes, box: Box, size: tuple[int, int], out: Pixels | None = None) -> Tensor:
    """Decode, crop and resize as the loader does: (3, H, W) uint8, into `out` if given."""
    return crop_resize(*_decoded(file, box), size, out=out)


def psnr(ours: Tensor, exact: npt.NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of `ours` (3, H, W) to `exact` (H, W, 3) in decibels, at most 78."""
    error = float(np.mean((ours.permute(1, 2, 0).numpy().astype(np.float64) - exact) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-3))  # 1e-3: one level of difference in a thousand values
