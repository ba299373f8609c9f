"""The recipe: every number of a run, typed and validated, in one frozen object.

A recipe is a YAML file (`recipes/*.yaml` beside this module are the presets) over the defaults below, over which
dotted overrides (`optimizer.lr_encoder`) may be laid. `base: NAME` in a file starts from another recipe. What is
refused is refused in one line, before anything is written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from ijepa.config.files import lay, read_layers
from ijepa.masking.masks import MaskRule
from ijepa.utils import random as randomness
from ijepa.utils.config import Decays, Ratios, Section, Shares
from ijepa.utils.errors import Refused
from ijepa.utils.quantities import Length, Size, Stretch

Auto = Literal["auto"]


class Encoder(Section):
    """Both encoders: the context encoder and its moving average, the target encoder."""

    width: int = Field(1280, ge=8)
    """Channels of a token."""
    depth: int = Field(32, ge=1)
    """Layers."""
    heads: int = Field(16, ge=1)
    """Attention heads; must divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP over the width."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth's rate at the last layer of the context encoder; rates rise linearly from 0."""
    position_scale: float = Field(1.0, ge=0)
    """Factor on the sin-cos positions; 1 in the paper."""
    initial: Literal["normal", "xavier"] = "normal"
    """Deviation of the initial weights: .02, or sqrt(2 / (fan in + fan out)), which narrow encoders need."""


class Predictor(Section):
    """The predictor: narrower than the encoders."""

    width: int = Field(384, ge=8)
    """Channels of a token."""
    depth: int = Field(12, ge=1)
    """Layers."""
    heads: int = Field(16, ge=1)
    """Attention heads; must divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP over the width."""
    position_scale: float = Field(1.0, ge=0)
    """Factor on the sin-cos positions; 1 in the paper."""
    initial: Literal["normal", "xavier"] = "normal"
    """Deviation of the initial weights, as for the encoders."""


class Model(Section):
    """The shape of the model."""

    image_size: Size = (224, 224)
    """Height and width of the training crops in pixels; one number for a square."""
    patch_size: int = Field(16, ge=1)
    """Side of a patch in pixels."""
    position_grid: Size | None = None
    """Rows and columns that positions were made for, and are stretched over; None: those of image_size. `init.from`
    sets it where the weights come from another resolution."""
    encoder: Encoder = Encoder()
    """The encoders."""
    predictor: Predictor = Predictor()
    """The predictor."""

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for side in self.image_size:
            if side < 1 or side % self.patch_size:
                fit = max(side // self.patch_size, 1) * self.patch_size
                raise Refused(
                    f"model.image_size = {side}",
                    f"patch_size {self.patch_size} does not divide it",
                    f"try {fit}",
                )
        if self.position_grid is not None and min(self.position_grid) < 1:
            raise Refused(f"model.position_grid = {list(self.position_grid)}", "must be 1 or more", "or none")
        for name, part in (("encoder", self.encoder), ("predictor", self.predictor)):
            if part.width % part.heads:
                raise Refused(f"model.{name}.heads = {part.heads}", f"does not divide the width {part.width}")
            if part.width % 4:
                raise Refused(f"model.{name}.width = {part.width}", "not a multiple of 4", "sin-cos positions need one")
        return self


class Data(Section):
    """Where images come from and how they are cropped."""

    path: str | None = None
    """Class folders, a flat folder, tar shards (folder, brace pattern or glob), or a single tar."""
    workers: int | Auto = "auto"
    """Loader processes; auto takes the cores that computing leaves, 0 loads in the training process."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches each worker prepares ahead."""
    images: int | None = Field(None, ge=1)
    """Size of the data set, for planning without it; a run counts its own."""
    order: Literal["global", "blocks"] = "global"
    """global shuffles all images; blocks mixes runs of neighbours, for disks and networks that seek slowly."""
    block: int = Field(256, ge=1)
    """Neighbouring images of a run, with order: blocks."""
    window: int = Field(64, ge=1)
    """Runs whose images are mixed, with order: blocks."""
    crops_per_decode: int = Field(1, ge=1)
    """Crops taken of an image once it is decoded, in neighbouring slots of a batch: for runs that wait for decoding."""
    crop_scale: Shares = (0.3, 1.0)
    """Area of a random crop, as a share of the image."""
    crop_ratio: Ratios = (3 / 4, 4 / 3)
    """Aspect ratio of a random crop, width over height."""
    replaced_limit: float = Field(0.01, ge=0, le=1)
    """The run stops when the share of unreadable images is certain, or all but certain, to be larger."""


class BatchSize(Section):
    """How many images a step learns from."""

    total: int = Field(2048, ge=1, alias="global")
    """Images a step, over all ranks and micro-batches (the global batch)."""
    micro: int | Auto = "auto"
    """Images in one forward and backward pass; gradients of several are summed to the global batch."""


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), with one learning rate for each part."""

    lr_encoder: float = Field(6e-4, gt=0)
    """Peak learning rate of the context encoder."""
    lr_predictor: float = Field(1.5e-3, gt=0)
    """Peak learning rate of the predictor."""
    betas: Decays = (0.9, 0.95)
    """Decay of the moment estimates."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay at the start; none on biases, norms and the mask token."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end, by a cosine; None keeps it constant."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient; None does not clip."""
    nonfinite_limit: int = Field(10, ge=0)
    """Steps with a non-finite gradient, in a row, after which the run stops; each of them is void."""


