"""Features of whole images, cached under a hash of everything that decides them; linear probe and kNN read them.

The features of an image are the means of its patches in each of the last blocks: (n, L, D), earliest block first, so
that `x[:, -1]` is the last block and `x.flatten(1)` the concatenation of the last L blocks. The encoder computes in its
own precision (see `precision`); features are stored in float16, cached or not, so that a result does not depend on
the cache.

The name of a cache file ends in its number of blocks. A file with more blocks serves requests for fewer: kNN reads the
file of the linear probe. Encoders that are not an `nn.Module` are not cached, because their state is unknown.

An encoder can have a method `image_features` if the mean of its patches is meaningless. Raw pixels have one: the mean
of their patches would be little more than the mean color.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from ijepa.utils.files import atomic_file
from ijepa.utils.progress import Progress

FORMAT = 1
"""Part of the name of every cache file: increase it when the same encoder and images give different features."""

_HASHED_NAMES = {"FrozenEncoder": "Encoder"}
"""Former names of renamed classes, so that hashes in results from before the renaming stay valid."""

Indices = npt.NDArray[np.int64]

View = Callable[[npt.NDArray[np.uint8], int], Tensor]
"""From an image (H, W, 3) and its place in the list of images to pixels (3, h, w) uint8."""


class PatchEncoder(Protocol):
    """An encoder as evaluation uses it: images (B, 3, H, W) uint8 to patch features (B, N, D) float32."""

    embed_dim: int
    patch_size: int
    grid: tuple[int, int]

    def forward_blocks(self, pixels: Tensor, last: int) -> list[Tensor]:
        """Return the outputs (B, N, D) of the last `last` blocks after the final norm, earliest block first."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the output (B, N, D) of the last block."""
        ...


