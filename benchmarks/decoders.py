"""Other libraries and settings for decoding and resizing, compared with `ijepa.data` on the same images and boxes.

    python benchmarks/decoders.py --data.path IMAGES --output benchmarks/results/cpu-decoders.json

Libraries that are not installed are left out (`pip install imagecodecs kornia-rs` for these two). All methods take
turns of 16 images in one process. Results are images per CPU-second, relative to `ours`, and the 1st percentile of the
PSNR to Pillow's exact decode and resize.
"""

import importlib
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from ijepa.bench.data import our_crop, pillow_crop, psnr
from ijepa.data.loading.crop import WORDS, Box, crop_resize, random_resized_crop_box
from ijepa.data.loading.decode import decode, image_size
from ijepa.data.open import open_dataset
from ijepa.utils.environment import machine
from ijepa.utils.random import Stream, random_bits

SIZE, SCALE, RATIO, TURN = (224, 224), (0.3, 1.0), (3 / 4, 4 / 3), 16
Way = Callable[[bytes, Box], Tensor]


def scaled(data: bytes, box: Box) -> Tensor:
    """Decode at the smallest scale of libjpeg at which the crop is at least as large as the result."""
    height, width = image_size(data)
    least = max(SIZE[0] / box.height, SIZE[1] / box.width)
    small = simplejpeg.decode_jpeg(data, "RGB", min_height=int(height * least), min_width=int(width * least))
    share = small.shape[0] / height
    top, left, tall, wide = (max(1, round(side * share)) for side in box)
    inside = Box(top, left, min(tall, small.shape[0] - top), min(wide, small.shape[1] - left))
    return crop_resize(small, inside, SIZE)


def draft(data: bytes, box: Box) -> Tensor:
    """Pillow's own shortcut: a draft of the file and a reduced resize."""
    top, left, height, width = box
    with Image.open(io.BytesIO(data)) as image:
        whole = image.size
        least = max(SIZE[0] / height, SIZE[1] / width)
        image.draft("RGB", (int(whole[0] * least), int(whole[1] * least)))
        share = image.size[0] / whole[0]
        part = (left * share, top * share, (left + width) * share, (top + height) * share)
        small = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR, box=part, reducing_gap=2.0)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def strided(data: bytes, box: Box) -> Tensor:
    """Resize the crop as a view of the image, which torch treats as planes."""
    top, left, height, width = box
    view = torch.from_numpy(decode(data)[top : top + height, left : left + width]).permute(2, 0, 1)
    return torch.nn.functional.interpolate(view[None], SIZE, mode="bilinear", antialias=True)[0]


def _by(read: Callable[..., object], more: tuple[str, ...], data: bytes, box: Box) -> Tensor:
    pixels = np.asarray(read(data, *more))
    return crop_resize(pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2), box, SIZE)


def ways() -> dict[str, Way]:
    """Return all methods that can be measured here."""
    found: dict[str, Way] = {
        "ours": lambda data, box: our_crop(data, box, SIZE),
        "ours, of whole images": lambda data, box: crop_resize(decode(data), box, SIZE),
        "whole images, strided crops": strided,
        "simplejpeg, fast DCT": lambda data, box: crop_resize(
            simplejpeg.decode_jpeg(data, "RGB", fastdct=True), box, SIZE
        ),
        "simplejpeg, fast upsampling": lambda data, box: crop_resize(
            simplejpeg.decode_jpeg(data, "RGB", fastupsample=True), box, SIZE
        ),
        "simplejpeg, scaled by DCT": scaled,
        "Pillow, draft": draft,
    }
    libraries = (("imagecodecs", "jpeg8_decode", ()), ("kornia_rs.io", "decode_image_jpegturbo", ("rgb",)))
    for name, function, more in libraries:
        try:
            read = getattr(importlib.import_module(name), function)
        except (ImportError, AttributeError):
            continue
        found[name.partition(".")[0]] = partial(_by, read, more)
    return found


@click.command()
@click.option("--data.path", "path", required=True)
@click.option("--repeats", default=4, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(path: str, repeats: int, output: Path) -> None:
    """Measure every method."""
    torch.set_num_threads(1)
    source = open_dataset(path)
    files = [source.image(index) for index in range(len(source))]
    draws = random_bits(0, Stream.CROP, np.arange(len(files)), WORDS)
    boxes = [random_resized_crop_box(d, *image_size(f), SCALE, RATIO) for d, f in zip(draws, files, strict=True)]
    exact = [pillow_crop(file, box, SIZE) for file, box in zip(files, boxes, strict=True)]
    tried, pool = ways(), ThreadPoolExecutor(2)
    runs: dict[str, Callable[[range], object]] = {
        name: lambda turn, way=way: [way(files[i], boxes[i]) for i in turn] for name, way in tried.items()
    }
    ours = tried["ours"]
    runs["ours, two threads"] = lambda turn: list(pool.map(lambda i: ours(files[i], boxes[i]), turn))
    totals = np.zeros((repeats + 1, len(runs)))
    for repeat in range(repeats + 1):
        for start in range(0, len(files), TURN):
            turn = range(start, min(start + TURN, len(files)))
            for column, run in enumerate(runs.values()):
                begun = time.process_time()
                run(turn)
                totals[repeat, column] += time.process_time() - begun
    seconds = dict(zip(runs, np.median(totals[1:], axis=0) / len(files), strict=True))
    rows = {}
    for name, value in seconds.items():
        way = tried.get(name, ours)
        psnrs = [psnr(way(f, b), e) for f, b, e in zip(files, boxes, exact, strict=True)]
        rows[name] = {
            "images_per_cpu_second": 1 / value,
            "times_ours": seconds["ours"] / value,
            "psnr_percentile_1": float(np.percentile(psnrs, 1)),
        }
        row = rows[name]
        click.echo(f"{name:28s} {1 / value:7.1f}  {row['times_ours']:.2f} x  {row['psnr_percentile_1']:.1f} dB")
    output.write_text(json.dumps({**machine(), "images": len(files), "ways": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
