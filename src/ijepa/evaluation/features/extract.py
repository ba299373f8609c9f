"""Images to features of whole images, once: what linear probe and kNN read, cached under a hash of what made it.

An image's features are its patches' mean, for each of the last blocks: (n, L, D), earliest block first, so that
`x[:, -1]` is the last block and `x.flatten(1)` the field's "last 4 concatenated". They are computed in the encoder's
precision (`precision`) and stored in float16, cached or not: a result must not depend on whether a file was there.

A cached file's name holds the hash and how many blocks are in it, and a file with more blocks serves for fewer: the
linear probe's serves kNN. Encoders that are no `nn.Module` are not cached: nobody knows what decides their output.

An encoder whose patches' mean would mean nothing says itself what its image features are, by a method
`image_features`: raw pixels do, because the mean of their patches would be little more than the mean colour.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ijepa.data.loading.crop import Interpolation, center_crop_box, crop_resize
from ijepa.data.loading.decode import DecodeError, decode
from ijepa.data.sources.base import Sample, Source
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.evaluation.features.precision import name_of
from ijepa.model.vision_transformer import patchify
from ijepa.utils.cores import available_cores
from ijepa.utils.errors import RunError

Progress = Callable[[str], None]

FORMAT = 1
"""Part of every cache file's name: raise it when the same encoder and images would give other features."""

Indices = npt.NDArray[np.int64]

View = Callable[[npt.NDArray[np.uint8], int], Tensor]
"""From an image (H, W, 3) and its place among those asked for to pixels (3, h, w) uint8."""


class Encoder(Protocol):
    """An encoder as this room sees it: images (B, 3, H, W) uint8 to patch features (B, N, D) float32."""

    embed_dim: int
    patch_size: int
    grid: tuple[int, int]

    def forward_blocks(self, pixels: Tensor, last: int) -> list[Tensor]:
        """Return the outputs of the last `last` blocks, earliest first, the final norm applied: (B, N, D) each."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the last block's output (B, N, D)."""
        ...


class PixelEncoder(nn.Module):
    """Raw pixels in an encoder's place: what the images give away without any learning.

    Args:
        image_size: native height and width in pixels.
        patch_size: side of a patch in pixels.
        reduced: side to which whole images are reduced at most.
    """

    def __init__(self, image_size: tuple[int, int], patch_size: int, reduced: int = 32) -> None:
        super().__init__()
        self.reduced = reduced  # plain settings are part of the hash that names cached features
        self.patch_size, self.embed_dim = patch_size, 3 * patch_size**2
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)

    def forward_blocks(self, pixels: Tensor, last: int = 1) -> list[Tensor]:
        """Return the patches' pixels (B, N, 3 * p * p) in [0, 1], as one block whatever `last` is."""
        return [patchify(pixels, self.patch_size).float().div(255).unflatten(0, (len(pixels), -1))]

    def image_features(self, pixels: Tensor, last: int) -> Tensor:
        """Return the whole image, reduced by areas to at most `reduced` a side, as (B, 1, 3 * h * w) in [0, 1]."""
        height, width = (min(self.reduced, side) for side in pixels.shape[-2:])
        return adaptive_avg_pool2d(pixels.float() / 255, (height, width)).flatten(1)[:, None]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return `forward_blocks`' only block."""
        return self.forward_blocks(pixels)[0]


@dataclass(frozen=True)
class FeatureSet:
    """Features of a source's images: `x` (n, L, D) float16 of the last L blocks, `y` (n,) int64, -1 without a label."""

    x: Tensor
    y: Tensor


def image_features(encoder: Encoder, pixels: Tensor, last: int) -> Tensor:
    """Return features of whole images (B, L, D), L <= `last`: the encoder's own, or each block's mean patch."""
    own = getattr(encoder, "image_features", None)
    if own is not None:
        return own(pixels, last)
    return torch.stack([block.mean(dim=1) for block in encoder.forward_blocks(pixels, last)], dim=1)