class PixelEncoder(nn.Module):
    """Raw pixels in place of an encoder: a baseline that has learned nothing.

    Args:
        image_size: native height and width in pixels.
        patch_size: side of a patch in pixels.
        reduced: largest side to which whole images are reduced.
    """

    def __init__(self, image_size: tuple[int, int], patch_size: int, reduced: int = 32) -> None:
        super().__init__()
        self.reduced = reduced  # an attribute, so that it is part of `weights_hash`
        self.patch_size, self.embed_dim = patch_size, 3 * patch_size**2
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)

    def forward_blocks(self, pixels: Tensor, last: int = 1) -> list[Tensor]:
        """Return the pixels of the patches (B, N, 3 * p * p) in [0, 1], as a single block for any `last`."""
        patches = patchify(pixels, self.patch_size)  # (B * N, 3 * p * p)
        return [patches.float().div(255).unflatten(0, (len(pixels), -1))]

    def image_features(self, pixels: Tensor, last: int) -> Tensor:
        """Return the whole image, averaged down to at most `reduced` pixels a side: (B, 1, 3 * h * w) in [0, 1]."""
        height, width = (min(self.reduced, side) for side in pixels.shape[-2:])
        return adaptive_avg_pool2d(pixels.float() / 255, (height, width)).flatten(1)[:, None]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the single block of `forward_blocks`."""
        return self.forward_blocks(pixels)[0]


def encoder_blocks(encoder: PatchEncoder) -> nn.ModuleList | None:
    """Return the transformer blocks of an encoder, None if it is not a vision transformer of this library."""
    return getattr(getattr(encoder, "vit", None), "blocks", None)


def device_of(encoder: PatchEncoder) -> torch.device:
    """Return the device of an encoder's parameters, the CPU if it has none."""
    tensors = encoder.parameters() if isinstance(encoder, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def require_finite(features: Tensor) -> Tensor:
    """Return the features.

    Raises:
        RunError: not all of them are finite numbers. Otherwise not every method would fail: a nearest neighbor search
            returns neighbors, and a score, even then.
    """
    if not bool(features.isfinite().all()):
        raise RunError(
            "the encoder's features are not finite numbers: the weights are damaged, or the computation overflows"
        )
    return features


def image_features(encoder: PatchEncoder, pixels: Tensor, last: int) -> Tensor:
    """Return features of whole images (B, L, D), L <= `last`: those of the encoder, or the mean patch of each block."""
    own = getattr(encoder, "image_features", None)
    if own is not None:
        return own(pixels, last)
    return torch.stack([block.mean(dim=1) for block in encoder.forward_blocks(pixels, last)], dim=1)


@torch.no_grad()
def extract(
    encoder: PatchEncoder,
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
) -> Tensor:
    """Return features (n, L, D) float16 of images, in the given order, from `cache` if they are there.

    Args:
        encoder: computes the features, on the device of its parameters.
        source: the images.
        indices: numbers of the images, all if None.
        image_size: height and width in pixels to which images are resized.
        last: number of last blocks.
        cache: folder of cached features; None: no cache.
        label: name of encoder and set in progress and in errors.
        crop_fraction: share of the short side that the center crop keeps; .875 is "resize to 256, crop 224".
        interpolation: filter that resizes images.
        batch_size: images per forward pass.
        progress: receives a line after each tenth.
        ranks: the processes that share the work; each returns all features.

    Raises:
        RunError: an image cannot be decoded, features are not finite, or the cache cannot be written or read.
    """
    chosen = np.arange(len(source)) if indices is None else indices
    stem = None
    if cache is not None and isinstance(encoder, nn.Module):
        stem = cache / _cache_name(encoder, source, chosen, image_size, crop_fraction, interpolation)
    stored = None if stem is None else _find_stored(stem, last)
    # All processes compute, or none: a cache that they do not share may lack the file on one of them.
    if all(ranks.all_gather_object(stored is not None)) and stored is not None:
        return _load(stored, last)
    rows, done = ranks.batch_rows(len(chosen), batch_size), 0
    # Allocated at once, because concatenating all batches at the end would need twice the memory.
    blank = torch.zeros(1, 3, *image_size, dtype=torch.uint8, device=device_of(encoder))
    features = torch.zeros(len(chosen), *image_features(encoder, blank, last).shape[1:], dtype=torch.float16)
    view = center_view(image_size, crop_fraction, interpolation)
    for pixels in pixel_batches(source, chosen[rows], view, batch_size):
        x = image_features(encoder, pixels.to(device_of(encoder)), last).to(torch.float16).cpu()
        before, done = done, done + len(x)
        if not bool(x.isfinite().all()):
            first, final = (source.name(int(chosen[rows[place]])) for place in (before, done - 1))
            raise RunError(f"{label}: features are not finite in float16, in the batch from {first} to {final}")
        features[torch.from_numpy(rows[before:done])] = x
        if progress is not None and 10 * before // len(rows) < 10 * done // len(rows):
            progress(f"{label}: features of {done} of {len(rows)} images")
    features = ranks.fill_rows(features)
    if stem is not None and ranks.rank == 0:
        _save(_cache_file(stem, last), features)
    return features


def weights_hash(encoder: nn.Module) -> str:
    """Return a SHA-256 of everything that decides the output of an encoder.

    For each module these are its class, its plain attributes (numbers of heads and epsilons are in no state dict), its
    parameters, and its buffers, including those that checkpoints leave out.
    """
    digest = hashlib.sha256()
    for name, module in encoder.named_modules():
        plain = [(k, v) for k, v in sorted(vars(module).items()) if _is_plain(v) and k[0] != "_" and k != "training"]
        kind = type(module).__qualname__
        digest.update(repr((name, _HASHED_NAMES.get(kind, kind), plain)).encode())
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            digest.update(repr((key, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def center_view(size: tuple[int, int], fraction: float, interpolation: Interpolation = "bilinear") -> View:
    """Return the view that is the center crop of an image."""

    def view(image: npt.NDArray[np.uint8], place: int) -> Tensor:
        height, width = image.shape[:2]
        return crop_resize(image, center_crop_box(height, width, size, fraction), size, interpolation)

    return view


def pixel_batches(source: Source, indices: Indices, view: View, batch: int) -> Iterator[Tensor]:
    """Yield pixels (B, 3, h, w) uint8 of views of images. While the caller uses a batch, threads decode the next.

    Raises:
        RunError: an image cannot be decoded; the line names it.
    """

    def pixels_of(sample: Sample, place: int) -> Tensor:
        try:
            image = decode(sample.image)
        except DecodeError as error:
            raise RunError(f"{sample.name}: {error}") from error
        return view(image, place)

    # Files are read in this thread, because sources do not support threads. Decoding takes most of the time.
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


def _cache_name(
    encoder: nn.Module,
    source: Source,
    chosen: Indices,
    image_size: tuple[int, int],
    crop_fraction: float,
    interpolation: Interpolation,
) -> str:
    precision = name_of(getattr(encoder, "precision", torch.float32))
    images = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
    setting = (FORMAT, image_size, crop_fraction, interpolation, precision, "float16", source.stamp, images)
    return "features-" + hashlib.sha256(repr((weights_hash(encoder), *setting)).encode()).hexdigest()[:32]


def _cache_file(stem: Path, blocks: int) -> Path:
    return stem.with_name(f"{stem.name}-{blocks}.safetensors")


def _find_stored(stem: Path, last: int) -> Path | None:
    """Return the smallest cache file with at least `last` blocks."""
    stored = [int(file.stem.rpartition("-")[2]) for file in stem.parent.glob(f"{stem.name}-*.safetensors")]
    enough = [blocks for blocks in stored if blocks >= last]
    return _cache_file(stem, min(enough)) if enough else None


def _load(file: Path, last: int) -> Tensor:
    """Return the last blocks of a cache file. Only these are read, so that the others take no memory."""
    try:
        with safe_open(file, "pt") as stored:
            return stored.get_slice("x")[:, -last:]
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(f"{file}: cached features cannot be read ({error}); delete the file") from error


def _save(file: Path, x: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            save_file({"x": x}, partial.name)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: features cannot be cached: {error}") from error
