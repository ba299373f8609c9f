"""One rank's micro-batches in order, from any step on: functions of their number, made ahead by worker processes.

Micro-batch k of a rank consists of the samples at fixed positions of the endless sequence, so the number of the next
step is the whole state of the pipeline. Batches therefore do not depend on the number of workers, on interruptions or
on the ends of epochs, and ranks and micro-batches only divide the same global batch differently.

Each position has its own crop. With `crops_per_decode` = c, the c positions from a multiple of c on share a sample: the
sample of position p is at p // c of the order. If the border of a micro-batch divides such a group, its image is
decoded on both sides, so that batches still depend on positions alone.

An image that cannot be decoded is replaced by the one at the next place in the order of the same epoch, with the crop
of its own position. Its name is part of the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from threading import Thread

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.loading.crop import WORDS, Box, crop_resize, random_resized_crop_box
from ijepa.data.loading.decode import DecodeError, Pixels, decode_for
from ijepa.data.loading.shuffle import Order
from ijepa.data.loading.workers import prefetch_batches, report_sample
from ijepa.data.sources.base import Source
from ijepa.masking.batch import Batch
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.random import Stream, Words, random_bits

_LOOKUP = 512
"""Number of positions whose samples are looked up together."""
_NAME_TIMEOUT = 2.0
"""Seconds to wait for the name of a sample, which may have to be read from a disk that hangs."""

Collate = Callable[[npt.NDArray[np.int64], Tensor, Sequence[int], Sequence[str]], Batch]
"""(positions (B,), pixels (B, 3, H, W) uint8, sample indices, names of replaced samples) -> Batch; picklable."""


@dataclass(frozen=True)
class LoaderConfig:
    """What a rank loads and how.

    Attributes:
        seed: the seed of the run.
        image_size: (height, width) of the pixels.
        crop_scale, crop_ratio: bounds of the crop's share of the area, and of its width / height.
        global_batch: images per step, over all ranks. Each rank has a contiguous part of it.
        micro_batch: images per forward pass of one rank.
        rank, world_size: this rank, and the number of ranks.
        workers: number of processes; 0 makes batches in this process when they are requested.
        prefetch: micro-batches that each worker makes ahead. Shared memory is workers x prefetch micro-batches.
        timeout: seconds that a worker has for a micro-batch before it is replaced; no limit if None.
        max_replaced_attempts: how many places in a row may be skipped for one unreadable image.
        crops_per_decode: number of neighboring positions that share an image.

    Raises:
        UserError: the global batch is not divisible.
    """

    seed: int
    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    prefetch: int = 2
    timeout: float | None = None
    max_replaced_attempts: int = 10
    crops_per_decode: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}")
        if self.global_batch % (self.world_size * self.micro_batch):
            raise UserError(
                "batch.global",
                f"{self.global_batch} is not divisible by {self.world_size} ranks x {self.micro_batch} images",
                "change it, batch.micro or the number of ranks",
            )

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per step on each rank."""
        return self.global_batch // (self.world_size * self.micro_batch)

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        """(B, 3, H, W) of a micro-batch."""
        return (self.micro_batch, 3, *self.image_size)

    def positions(self, number: int) -> npt.NDArray[np.int64]:
        """Return the positions (micro_batch,) of this rank's micro-batch `number`, counted from step 0."""
        step, micro = divmod(number, self.micro_batches)
        start = step * self.global_batch + (self.rank * self.micro_batches + micro) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