@torch.no_grad()
def extract(
    encoder: Encoder,
    source: Source,
    indices: Indices | None = None,
    *,
    image_size: tuple[int, int],
    last: int,
    cache: Path | None,
    label: str,
    crop_fraction: float = 0.875,
    interpolation: Interpolation = "bilinear",
    batch_size: int = 64,
    progress: Progress | None = None,
    ranks: World = SINGLE_PROCESS,
) -> FeatureSet:
    """Return the features of images of a source, in the order given; from `cache` where they are there.

    Args:
        encoder: makes the features, where its parameters lie.
        source: the images.
        indices: which of them, all if None.
        image_size: height and width in pixels that every image is brought to.
        last: blocks to take, from the last one backwards.
        cache: folder of cached features; none is read or written if None.
        label: names encoder and set in progress and in errors.
        crop_fraction: share of the short side that the central crop keeps; .875 is "resize to 256, crop 224".
        interpolation: how images are brought to that size.
        batch_size: images a forward pass.
        progress: told one line whenever a tenth is done.
        ranks: the processes that share the work; each returns all features.

    Raises:
        RunError: an image cannot be decoded, features are not finite, or the cache cannot be written or read.
    """
    chosen = np.arange(len(source)) if indices is None else indices
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    y = torch.from_numpy(labels[chosen].astype(np.int64))
    stem = ""
    if cache is not None and isinstance(encoder, nn.Module):
        images = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
        computed = name_of(getattr(encoder, "precision", torch.float32))
        setting = (FORMAT, image_size, crop_fraction, interpolation, computed, "float16", source.stamp, images)
        name = hashlib.sha256(repr((weights_hash(encoder), *setting)).encode()).hexdigest()
        stem = f"features-{name[:32]}"
        saved = [int(file.stem.rpartition("-")[2]) for file in cache.glob(f"{stem}-*.safetensors")]
        enough = min((blocks for blocks in saved if blocks >= last), default=0)
        if all(ranks.all_gather_object(bool(enough))):
            return FeatureSet(_load(cache / f"{stem}-{enough}.safetensors", last), y)
    rows, done = ranks.batch_rows(len(chosen), batch_size), 0
    blank = torch.zeros(1, 3, *image_size, dtype=torch.uint8, device=device_of(encoder))
    # One block of memory: at the end, all parts beside their sum would take it twice.
    features = torch.zeros(len(chosen), *image_features(encoder, blank, last).shape[1:], dtype=torch.float16)
    view = central_view(image_size, crop_fraction, interpolation)
    for pixels in pixel_batches(source, chosen[rows], view, batch_size):
        x = image_features(encoder, pixels.to(device_of(encoder)), last).to(torch.float16).cpu()
        if not bool(x.isfinite().all()):
            first, final = (source.name(int(chosen[rows[place]])) for place in (done, done + len(x) - 1))
            raise RunError(f"{label}: features are not finite in float16, in the batch from {first} to {final}")
        before, done = done, done + len(x)
        features[torch.from_numpy(rows[before:done])] = x
        if progress is not None and 10 * before // len(rows) < 10 * done // len(rows):
            progress(f"{label}: features of {done} of {len(rows)} images")
    features = ranks.fill_rows(features)
    if cache is not None and stem and ranks.rank == 0:
        _save(cache / f"{stem}-{last}.safetensors", features)
    return FeatureSet(features, y)


_HASHED_NAMES = {"FrozenEncoder": "Encoder"}
"""Former names of renamed classes, so that hashes in results from before the renaming stay valid."""


def weights_hash(encoder: nn.Module) -> str:
    """Return a SHA-256 of all that decides an encoder's output.

    That is, for every module in it, its class, its plain settings (heads and epsilons are in no state dict), its
    parameters and its buffers, those that checkpoints leave out among them.
    """
    digest = hashlib.sha256()
    for name, module in encoder.named_modules():
        plain = [(k, v) for k, v in sorted(vars(module).items()) if _plain(v) and k[0] != "_" and k != "training"]
        kind = type(module).__qualname__
        digest.update(repr((name, _HASHED_NAMES.get(kind, kind), plain)).encode())
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            digest.update(repr((key, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def device_of(encoder: Encoder) -> torch.device:
    """Return where an encoder's parameters lie."""
    tensors = encoder.parameters() if isinstance(encoder, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def central_view(size: tuple[int, int], fraction: float, interpolation: Interpolation = "bilinear") -> View:
    """Return the view that looks at an image's middle."""

    def view(image: npt.NDArray[np.uint8], place: int) -> Tensor:
        height, width = image.shape[:2]
        return crop_resize(image, center_crop_box(height, width, size, fraction), size, interpolation)

    return view


def pixel_batches(source: Source, indices: Indices, view: View, batch: int) -> Iterator[Tensor]:
    """Yield pixels (B, 3, h, w) uint8 of views of images; while one batch is used, threads decode the next.

    Raises:
        RunError: an image cannot be decoded; the line names it.
    """

    def pixels_of(sample: Sample, place: int) -> Tensor:
        try:
            image = decode(sample.image)
        except DecodeError as error:
            raise RunError(f"{sample.name}: {error}") from error
        return view(image, place)

    # Files are read here, one after the other: a source is not made for threads; decoding is what takes long.
    starts = [*range(0, len(indices), batch), len(indices)]
    with ThreadPoolExecutor(min(8, available_cores())) as pool:
        waiting: list[Future[Tensor]] = []
        try:
            for start, stop in pairwise(starts):
                ahead = [pool.submit(pixels_of, source[int(indices[place])], place) for place in range(start, stop)]
                if waiting:
                    yield torch.stack([future.result() for future in waiting])
                waiting = ahead
            if waiting:
                yield torch.stack([future.result() for future in waiting])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _load(file: Path, last: int) -> Tensor:
    """Return the last blocks alone: a view of all of them would hold the rest in memory, too."""
    try:
        with safe_open(file, "pt") as stored:
            return stored.get_slice("x")[:, -last:]
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(f"{file}: cached features cannot be read ({error}); delete the file") from error


def _save(file: Path, x: Tensor) -> None:
    """Write features so that the file is complete or absent."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": x}, new)
        new.replace(file)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: features cannot be cached: {error}") from error
    finally:
        new.unlink(missing_ok=True)
