"""What the pictures are made of: the run's images and encoders, found, opened, and chosen from.

Images are those that the run was trained on, and those that its evaluations name; `--data` stands for both. A set
that is not where the files say is a gap in the page and no error: runs travel without their data. One that was given
by hand is refused as any flag is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa.checkpoint.format import list_checkpoints
from ijepa.config.recipe import ModelSection, Recipe
from ijepa.data.loading.loader import LoaderConfig, StepDataset
from ijepa.data.loading.shuffle import Order
from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.features.sampling import Indices, choose
from ijepa.interop.weights import load_encoder
from ijepa.masking.batch import Batch
from ijepa.masking.packing import Packer
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.flops import layers_flops
from ijepa.report.run_data import Record, Result
from ijepa.utils.errors import UserError

_OPERATIONS = 2e11
"""Forward operations on a CPU for one encoder's features of one picture: seconds."""


@dataclass(frozen=True)
class Pair:
    """A set to look things up in and one to ask for; `same` where both are one, so that no image may find itself."""

    train: Source
    test: Source

    @property
    def same(self) -> bool:
        """Whether both are the same images."""
        return self.train.fingerprint == self.test.fingerprint


class Images:
    """The data sets that a run's files name, or that were given.

    Args:
        record: the run.
        given: path that stands for all of them.

    Raises:
        UserError: where `given` cannot be used.
    """

    def __init__(self, record: Record, given: str | None) -> None:
        self.record, self.given = record, given
        self._opened: dict[tuple[str, str, str | None], Source | UserError] = {}
        if given is not None:
            open_dataset(given, where="--data", split="train")

    def training(self) -> Source | str:
        """Return the set that the run was trained on, or why there is none."""
        data = (self.record.info or {}).get("data")
        noted = data.get("path") if isinstance(data, Mapping) else None
        path = self.given or noted or self.record.recipe.data.path
        if not path:
            return "the run names no data"
        return self._open(str(path), "train")

    def trained_here(self) -> bool:
        """Whether `training` is the very set that the run was trained on, by its fingerprint."""
        source = self.training()
        return isinstance(source, Source) and source.fingerprint == (self.record.info or {}).get("fingerprint")

    def pair(self, *kinds: str) -> Pair | str:
        """Return the sets of the first evaluation of one of these kinds, else the training set, or why not."""
        return self.pair_of(self.record.result(*kinds))

    def pair_of(self, result: Result | None) -> Pair | str:
        """Return the sets of an evaluation, else the training set, or why not."""
        if self.given is not None or result is None or not (result.path("train") and result.path("test")):
            train = self.training()
            if isinstance(train, str):
                return train
            test = self._open(self.given, "val") if self.given is not None else train
            return Pair(train, train if isinstance(test, str) else test)
        train, test = (
            self._open(str(result.path(role)), split, result.listed(role)) for role, split in _SPLITS.items()
        )
        if isinstance(train, str) or isinstance(test, str):
            return train if isinstance(train, str) else str(test)
        return Pair(train, test)

    def _open(self, path: str, split: str, listed: str | None = None) -> Source | str:
        key = path, split, listed
        if key not in self._opened:
            try:
                self._opened[key] = open_dataset(path, where="data", split=split, names=listed)
            except UserError as refusal:
                self._opened[key] = refusal
        found = self._opened[key]
        return found if isinstance(found, Source) else str(found)


_SPLITS = {"train": "train", "test": "val"}


@dataclass(frozen=True)
class Encoders:
    """The trained encoder beside the one it started as; `step` is the trained one's checkpoint."""

    trained: FrozenEncoder
    random: FrozenEncoder
    step: str
    image_size: tuple[int, int]

    def items(self) -> list[tuple[str, Encoder]]:
        """Both by name, the trained one first."""
        return [("trained", self.trained), ("random", self.random)]


def load_encoders(record: Record) -> Encoders | str:
    """Return the encoders of a run's latest checkpoint and of its start, or why there are none."""
    saved = list_checkpoints(record.run.checkpoints)
    if not saved:
        return "the run has no checkpoint"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = record.recipe.model
    trained = load_encoder(saved[-1]).to(device)
    random = FrozenEncoder.initial(model, record.recipe.seed).to(device)
    return Encoders(trained, random, saved[-1].name, model.image_size)


def first_batch(recipe: Recipe, source: Source, count: int) -> Batch:
    """Return the first `count` samples of a recipe's run on `source`, in its order, cropped and masked as there."""
    model, data = recipe.model, recipe.data
    config = LoaderConfig(
        recipe.seed,
        model.image_size,
        data.crop_scale,
        data.crop_ratio,
        global_batch=count,
        micro_batch=count,
        crops_per_decode=data.crops_per_decode,
    )
    packer = Packer(recipe.mask, model.grid, recipe.seed, count, model.encoder.depth)
    return StepDataset(source, config, packer, Order(recipe.seed, len(source), data.order, data.block, data.window))[0]


def affordable(model: ModelSection, patches: int | None = None) -> int:
    """Return how many images may be encoded for one picture: what a CPU does in seconds, at least 64, at most 1000."""
    if torch.cuda.is_available():
        return 1000
    tokens = model.grid[0] * model.grid[1] if patches is None else patches
    cost = model.encoder.depth * layers_flops([tokens], model.encoder.width, model.encoder.mlp_ratio)
    return int(np.clip(_OPERATIONS / cost, 64, 1000))


def varied(source: Source, count: int, seed: int) -> Indices:
    """Return `count` images (count,), or all there are, drawn by seed; of as many classes as there are, where known."""
    drawn = choose(len(source), 16 * count, seed)
    if source.labels is None:
        return drawn[np.unique(np.linspace(0, len(drawn) - 1, min(count, len(drawn))).astype(int))]
    labels = source.labels[drawn]
    turn = np.array([int((labels[:place] == label).sum()) for place, label in enumerate(labels)])
    return drawn[np.lexsort((labels, turn))[:count]]


def shown(pixels: Tensor) -> np.ndarray:
    """Return pixels (..., 3, H, W) as arrays (..., H, W, 3)."""
    return pixels.movedim(-3, -1).contiguous().numpy()