@dataclass(frozen=True)
class StepDataset:
    """Micro-batches by number: `dataset[k]` is always the same batch. Picklable and small."""

    source: Source
    config: LoaderConfig
    collate: Collate
    order: Order
    _samples: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, number: int) -> Batch:
        pixels = torch.empty(self.config.pixel_shape, dtype=torch.uint8, memory_format=torch.channels_last)
        return self.make(number, pixels)

    def make(self, number: int, pixels: Tensor) -> Batch:
        """Return micro-batch `number`, with its images in `pixels` (B, 3, H, W) uint8.

        Raises:
            RunError: a read error, or more than `max_replaced_attempts` unreadable images in a row.
        """
        config, out = self.config, pixels.numpy()
        positions = config.positions(number)
        indices = self._lookup(number)
        self.source.readahead(indices, report_sample)
        draws = random_bits(config.seed, Stream.CROP, positions, WORDS)  # (B, 40)
        used, replaced = list[int](), list[str]()
        # Consecutive positions with the same place in the order share a decoded image: [0, 0, 1, 1] for two crops.
        places = positions // config.crops_per_decode
        starts = np.flatnonzero(np.diff(places, prepend=-1)).tolist()  # where the next image begins
        for start, stop in pairwise([*starts, len(places)]):
            image, boxes, sample, bad = self._decode(int(places[start]), int(indices[start]), draws[start:stop])
            for slot, box in enumerate(boxes, start):
                crop_resize(image, box, config.image_size, out=out[slot])
                used.append(sample)
                replaced += bad
        return self.collate(positions, pixels, tuple(used), tuple(replaced))

    def _lookup(self, number: int) -> npt.NDArray[np.int64]:
        """Return the samples (micro_batch,) of micro-batch `number`."""
        if number not in self._samples:
            # Several micro-batches at once, because numpy's time hardly depends on the number of positions. The next
            # ones that this worker will make are those at every `workers`-th number.
            config = self.config
            stride = max(config.workers, 1)
            numbers = range(number, number + -(-_LOOKUP // config.micro_batch) * stride, stride)
            positions = np.stack([config.positions(other) for other in numbers])
            found = self.order.indices(positions.ravel() // config.crops_per_decode)
            self._samples.clear()
            self._samples.update(zip(numbers, found.reshape(positions.shape), strict=True))
        return self._samples[number]

    def _decode(self, number: int, index: int, draws: Words) -> tuple[Pixels, Sequence[Box], int, list[str]]:
        """Decode the image at place `number` of the order, whose sample is `index`, or the next readable one.

        Returns:
            Pixels, a box for each of `draws`, the index of the sample, and the names of unreadable samples.
        """
        n, bad = len(self.source), list[str]()
        epoch, place = divmod(number, n)
        for attempt in count(1):
            report_sample(index)
            try:
                image, boxes = decode_for(self.source.image(index), partial(self._boxes, draws))
                return image, boxes, index, bad
            except DecodeError as error:
                bad.append(self.source.name(index))
                # Not more attempts than samples, or the search would come back to the first one.
                if attempt > min(self.config.max_replaced_attempts, n - 1):
                    names = ", ".join(bad)
                    raise RunError(f"{attempt} images in a row cannot be decoded ({error}): {names}") from error
            index = int(self.order.indices(epoch * n + (place + attempt) % n)[0])
        raise AssertionError("unreachable")

    def _boxes(self, draws: Words, height: int, width: int) -> list[Box]:
        scale, ratio = self.config.crop_scale, self.config.crop_ratio
        return [random_resized_crop_box(draw, height, width, scale, ratio) for draw in draws]


class Loader:
    """Iterates over one rank's micro-batches.

    Args:
        source: the images.
        config: what to load and how.
        collate: makes a Batch from positions and pixels; called in the worker.
        order: the order of the samples; all of them shuffled if None.
        on_restart: called with a line when a worker was replaced.
    """

    def __init__(
        self,
        source: Source,
        config: LoaderConfig,
        collate: Collate,
        order: Order | None = None,
        on_restart: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.on_restart = config, on_restart
        self.dataset = StepDataset(source, config, collate, order or Order(config.seed, len(source)))

    def iterate(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of steps [start_step, end_step), `config.micro_batches` for each, in order.

        The tensors belong to the caller. They are in pinned memory if there is a CUDA device. Closing or deleting the
        iterator ends the workers.

        Raises:
            RunError: a read error, too many unreadable images in a row, or a worker that died twice.
        """
        config = self.config
        numbers = range(start_step * config.micro_batches, end_step * config.micro_batches)
        pin = torch.cuda.is_available()  # copies from pinned memory to the device run next to its computation
        if config.workers == 0:
            for number in numbers:
                batch = self.dataset[number]
                yield batch.pin_memory() if pin else batch
        else:
            yield from prefetch_batches(
                self.dataset.make,
                numbers,
                shape=config.pixel_shape,
                workers=config.workers,
                prefetch=config.prefetch,
                pin=pin,
                timeout=config.timeout,
                sample_name=partial(_sample_name, self.dataset.source),
                on_restart=self.on_restart,
            )


def _sample_name(source: Source, index: int) -> str:
    """Return a sample's name, or the file that holds it if the disk does not return the name in time."""
    names: list[str] = []

    def read() -> None:
        with suppress(RunError):
            names.append(source.name(index))

    # A read that hangs cannot be canceled. A daemon thread does not keep the process from ending.
    thread = Thread(target=read, daemon=True)
    thread.start()
    thread.join(_NAME_TIMEOUT)
    return names[0] if names else f"sample {index} in {source.file(index)}"
