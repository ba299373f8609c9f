"""One rank's micro-batches, in order, from any step on: a function of their number, made ahead by worker processes.

Micro-batch k of a rank is made of the samples at fixed positions of the endless sequence, so the whole state of the
pipeline is the number of the next step. Nothing is sampled, shuffled or counted on the way: how many workers there
are, which of them makes what, where a run was interrupted and where an epoch ends leave no trace in the batches, and
over ranks and micro-batches the global batch is the same set of positions cut differently.

Each position has a crop of its own. With several crops of a decoded image, that many neighbouring positions from a
multiple of their number on have the same sample: the order is asked for position // crops. A group that a micro-batch's
border cuts is decoded on either side, so that this, too, depends on nothing but the position.

An image that cannot be decoded is replaced by the one that stands at the next place of the same epoch's order, with
the crop of its own position, and its name travels with the batch.
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
from torch.utils.data import Dataset

from ijepa.data.loading.crop import WORDS, Box, crop_resize, random_resized_crop_box
from ijepa.data.loading.decode import DecodeError, decode_for
from ijepa.data.loading.shuffle import Order
from ijepa.data.loading.workers import mark, produce
from ijepa.data.sources.base import Source
from ijepa.masking.batch import Batch
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.random import Stream, Words, random_bits

_AHEAD = 512
"""Positions whose samples are looked up together."""
_PATIENCE = 2.0
"""Seconds to wait for a name that a disk may have to be read for."""

Collate = Callable[[npt.NDArray[np.int64], Tensor, Sequence[int], Sequence[str]], Batch]
"""(positions (B,), pixels (B, 3, H, W) uint8, sample indices, names of replaced samples) -> Batch; picklable."""


@dataclass(frozen=True)
class LoaderPlan:
    """How a global batch is cut: into contiguous slices for the ranks, and those into micro-batches.

    Raises:
        UserError: the global batch does not divide.
    """

    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

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
        """Micro-batches a step on each rank."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def positions(self, number: int) -> npt.NDArray[np.int64]:
        """Return the positions (micro_batch,) of this rank's micro-batch `number`, counted from step 0."""
        step, micro = divmod(number, self.micro_batches)
        start = step * self.global_batch + (self.rank * self.micro_batches + micro) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