class Schedule(Section):
    """How learning rates and EMA momentum move."""

    warmup: Stretch = Length(amount=40, unit="epochs")
    """Linear warm-up: `40 epochs`, `1000 steps`, `1e6 images` or `5 %`."""
    warmup_from: float = Field(0.0, ge=0, le=1)
    """Share of the peak rate at which warm-up starts."""
    decay: Literal["cosine", "tail"] = "cosine"
    """cosine from the end of warm-up; tail stays at the peak and falls linearly over the last `tail`."""
    tail: Stretch = Length(amount=20, unit="%")
    """Length of the fall with decay: tail."""
    lr_end: float = Field(1e-6, ge=0)
    """Learning rate at the end, of both parts."""
    momentum_start: float = Field(0.996, ge=0, le=1)
    """EMA momentum of the target encoder at the start; it moves linearly."""
    momentum_end: float = Field(1.0, ge=0, le=1)
    """EMA momentum at the end."""


class Precision(Section):
    """What is computed in which precision; parameters, EMA and optimiser state are always float32."""

    autocast: Literal["auto", "none", "bf16"] = "auto"
    """bf16 for matrix products; none: float32, without TF32; auto measures once what is fast here, and records it."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """float8 linear layers in both encoders, scaled by tensor or by row."""
    fp8_weight_gradient: Literal["fp8", "bf16"] = "fp8"
    """What float8 layers compute their weights' gradient in."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of attention; auto is FlashAttention-2 on a GPU and our own buckets on a CPU."""


class Parallel(Section):
    """How a run is spread over devices."""

    strategy: Literal["auto", "none", "ddp", "zero2", "zero3", "hsdp"] = "auto"
    """ddp: nothing is sharded; zero2: optimiser, gradients and target encoder are; zero3: all weights too; hsdp: zero2
    within groups of ranks that are copies of one another; auto: zero2 under torchrun, none without."""
    shard: int | Auto = "auto"
    """Ranks that share one copy with hsdp; auto takes those of a node."""
    timeout: float = Field(600.0, gt=0)
    """Seconds without progress, except in measuring and compiling, after which a run gives up and names the rank that
    others wait for."""
    compile: bool | Auto = False
    """torch.compile, block by block; auto does on a GPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, all but matrix products' and attention's, or all."""
    static: bool | Auto = "auto"
    """Pad batches to a constant number of tokens, so that shapes stay; auto does on a GPU."""


class Checkpoint(Section):
    """When the run's state is saved."""

    every: int = Field(1000, ge=1)
    """Steps between checkpoints; one is saved at the end too."""
    keep: int = Field(2, ge=1)
    """How many of the latest checkpoints stay."""


class Init(Section):
    """Weights to begin with, instead of random ones."""

    source: str | None = Field(None, alias="from")
    """A run, a weights folder, or weights of another library; None draws them from the seed."""
    parts: Literal["encoder", "all"] = "encoder"
    """encoder: its target encoder becomes both of ours, the predictor is drawn; all: all three parts are taken."""


