"""The images and encoders of a run, from which the pictures of the page are made.

Images are those of the training set and of the evaluations; `--data` replaces both. A data set that is no longer at its
path leaves its sections out, because runs are copied without their data. A wrong `--data` is an error.
"""

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
from ijepa.evaluation.features.sampling import Indices, choose
from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.interop.weights import load_encoder
from ijepa.masking.batch import Batch
from ijepa.masking.packing import Packer
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.flops import layers_flops
from ijepa.report.images import Pixels
from ijepa.report.run_data import MissingInput, RunData
from ijepa.utils.errors import UserError

SEED = 0
"""Seed of all choices of images, so that the same run gives the same page."""

_CPU_FLOPS = 2e11
"""FLOPs that a CPU may spend on the features of one picture: seconds."""


@dataclass(frozen=True)
class ImageSets:
    """A set of images that is searched, and one whose images are shown."""

    train: Source
    test: Source

    @property
    def same(self) -> bool:
        """Whether both are the same images, so that an image could find itself."""
        return self.train.fingerprint == self.test.fingerprint


class RunImages:
    """The data sets and encoders of a run; properties and methods raise MissingInput for those that are missing.

    Args:
        run: the run.
        given: path of images that replace those of the run.

    Raises:
        UserError: `given` is not a set of images, or the checkpoint is damaged.
    """

    def __init__(self, run: RunData, given: str | None) -> None:
        self.run, self.given = run, given
        self._opened: dict[tuple[str, str, str | None], Source] = {}
        if given is not None:
            open_dataset(given, where="--data", split="train")
        saved = list_checkpoints(run.files.checkpoints)
        self.checkpoint = saved[-1] if saved else None
        self._encoders: dict[str, FrozenEncoder] = {}
        if self.checkpoint is not None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            random = FrozenEncoder.initial(run.recipe.model, run.recipe.seed)
            self._encoders = {"trained": load_encoder(self.checkpoint).to(device), "random": random.to(device)}

    @property
    def encoders(self) -> dict[str, FrozenEncoder]:
        """The target encoder of the latest checkpoint ("trained"), and the same with initial weights ("random")."""
        if not self._encoders:
            command = f"ijepa pretrain {self.run.recipe.name} --output {self.run.folder}"
            raise MissingInput("the run has no checkpoint", command)
        return self._encoders

    def training(self) -> Source:
        """Return the training set of the run, or the given one."""
        data = (self.run.info or {}).get("data")
        recorded = data.get("path") if isinstance(data, dict) else None
        path = self.given or recorded or self.run.recipe.data.path
        if not path:
            raise MissingInput("the run has no data path", self._command)
        return self._open(str(path), "train")

    def is_training_set(self) -> bool:
        """Return whether `training` is the set that the run was trained on, by its fingerprint."""
        return self.training().fingerprint == (self.run.info or {}).get("fingerprint")

    def sets(self, result: EvaluationResult | None) -> ImageSets:
        """Return the sets of an evaluation; the training set as both if there is no evaluation or it has no paths."""
        if self.given is None and result is not None and result.data.train.path and result.data.test.path:
            train, test = result.data.train, result.data.test
            return ImageSets(
                self._open(str(train.path), "train", train.list), self._open(str(test.path), "val", test.list)
            )
        source = self.training()
        try:
            return ImageSets(source, self._open(self.given, "val") if self.given is not None else source)
        except MissingInput:  # the given path has no validation set
            return ImageSets(source, source)

    @property
    def _command(self) -> str:
        return f"ijepa report {self.run.folder} --data IMAGES"

    def _open(self, path: str, split: str, listed: str | None = None) -> Source:
        key = path, split, listed
        if key not in self._opened:
            try:
                self._opened[key] = open_dataset(path, where="data", split=split, names=listed)
            except UserError as error:
                raise MissingInput(str(error), self._command) from None
        return self._opened[key]


def first_batch(recipe: Recipe, source: Source, count: int) -> Batch:
    """Return the first `count` samples of a run of `recipe` on `source`, cropped and masked as in training."""
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


def affordable_images(model: ModelSection, patches: int | None = None) -> int:
    """Return how many images of `patches` patches may be encoded for one picture: from 64 to 1000, seconds on a CPU."""
    if torch.cuda.is_available():
        return 1000
    tokens = model.grid[0] * model.grid[1] if patches is None else patches
    flops = model.encoder.depth * layers_flops([tokens], model.encoder.width, model.encoder.mlp_ratio)
    return int(np.clip(_CPU_FLOPS / flops, 64, 1000))


def choose_varied(source: Source, count: int) -> Indices:
    """Return `count` images (count,), or all if there are fewer, of as many classes as possible if they have labels."""
    drawn = choose(len(source), 16 * count, SEED)
    if source.labels is None:
        return drawn[np.unique(np.linspace(0, len(drawn) - 1, min(count, len(drawn))).astype(int))]
    labels = source.labels[drawn]
    earlier = np.array([int((labels[:place] == label).sum()) for place, label in enumerate(labels)])
    return drawn[np.lexsort((labels, earlier))[:count]]  # the first image of each class, then the second, ...


def to_arrays(pixels: Tensor) -> Pixels:
    """Return pixels (..., 3, H, W) as arrays (..., H, W, 3)."""
    return pixels.movedim(-3, -1).contiguous().numpy()


def class_name(source: Source, index: int | np.integer) -> str | None:
    """Return the class name of a sample, its number if it has no name, or None without a label."""
    label = source.label(int(index))
    if label is None:
        return None
    names = source.classes or ()
    return names[label] if label < len(names) else f"class {label}"


def sample_name(source: Source, index: int | np.integer) -> str:
    """Return the name of a sample, and its class if it has one."""
    name = class_name(source, index)
    return source.name(int(index)) + (f", {name}" if name else "")