@dataclass(frozen=True)
class StepDataset(Dataset[Batch]):
    """Micro-batches by number: `dataset[k]` is always the same batch. Picklable and small.

    It is quickest for one who asks for every `stride`-th number, as each of so many workers does.
    """

    source: Source
    plan: LoaderPlan
    seed: int
    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    collate: Collate
    order: Order
    max_replaced_attempts: int = 10
    stride: int = 1
    crops_per_decode: int = 1
    _ahead: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, number: int) -> Batch:
        return self.make(number, torch.empty(self.pixel_shape, dtype=torch.uint8, memory_format=torch.channels_last))

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        """(B, 3, H, W) of a micro-batch's pixels."""
        return (self.plan.micro_batch, 3, *self.image_size)

    def make(self, number: int, pixels: Tensor) -> Batch:
        """Return micro-batch `number`, its images written into `pixels` (B, 3, H, W) uint8.

        Raises:
            RunError: no readable image within `max_replaced_attempts` of an unreadable one, or a read error.
        """
        positions = self.plan.positions(number)
        indices = self._indices(number)
        self.source.expect(indices, mark)
        draws = random_bits(self.seed, Stream.CROP, positions, WORDS)
        into, used, replaced = pixels.numpy(), list[int](), list[str]()
        places = positions // self.crops_per_decode
        starts = np.flatnonzero(np.diff(places, prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(places)]):
            image, boxes, sample, bad = self._readable(int(places[start]), int(indices[start]), draws[start:stop])
            for slot, box in enumerate(boxes, start):
                crop_resize(image, box, self.image_size, out=into[slot])
                used.append(sample)
                replaced += bad
        return self.collate(positions, pixels, tuple(used), tuple(replaced))

    def _indices(self, number: int) -> npt.NDArray[np.int64]:
        """Return the samples (micro_batch,) of micro-batch `number`.

        Found for several micro-batches at once: numpy takes hardly longer for hundreds of numbers than for one.
        """
        if number not in self._ahead:
            count = -(-_AHEAD // self.plan.micro_batch)
            numbers = range(number, number + count * self.stride, self.stride)
            positions = np.stack([self.plan.positions(other) for other in numbers])
            found = self.order.indices(positions.ravel() // self.crops_per_decode)
            self._ahead.clear()
            self._ahead.update(zip(numbers, found.reshape(positions.shape), strict=True))
        return self._ahead[number]

    def _readable(
        self, number: int, index: int, draws: Words
    ) -> tuple[npt.NDArray[np.uint8], Sequence[Box], int, list[str]]:
        """Return (image, a box for each draw, its index, names of those passed over).

        `number` is the place in the order, and `index` its sample.
        """
        n, bad = len(self.source), list[str]()
        epoch, place = divmod(number, n)
        for attempt in count(1):
            mark(index)
            try:
                image, boxes = decode_for(self.source.image(index), partial(self._boxes, draws))
                return image, boxes, index, bad
            except DecodeError as error:
                bad.append(self.source.name(index))
                if attempt > min(self.max_replaced_attempts, n - 1):
                    names = ", ".join(bad)
                    raise RunError(f"{attempt} images in a row cannot be decoded ({error}): {names}") from error
            index = int(self.order.indices(epoch * n + (place + attempt) % n)[0])
        raise AssertionError("unreachable")

    def _boxes(self, draws: Words, height: int, width: int) -> list[Box]:
        return [random_resized_crop_box(draw, height, width, self.crop_scale, self.crop_ratio) for draw in draws]


class Loader:
    """Iterates over one rank's micro-batches; see the module.

    Args:
        source: the images.
        seed: the run's.
        order: of the samples; all of them shuffled if None.
        global_batch: images a step, over all ranks.
        micro_batch: images a forward pass of one rank.
        rank, world_size: this rank, and how many there are.
        image_size: (height, width) of the pixels.
        crop_scale, crop_ratio: bounds of the crop's share of the area and of its width / height.
        collate: makes a Batch of positions and pixels; called in the worker.
        workers: processes; 0 makes batches in this one, when they are asked for.
        prefetch: micro-batches each worker makes ahead. Shared memory is workers x prefetch micro-batches of pixels.
        crops_per_decode: neighbouring positions that share an image.
        timeout: seconds a worker has for a micro-batch before it is replaced; for ever if None.
        tell: told of a worker that was replaced.
        max_replaced_attempts: how many places in a row may be passed over for one unreadable image.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        collate: Collate,
        workers: int = 0,
        prefetch: int = 2,
        max_replaced_attempts: int = 10,
        order: Order | None = None,
        crops_per_decode: int = 1,
        timeout: float | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.plan = LoaderPlan(global_batch, micro_batch, rank, world_size)
        self.dataset = StepDataset(
            source,
            self.plan,
            seed,
            image_size,
            crop_scale,
            crop_ratio,
            collate,
            order or Order(seed, len(source)),
            max_replaced_attempts,
            stride=max(workers, 1),
            crops_per_decode=crops_per_decode,
        )
        self.workers, self.prefetch, self.timeout, self.tell = workers, prefetch, timeout, tell

    def iterate(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of steps [start_step, end_step), `plan.micro_batches` for each, in order.

        The tensors are the caller's to keep; they lie in pinned memory where there is a CUDA device. Closing the
        iterator, or dropping it, ends the workers.

        Raises:
            RunError: a read error, too many unreadable images in a row, or a worker that died.
        """
        a_step = self.plan.micro_batches
        numbers = range(start_step * a_step, end_step * a_step)
        pin = torch.cuda.is_available()
        if self.workers == 0:
            for number in numbers:
                batch = self.dataset[number]
                yield batch.pin_memory() if pin else batch
        else:
            yield from produce(
                self.dataset.make,
                numbers,
                shape=self.dataset.pixel_shape,
                workers=self.workers,
                prefetch=self.prefetch,
                pin=pin,
                timeout=self.timeout,
                name=partial(_named, self.dataset.source),
                tell=self.tell,
            )


def _named(source: Source, index: int) -> str:
    """Return a sample's name, or the file it lies in where the disk does not give the name any more."""
    answers: list[str] = []

    def ask() -> None:
        with suppress(RunError):
            answers.append(source.name(index))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answers[0] if answers else f"sample {index} in {source.file(index)}"