class Recipe(Section):
    """Every number of a run."""

    name: str = "unnamed"
    """The recipe's name."""
    description: str = ""
    """What it is for, what it takes, what it gives."""
    seed: int = Field(0, ge=0, lt=2**63)
    """All randomness comes from it."""
    randomness: int = randomness.VERSION
    """Version of the random draws; a recipe of another version is refused, not redrawn."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in passes over the data."""
    images: int | None = Field(None, ge=1)
    """Length in images; overrides epochs."""
    steps: int | None = Field(None, ge=1)
    """Length in steps; overrides epochs and images."""
    model: Model = Model()
    """The model."""
    init: Init = Init()
    """What it begins with."""
    mask: MaskRule = MaskRule()
    """The masks."""
    data: Data = Data()
    """The data."""
    batch: BatchSize = BatchSize()
    """The batch."""
    optimizer: Optimizer = Optimizer()
    """The optimiser."""
    schedule: Schedule = Schedule()
    """The schedules."""
    precision: Precision = Precision()
    """The precision."""
    parallel: Parallel = Parallel()
    """The devices."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    log_every: int = Field(10, ge=1)
    """Steps between readings of the device's values; metrics still have every step."""
    deterministic: bool = True
    """Bitwise repeatable kernels; on CUDA at a cost."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.randomness != randomness.VERSION:
            raise Refused(
                f"randomness = {self.randomness}",
                f"this version draws with {randomness.VERSION}",
                "use the version of ijepa that wrote the recipe, or remove the key to draw anew",
            )
        if self.steps is None and self.images is None and self.epochs is None:
            raise Refused("epochs", "the run has no length", "give epochs, images or steps")
        self.mask.check_grid(self.model.grid)
        micro, whole = self.batch.micro, self.batch.total
        if micro != "auto" and (micro < 1 or whole % micro):
            raise Refused(f"batch.micro = {micro}", f"does not divide batch.global = {whole}", "choose a divisor")
        if isinstance(self.data.workers, int) and self.data.workers < 0:
            raise Refused(f"data.workers = {self.data.workers}", "must be 0 or more, or auto")
        crops = self.data.crops_per_decode
        if whole % crops:
            raise Refused(
                f"data.crops_per_decode = {crops}", f"does not divide batch.global = {whole}", "choose a divisor"
            )
        shard = self.parallel.shard
        if shard != "auto" and shard < 1:
            raise Refused(f"parallel.shard = {shard}", "must be 1 or more, or auto")
        if self.data.images is not None:
            self.lengths(self.data.images)
        elif self.steps is not None and self.schedule.warmup.unit in ("steps", "%"):
            self.lengths(1)
        return self

    def lengths(self, images: int) -> "Lengths":
        """Whole steps of the run, warm-up and tail for a data set of `images` images.

        Raises:
            Refused: when warm-up (with the tail, where there is one) does not end before the run does.
        """
        whole = self.batch.total
        if self.steps is not None:
            total = self.steps
        elif self.images is not None:
            total = max(self.images // whole, 1)
        else:
            total = max(round((self.epochs or 0) * images / whole), 1)
        warmup = self.schedule.warmup.steps(images=images, global_batch=whole, total=total)
        tail = 0
        if self.schedule.decay == "tail":
            tail = self.schedule.tail.steps(images=images, global_batch=whole, total=total)
        if warmup + tail >= total and warmup + tail > 0:
            raise Refused(
                f"schedule.warmup = {self.schedule.warmup}",
                f"{warmup} steps of warm-up" + (f" and {tail} of tail" if tail else "") + f" in a run of {total}",
                "shorten it, for example --schedule.warmup '5 %'",
            )
        return Lengths(total=total, warmup=warmup, tail=tail)

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Load a preset by name or a YAML file, lay dotted `overrides` over it, and validate the whole.

        Raises:
            Refused: naming file, key, value and mend.
        """
        values, where = read_layers(str(name_or_path))
        for key, value in (overrides or {}).items():
            lay(values, key.split("."), value)
        return cls.read(values, where)

    def dump(self) -> str:
        """Return the whole resolved recipe as YAML; loading it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


class Lengths(Section):
    """A run's stretches in whole steps."""

    total: int
    """Steps of the run."""
    warmup: int
    """Steps of warm-up."""
    tail: int
    """Steps of the final fall, 0 with a cosine."""
